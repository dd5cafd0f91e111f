"""A small reinforcement learning loop: the code under test.  See test_rl_loop.py."""

from __future__ import annotations

from typing import Any, Callable, List, Sequence

import tinkex
from tinkex import types


def train(
    service: tinkex.ServiceClient,
    model: str,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Callable[[str], float],
    *,
    steps: int,
    group_size: int = 4,
) -> List[float]:
    """Train *model* to earn *reward*, and return the mean reward of each step.

    The weights are saved as "final".
    """
    trainer = service.create_lora_training_client(model, rank=8, seed=0)
    inputs = [types.ModelInput.from_ints(tokenizer.encode(prompt)) for prompt in prompts]
    params = types.SamplingParams(max_tokens=16, temperature=1.0, seed=0)
    means = []
    for _ in range(steps):
        sampler = trainer.save_weights_and_get_sampling_client()
        futures = [sampler.sample(prompt, group_size, params) for prompt in inputs]
        data: List[types.Datum] = []
        rewards: List[float] = []
        for prompt, future in zip(inputs, futures):
            sequences = future.result().sequences
            earned = [reward(tokenizer.decode(sequence.tokens)) for sequence in sequences]
            baseline = sum(earned) / len(earned)
            data += [
                datum(prompt, sequence, own - baseline) for sequence, own in zip(sequences, earned)
            ]
            rewards += earned
        trainer.train_step(data, "importance_sampling", types.AdamParams(1e-4))
        means.append(sum(rewards) / len(rewards))
    trainer.save_state("final").result()
    return means


def datum(
    prompt: types.ModelInput, sequence: types.SampledSequence, advantage: float
) -> types.Datum:
    """Return a datum that trains on the tokens of *sequence*, but not on the prompt."""
    before = prompt.to_ints()
    tokens = [*before, *sequence.tokens]
    unused = [0.0] * (len(before) - 1)
    return types.Datum(
        types.ModelInput.from_ints(tokens[:-1]),
        {
            "target_tokens": tokens[1:],
            "logprobs": [*unused, *(sequence.logprobs or [])],
            "advantages": [*unused, *[advantage] * len(sequence.tokens)],
        },
    )
