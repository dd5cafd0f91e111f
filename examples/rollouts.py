"""Sample rollouts in several processes from the weights that this process trains.

    python examples/rollouts.py                                # on the embedded server
    python examples/rollouts.py --base-url URL --model NAME --workers 8

This is worthwhile if the work around a sample, such as an environment or a parser, needs more than
one processor; for samples alone, one process is enough (sample_many.py).  The workers receive a
sampler as a handle, a string without the key; they use their own TINKER_API_KEY.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import List, NamedTuple, Set

import tinkex
from tinkex import AdamParams
from tinkex.recipes import group_data
from tinkex.types import Datum, ModelInput, SamplingParams

PROMPTS = [[1 + i, 2, 3] for i in range(8)]  # token ids; yours come from a tokenizer


class Rollout(NamedTuple):
    """The result of a worker: the training data of a group of replies, and their rewards."""

    data: List[Datum]
    rewards: List[float]
    worker: int


@functools.lru_cache(maxsize=1)
def sampler_of(handle: str) -> tinkex.SamplingClient:
    """Return this process's client for a sampler."""
    # The handle comes from our own parent process, so its server may receive our key.
    key = os.environ.get("TINKER_API_KEY")
    return tinkex.SamplingClient.from_sampler_handle(handle, api_key=key)


def roll_out(handle: str, seed: int, tokens: List[int]) -> Rollout:
    """Sample a group and compute its rewards.  Runs in a worker."""
    prompt = ModelInput.from_ints(tokens)
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=seed)
    sequences = sampler_of(handle).sample(prompt, 8, params).result().sequences
    rewards = [sum(t % 2 == 0 for t in one.tokens) / one.length for one in sequences]
    return Rollout(group_data(prompt, sequences, rewards), rewards, os.getpid())


def connect(options: argparse.Namespace) -> tinkex.ServiceClient:
    """Open a session on the given server, or on one started here."""
    if options.base_url:
        return tinkex.ServiceClient(base_url=options.base_url)
    return tinkex.ServiceClient.local(options.model)


def main() -> None:
    """Print the mean reward of each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base-url", default=os.environ.get("TINKER_BASE_URL"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks held by our threads
    ctrl_c = (signal.SIGINT, signal.SIG_IGN)  # workers ignore Ctrl-C; this process ends them
    with (
        connect(options) as service,
        ProcessPoolExecutor(options.workers, spawn, signal.signal, ctrl_c) as pool,
    ):
        trainer = service.create_lora_training_client(options.model, rank=8, seed=0)
        pids: Set[int] = set()
        for step in range(options.steps):
            sampler = trainer.save_weights_and_get_sampling_client()
            handle = sampler.get_sampler_handle()
            rollouts = list(pool.map(functools.partial(roll_out, handle, step), PROMPTS))
            sampler.close()
            data = [datum for one in rollouts for datum in one.data]
            if data:  # empty if the rewards of every group are all equal
                trainer.train_step(data, "importance_sampling", AdamParams(learning_rate=1e-3))
            rewards = [reward for one in rollouts for reward in one.rewards]
            pids |= {one.worker for one in rollouts}
            print(f"step {step}: reward {sum(rewards) / len(rewards):.3f}")
        print(f"{len(pids)} processes have sampled: {sorted(pids)}")


if __name__ == "__main__":
    try:
        main()
    except tinkex.TinkexError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
