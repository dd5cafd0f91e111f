"""Programs of the field, as published, against the embedded server.

They bring many packages, so they have an environment of their own (``tox -e field``); a test of a
program that is not installed is skipped.
"""

from __future__ import annotations

from typing import Iterator

import pytest

from tinkex.local import LocalServer, load_engine

#: The model of these tests: two layers with random weights, and a byte-level tokenizer.
MODEL = "tiny-random"
KEY = "tml-local-secret"


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer(load_engine(MODEL, "cpu"), api_key=KEY) as running:
        yield running
