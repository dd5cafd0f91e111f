"""Train in a run folder: kill this script at any time, run it again, and it continues.

Runs on the server in TINKER_BASE_URL, or on an embedded one whose checkpoints are in the folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import List

import numpy as np

import tinkex
from tinkex import AdamParams, Datum, ModelInput

MODEL = os.environ.get("TINKEX_EXAMPLE_MODEL", "smollm2-135m")
STEPS = 20


def connect(folder: Path) -> tinkex.ServiceClient:
    """Open a session."""
    if "TINKER_BASE_URL" in os.environ:
        return tinkex.ServiceClient()
    return tinkex.ServiceClient.local(MODEL, data_dir=str(folder / "server"))


def make_batch(index: int) -> List[Datum]:
    """Make the batch of one step, one of four: the same whenever it is asked for."""
    tokens = np.random.default_rng(index % 4).integers(1, 100, size=17)
    return [Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})]


def main() -> None:
    """Train what is left of STEPS steps, and print the losses of all."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/resumable")
    with (
        connect(folder) as service,
        service.open_run(
            folder, MODEL, rank=8, save_every=5, config={"steps": STEPS}, exit_on_sigterm=True
        ) as run,
    ):
        if run.resumed_from is not None:
            print(f"continuing after {run.steps_done} steps")
        for step in run.steps([make_batch(index) for index in range(STEPS)]):
            rate = AdamParams(learning_rate=0.01 * (1 - step.index / STEPS))
            done = run.trainer.train_step(step.batch, "cross_entropy", rate)
            step.log(done.forward_backward.metrics)
            print(f"step {step.index}: loss {done.forward_backward.metrics['loss:sum']:.3f}")
    record = tinkex.read_run(folder)
    print(f"{len(record.steps)} steps in {len(record.model_ids)} parts")
    print(record.checkpoints[-1].path)


if __name__ == "__main__":
    main()
