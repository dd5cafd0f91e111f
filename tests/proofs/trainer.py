"""A training script with a run folder, as a user might write it; `sigkill` kills it.

Its batches come from a random generator whose state is part of the run.
"""

from __future__ import annotations

import argparse
from typing import Iterator, List

import numpy as np

import tinkex
from tinkex import AdamParams, Datum, ModelInput

SAVE_EVERY = 3


def batches(first: int, steps: int) -> Iterator[List[Datum]]:
    """A sequence of batches that depend only on their index."""
    for index in range(first, steps):
        yield [example(np.random.default_rng(index)) for _ in range(2)]


def example(rng: np.random.Generator) -> Datum:
    """Return a datum of random tokens, each predicting the next."""
    tokens = rng.integers(1, 100, size=9)
    return Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})


def rate(step: int) -> AdamParams:
    """A learning rate schedule."""
    return AdamParams(learning_rate=1e-3 / (1 + step % 7))


def pipelined(run: tinkex.Run, steps: int) -> None:
    """Supervised training, with three steps in flight."""
    for step in run.pipeline(lambda first: batches(first, steps), "cross_entropy", rate, depth=3):
        step.log(twice=2 * step.index)


def one_by_one(run: tinkex.Run, steps: int) -> None:
    """A loop that draws its examples, as in reinforcement learning."""
    rng = np.random.default_rng()
    for step in run.steps(range(steps)):
        rng.bit_generator.state = run.state["rng"]
        data = [example(rng) for _ in range(2)]
        run.state["rng"] = rng.bit_generator.state
        done = run.trainer.train_step(data, "cross_entropy", rate(step.index))
        step.log(done.forward_backward.metrics)


def main() -> None:
    """Train, or continue."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("folder")
    parser.add_argument("loop", choices=["pipelined", "one_by_one"])
    parser.add_argument("model")
    parser.add_argument("steps", type=int)
    options = parser.parse_args()
    with tinkex.ServiceClient(base_url=options.url) as service:
        run = service.open_run(
            options.folder,
            options.model,
            rank=4,
            seed=1,
            save_every=SAVE_EVERY,
            state={"rng": np.random.default_rng(0).bit_generator.state},
        )
        with run:
            loop = pipelined if options.loop == "pipelined" else one_by_one
            loop(run, options.steps)


if __name__ == "__main__":
    main()
