"""Engines of the tiny random model.  Without torch no test here is collected."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, List

import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tinkex.local.engines.torch_engine import TorchEngine
    from tinkex.types import LoraConfig


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="module", autouse=True)
def untraced(untraced_processes: None) -> None:
    """Run processes without coverage, as all of them import torch."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """For models this small, torch's threads cost more than they gain."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model cache shared by the tests alone."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose output layer shares the embedding's matrix, as SmolLM2's does."""
    from tinkex.local.engines.torch_engine.builtin_models import write_tiny_random

    folder = tmp_path_factory.mktemp("tied")
    write_tiny_random(folder, tie_word_embeddings=True)
    return folder


@pytest.fixture
def engine(cache: Path) -> Any:
    """A fresh engine of tiny-random."""
    return TorchEngine.from_pretrained("tiny-random", device="cpu", cache_dir=cache)


@pytest.fixture
def run(engine: Any) -> Any:
    """The engine with one training run, "m"."""
    engine.create("m", LoraConfig(rank=4, seed=7))
    return engine
