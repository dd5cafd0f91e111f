"""Train in a run folder: kill this script at any time, run it again, and it continues.

    python examples/resumable.py                               # on the embedded server
    python examples/resumable.py --base-url URL --model NAME --out runs/mine

The loop here is your own; recipes (supervised_chat.py, dpo.py, rl.py) continue in the same way.  At
SIGTERM, the script finishes and saves the step; after any other interruption, it continues from the
last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import List

import numpy as np

import tinkex
from tinkex import AdamParams, Datum, ModelInput


def connect(options: argparse.Namespace) -> tinkex.ServiceClient:
    """Open a session on the given server, or on one started here that keeps its data in --out."""
    if options.base_url:
        return tinkex.ServiceClient(base_url=options.base_url)
    return tinkex.ServiceClient.local(options.model, data_dir=str(options.out / "server"))


def make_batch(index: int) -> List[Datum]:
    """Make the batch of a step, one of four batches that are the same on every run."""
    tokens = np.random.default_rng(index % 4).integers(1, 100, size=17)
    return [Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})]


def main() -> None:
    """Do the remaining steps, and print what the folder has in the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/resumable"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base-url", default=os.environ.get("TINKER_BASE_URL"))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    settings = {"steps": options.steps}  # kept in the folder; a different number is refused later
    with (
        connect(options) as service,
        service.open_run(
            options.out, options.model, rank=8, save_every=5, config=settings, exit_on_sigterm=True
        ) as run,
    ):
        if run.resumed_from is not None:
            print(f"continuing after {run.steps_done} steps")
        for step in run.steps([make_batch(index) for index in range(options.steps)]):
            rate = AdamParams(learning_rate=0.01 * (1 - step.index / options.steps))
            done = run.trainer.train_step(step.batch, "cross_entropy", rate)
            step.log(done.forward_backward.metrics)
            print(f"step {step.index}: loss {done.forward_backward.metrics['loss:sum']:.3f}")
    record = tinkex.read_run(options.out)
    print(f"{len(record.steps)} steps in {len(record.model_ids)} parts")
    print(record.checkpoints[-1].path)


if __name__ == "__main__":
    try:
        main()
    except tinkex.TinkexError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; run it again to continue.")
