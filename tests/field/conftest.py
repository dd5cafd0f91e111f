"""Programs of the field, as published, against the embedded server.

They bring many packages, so they have an environment of their own (``tox -e field``); a test of a
program that is not installed is skipped.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Iterator, List

import pytest

from tinkex.local import LocalServer, load_engine

#: The model of these tests: two layers with random weights, and a byte-level tokenizer.
MODEL = "tiny-random"
KEY = "tml-local-secret"

#: File of this folder -> the package that it needs.
NEEDS = {"test_openai_package.py": "openai", "test_lm_eval.py": "lm_eval"}


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    for item in items:
        package = NEEDS.get(item.path.name) if item.path.parent == Path(__file__).parent else None
        for name in ("torch", package):
            if name is not None and importlib.util.find_spec(name) is None:
                reason = f"{name} is not installed; tox -e field has it"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer(load_engine(MODEL, "cpu"), api_key=KEY) as running:
        yield running
