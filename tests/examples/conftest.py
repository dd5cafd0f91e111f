from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Iterator

import pytest
from support.programs import Server, serving

if importlib.util.find_spec("torch") is None:
    collect_ignore = [
        "test_examples.py",
        "test_notebook.py",
        "test_quiet.py",
        "test_training_examples.py",
    ]


@pytest.fixture(scope="module", autouse=True)
def untraced(untraced_processes: None) -> None:
    """Run the examples without coverage, as most of them import torch."""


@pytest.fixture(scope="package", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache with the tiny model, made once, apart from the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKEX_CACHE", str(tmp_path_factory.mktemp("models")))
        yield


@pytest.fixture
def torch_server(tmp_path: Path) -> Iterator[Server]:
    """The torch engine with the tiny model, behind the real server."""
    from tinkex.local.server import load_engine

    with serving(load_engine("tiny-random"), tmp_path / "server") as running:
        yield running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """The deterministic engine, behind the real server."""
    from tinkex.local.engines.deterministic import DeterministicEngine

    with serving(DeterministicEngine(), tmp_path / "server") as running:
        yield running
