"""Client and server retain no memory of finished work; tests/proofs/load.py does more work."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, NamedTuple

from proofs.load import ADAM, DATA, PARAMS, PROMPT, Server, Usage

from tinkex import ServiceClient

#: How often the work is done: while growth is measured,
UNITS = 100
#: and before.  The server keeps the last 40 results.
WARM_UP = 50
#: Permitted memory blocks per unit of work: a retained object takes two or more.
NOISE = 2
#: Blocks that the server keeps for each of the last 2048 requests of a run or sampler.
REMEMBERED = 8


class Growth(NamedTuple):
    """Memory blocks added per unit of work."""

    client: float
    server: float


def growth(
    server: Server, service: ServiceClient, work: Callable[[], None], *, unit: int = 1
) -> Growth:
    """Do *work*, which is *unit* units, until caches are full; then measure the growth."""
    for _ in range(WARM_UP):
        work()
    service.metrics()  # sums up the counters
    client, other = Usage.now().blocks, server.usage().blocks
    for _ in range(UNITS):
        work()
    service.metrics()
    return Growth(
        (Usage.now().blocks - client) / (UNITS * unit),
        (server.usage().blocks - other) / (UNITS * unit),
    )


def test_steps_samples_and_deleted_checkpoints_leave_nothing_in_memory(tmp_path: Path) -> None:
    server = Server(str(tmp_path), scale=0.002)
    try:
        with ServiceClient(base_url=server.batch_url) as service:
            sampler = service.create_sampling_client(base_model="deterministic")
            trainer = service.create_lora_training_client("deterministic", rank=4)
            rest = service.create_rest_client()

            def sample() -> None:
                for future in [sampler.sample(PROMPT, 1, PARAMS) for _ in range(10)]:
                    future.result()

            def step() -> None:
                trainer.train_step(DATA, "cross_entropy", ADAM)

            def save_and_delete() -> None:
                path = trainer.save_state("a").result().path
                rest.delete_checkpoint_from_tinker_path(path).result()

            sampled = growth(server, service, sample, unit=10)
            trained = growth(server, service, step)
            saved = growth(server, service, save_and_delete)
    finally:
        server.close()
    assert max(sampled.client, trained.client, saved.client) < NOISE
    assert sampled.server < REMEMBERED + NOISE
    assert trained.server < 2 * REMEMBERED + NOISE
    assert saved.server < REMEMBERED + NOISE
