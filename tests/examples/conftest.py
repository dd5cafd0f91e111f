from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Iterator

import pytest
from support.programs import Server, serving

if importlib.util.find_spec("torch") is None:
    collect_ignore = ["test_examples.py", "test_quiet.py"]


@pytest.fixture(scope="module", autouse=True)
def untraced(untraced_processes: None) -> None:
    """Most of them import torch."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """The deterministic engine, behind the real server."""
    from tinkex.local.engines.deterministic import DeterministicEngine

    with serving(DeterministicEngine(), tmp_path / "server") as running:
        yield running
