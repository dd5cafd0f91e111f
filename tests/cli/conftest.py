from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest
from support.programs import Server, serving

import tinkex as library
from tinkex import types


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """The deterministic engine, behind the real server."""
    from tinkex.local.engines.deterministic import DeterministicEngine

    with serving(DeterministicEngine(), tmp_path / "server") as running:
        yield running


@pytest.fixture
def saved(server: Server) -> str:
    """Return the path of the training checkpoint of a run that has one checkpoint of each kind."""
    with library.ServiceClient(base_url=server.url) as service:
        trainer = service.create_lora_training_client(server.model, rank=4)
        datum = types.Datum(
            types.ModelInput.from_ints([5, 6, 7]),
            {"target_tokens": [6, 7, 8], "weights": [1, 1, 1]},
        )
        trainer.train_step([datum], "cross_entropy", types.AdamParams())
        trainer.save_weights_for_sampler("first").result()
        return trainer.save_state("first").result().path
