"""Fixtures of the client's tests."""

from __future__ import annotations

from typing import Iterator

import pytest
from support.scripted_server import ScriptedServer


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A real HTTP server that answers what the test tells it to."""
    with ScriptedServer() as scripted:
        yield scripted
