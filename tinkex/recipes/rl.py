"""Reinforcement learning with a reward function: groups of replies, and their advantages."""

from __future__ import annotations

import math
import random
from typing import Callable, List, Mapping, Optional, Sequence, TypeVar, Union

from tinkex._runtime.late_import import np
from tinkex._runtime.numeric import as_int
from tinkex.data import sampled_datum
from tinkex.errors import InvalidInputError
from tinkex.recipes.evaluation import logged
from tinkex.recipes.schedules import Schedule
from tinkex.recipes.supervised import Log
from tinkex.runs import Run
from tinkex.runs.source import SEEDS
from tinkex.types import Datum, ModelInput, SampledSequence, SamplingParams

P = TypeVar("P")


def train_rl(
    run: Run,
    batches: Sequence[List[P]],
    prompt: Callable[[P], Sequence[int]],
    reward: Callable[[P, Sequence[int]], float],
    schedule: Schedule,
    *,
    group_size: int = 8,
    max_tokens: int = 256,
    temperature: float = 1.0,
    stop: Union[str, Sequence[str], Sequence[int], None] = None,
    loss_fn: str = "importance_sampling",
    loss_fn_config: Optional[Mapping[str, Union[float, str]]] = None,
    seed: int = 0,
    log: Optional[Log] = None,
) -> None:
    """Do the remaining steps of *run*, one for each of *batches*.  Blocks.

    Each step samples *group_size* replies to each problem with the current weights, and takes one
    optimizer step on them.  A group whose rewards are all equal teaches nothing and is left out; if
    every group is left out, the weights do not change.

    Metrics of a step: ``reward``, the mean reward; ``informative``, the share of groups that were
    learnt from; ``tokens``, the mean length of a reply; ``learning_rate``; and ``grad_norm`` if the
    server reports it.

    Args:
        run: from `ServiceClient.open_run`.
        batches: batches of problems of any type, such as `Batches`; the same each time the program
            runs.
        prompt: returns the tokens of the prompt for a problem.
        reward: returns the reward of a reply, given the problem and the tokens of the reply.  It is
            called while other replies are still being sampled.
        group_size: replies per problem; at least 2.
        schedule: as for `train_supervised`.
        max_tokens, temperature, stop: settings for sampling replies, as for `SamplingParams`.
        loss_fn, loss_fn_config: ``"importance_sampling"``, ``"ppo"`` or another loss that takes
            logprobs and advantages.
        seed: seed of the samples.
        log: called after each step.

    Raises:
        InvalidInputError: a reward is not a finite number.
        TinkexError: a request failed, or the run could not be saved.
    """
    group_size = as_int("group_size", group_size, 2, text=False)
    for step in run.steps(batches):
        with step:  # so that open_run(on_session_loss="resume") works
            rate = schedule(step.index)
            sampler = run.trainer.save_weights_and_get_sampling_client()
            prompts = [ModelInput.from_ints(prompt(problem)) for problem in step.batch]
            futures = []
            for place, tokens in enumerate(prompts):
                # The seed depends on step and place, so that a step that is done again after a
                # crash samples the same replies.
                params = SamplingParams(
                    max_tokens=max_tokens,
                    temperature=temperature,
                    stop=stop,
                    seed=_seed_of(seed, step.index, place),
                )
                futures.append(sampler.sample(tokens, group_size, params))
            # Read the replies in order of submission, so that data and metrics do not depend on
            # which arrives first; all of them are being sampled at the same time.
            data: List[Datum] = []
            rewards: List[float] = []
            lengths: List[int] = []
            informative = 0
            for problem, tokens, future in zip(step.batch, prompts, futures):
                sequences = future.result().sequences
                found = [float(reward(problem, sequence.tokens)) for sequence in sequences]
                rewards += found
                lengths += [sequence.length for sequence in sequences]
                learnt = group_data(tokens, sequences, found)
                informative += bool(learnt)
                data += learnt
            sampler.close()  # its weights are out of date after the step
            if data:
                done = run.trainer.train_step(data, loss_fn, rate, loss_fn_config)
                step.log({**done.forward_backward.metrics, **(done.optim.metrics or {})})
            step.log(
                reward=sum(rewards) / len(rewards),
                informative=informative / len(prompts),
                tokens=sum(lengths) / len(lengths),
                learning_rate=rate.learning_rate,
            )
            if log is not None:
                log(step.index, logged(step.metrics))


def group_data(
    prompt: ModelInput, sequences: Sequence[SampledSequence], rewards: Sequence[float]
) -> List[Datum]:
    """Return the data of one group of replies; an empty list if all *rewards* are equal.

    The advantage of a reply is its reward minus the mean of the group.

    Raises:
        InvalidInputError: a reward is not finite.
    """
    for value in rewards:
        if not math.isfinite(value):
            raise InvalidInputError(f"a reward is {value}; it must be finite")
    # All advantages would be 0, and so would be the gradient.
    if min(rewards) == max(rewards):
        return []
    advantages = np.asarray(rewards, np.float64) - np.mean(rewards)
    return [
        sampled_datum(prompt, sequence, float(advantage))
        for sequence, advantage in zip(sequences, advantages)
    ]


def _seed_of(*parts: int) -> int:
    """Return a seed that depends on all of *parts*, the same in every release of Python."""
    return random.Random("/".join(map(str, parts))).randrange(SEEDS)
