"""Third-party programs, as published, against the embedded server.

They need many packages, so they have their own environment (``tox -e field``); the test of a
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
