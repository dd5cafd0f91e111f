"""Reinforcement learning on a task whose replies a program can verify: adding two digits.

    python examples/rl.py                                      # on the embedded server
    python examples/rl.py --base-url URL --model NAME

For each problem, a group of replies is sampled; replies with more reward than the mean of their
group become more likely.  The run is kept in a folder: run the script again after any interruption,
and it continues.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import List, Mapping, NamedTuple, Sequence

import tinkex
from tinkex import recipes

EXAMPLES = "1+1=2\n2+3=5\n4+1=5\n"  # show a base model what to do


class Problem(NamedTuple):
    """An addition with a sum of one digit."""

    left: int
    right: int


PROBLEMS = [Problem(left, right) for left in range(10) for right in range(10 - left)]


def reward_of(problem: Problem, reply: str) -> float:
    """Return 1 for the right sum, 0.2 for another digit, and 0 for anything else."""
    if reply[:1] not in tuple("0123456789"):
        return 0.0
    return 1.0 if int(reply[0]) == sum(problem) else 0.2


def connect(options: argparse.Namespace) -> tinkex.ServiceClient:
    """Open a session on the given server, or on one started here that keeps its data in --out."""
    if options.base_url:
        return tinkex.ServiceClient(base_url=options.base_url)
    return tinkex.ServiceClient.local(options.model, data_dir=str(options.out / "server"))


def main() -> None:
    """Print the mean reward of each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/rl"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base-url", default=os.environ.get("TINKER_BASE_URL"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()

    def log(step: int, metrics: Mapping[str, float]) -> None:
        print(f"step {step}: reward {metrics['reward']:.3f}")

    with (
        connect(options) as service,
        service.open_run(options.out, options.model, rank=16, seed=0, save_every=5) as run,
    ):
        tokenizer = run.trainer.get_tokenizer()

        def prompt(problem: Problem) -> List[int]:
            text = f"{EXAMPLES}{problem.left}+{problem.right}="
            tokens: List[int] = tokenizer.encode(text)
            return tokens

        def reward(problem: Problem, tokens: Sequence[int]) -> float:
            return reward_of(problem, tokenizer.decode(tokens).strip())

        recipes.train_rl(
            run,
            recipes.Batches(PROBLEMS, 8, steps=options.steps),
            prompt,
            reward,
            recipes.constant(options.learning_rate),
            group_size=8,
            max_tokens=2,
            log=log,
        )
        print(run.save_for_sampler())


if __name__ == "__main__":
    try:
        main()
    except tinkex.TinkexError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; run it again to continue.")
