"""Move a run from the embedded server to another one, and continue training there.

    python examples/move_run.py
    python examples/move_run.py --model tiny-random --out runs/dry

A tinkex server keeps its runs and checkpoints in its data folder, here within the run's own folder,
so only that folder moves.  In this example the other server is `tinkex serve` on this machine; for
a GPU machine, copy the folder (`rsync -a runs/mine gpu:runs/`) and start the server there.

Other servers accept no checkpoints from outside: train on them from the beginning, with their base
URL.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List

import numpy as np

import tinkex
from tinkex import AdamParams, Datum, ModelInput

TOKENS = list(range(10, 42))
BATCH = [Datum(ModelInput.from_ints(TOKENS[:-1]), {"target_tokens": TOKENS[1:]})]


@contextlib.contextmanager
def serve(model: str, folder: Path) -> Iterator[str]:
    """Run `tinkex serve` on this machine with the data of a run; yield its base URL."""
    command = [sys.executable, "-m", "tinkex", "serve", "--model", model, "--port", "0"]
    log = folder / "serve.log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [*command, "--data-dir", str(folder / "server")],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()  # empty if the server failed
            found = re.search(r"TINKER_BASE_URL=(http[^;]+);", ready)
            if found is None:
                raise tinkex.LocalServerError(f"tinkex serve did not start; {log} has the reason")
            yield found[1]
        finally:
            process.terminate()


def train(service: tinkex.ServiceClient, model: str, folder: Path, steps: int) -> List[float]:
    """Train up to *steps* steps in all; return the log-probabilities of TOKENS before the first."""
    with service.open_run(folder, model, rank=8, seed=0) as run:
        before = run.trainer.forward(BATCH, "cross_entropy").result()
        for step in run.steps([BATCH] * steps):
            done = run.trainer.train_step(step.batch, "cross_entropy", AdamParams(1e-3))
            loss = done.forward_backward.metrics["loss:sum"]
            print(f"step {step.index}: loss {loss:.3f} on {service.config.base_url}")
    logprobs: List[float] = before.loss_fn_outputs[0]["logprobs"].tolist()
    return logprobs


def main() -> None:
    """Train five steps here and five there; compare the model before and after the move."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/move_run"))
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()

    if options.out.exists():
        parser.error(f"{options.out} exists; name a new folder")
    here, there = options.out / "here", options.out / "there"
    with tinkex.ServiceClient.local(options.model, data_dir=str(here / "server")) as service:
        train(service, options.model, here, 5)
        trained = train(service, options.model, here, 5)  # nothing is left to do
    shutil.copytree(here, there)
    with serve(options.model, there) as url, tinkex.ServiceClient(base_url=url) as service:
        moved = train(service, options.model, there, 10)
    difference = np.abs(np.subtract(trained, moved)).max()
    print(f"largest difference of a log-probability after the move: {difference:.2g}")
    if difference > 1e-4:
        sys.exit("Error: the model that arrived is not the one that left")


if __name__ == "__main__":
    try:
        main()
    except tinkex.TinkexError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
