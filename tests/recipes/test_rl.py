"""Reinforcement learning on the embedded server: advantages, rewards that rise, continuing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Optional, Sequence

import numpy as np
import pytest

from tinkex import ModelInput, ServiceClient, read_run
from tinkex.errors import InvalidInputError, NoProgressError
from tinkex.recipes import Batches, constant, group_data, train_rl
from tinkex.types import SampledSequence

STEPS = 6


class Crash(NoProgressError):
    """Stands for an end of the program that leaves no chance to save."""


def prompt(problem: int) -> List[int]:
    return [problem + 1, 5]


def parity(problem: int, tokens: Sequence[int]) -> float:
    """Return the share of even tokens."""
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


def train(
    service: ServiceClient,
    folder: Path,
    crash_in: Optional[int] = None,
    reward: Any = parity,
    model: str = "deterministic",
    **options: Any,
) -> List[Any]:
    lines: List[Any] = []

    def log(index: int, metrics: Any) -> None:
        if index == crash_in:
            raise Crash("the lights went out")
        lines.append((index, dict(metrics)))

    given = {"group_size": 4, "max_tokens": 6, "log": log, **options}
    batches = Batches(range(8), 3, steps=given.pop("steps", STEPS))
    with service.open_run(folder, model, rank=4, seed=1, save_every=2) as run:
        train_rl(run, batches, prompt, reward, given.pop("schedule", constant(0.01)), **given)
    return lines


def test_advantages_are_rewards_less_the_mean_of_the_group() -> None:
    sequences = [SampledSequence("length", [7, 8], [-1.0, -2.0]) for _ in range(3)]
    data = group_data(ModelInput.from_ints([1, 2, 3]), sequences, [0.0, 1.0, 2.0])
    found = [datum.loss_fn_inputs["advantages"].to_numpy().tolist() for datum in data]
    assert found == [[0, 0, -1, -1], [0, 0, 0, 0], [0, 0, 1, 1]]
    logprobs = data[0].loss_fn_inputs["logprobs"].to_numpy()
    assert np.array_equal(logprobs, np.array([0, 0, -1, -2], np.float32))
    assert group_data(ModelInput.from_ints([1]), sequences, [1.0, 1.0, 1.0]) == []
    with pytest.raises(InvalidInputError, match="a reward is nan"):
        group_data(ModelInput.from_ints([1]), sequences, [1.0, float("nan"), 1.0])


@pytest.mark.parametrize("crash_in", [0, 3, 5])
@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo"])
def test_an_interrupted_run_has_the_results_of_an_uninterrupted_one(
    service: ServiceClient, tmp_path: Path, crash_in: int, loss_fn: str
) -> None:
    uninterrupted = train(service, tmp_path / "whole", loss_fn=loss_fn)
    with pytest.raises(Crash):
        train(service, tmp_path / "parts", crash_in, loss_fn=loss_fn)
    train(service, tmp_path / "parts", loss_fn=loss_fn)
    records = [read_run(tmp_path / name).steps for name in ("whole", "parts")]
    expected, found = ([(step.index, step.metrics) for step in steps] for steps in records)
    assert found == expected
    assert [index for index, _ in uninterrupted] == list(range(STEPS))
    assert {"reward", "informative", "tokens", "learning_rate"} <= uninterrupted[0][1].keys()


def test_groups_with_equal_rewards_are_not_trained_on(
    service: ServiceClient, tmp_path: Path
) -> None:
    lines = train(service, tmp_path / "none", reward=lambda problem, tokens: 1.0)
    assert [(m["reward"], m["informative"]) for _, m in lines] == [(1.0, 0.0)] * STEPS
    first = read_run(tmp_path / "none").checkpoints[-1]
    trainer = service.create_training_client_from_state(first.path)
    fresh = service.create_lora_training_client("deterministic", rank=4, seed=1)
    tokens = ModelInput.from_ints([1, 2, 3])
    found, expected = (
        client.save_weights_and_get_sampling_client().compute_logprobs(tokens).result()
        for client in (trainer, fresh)
    )
    assert found == expected


def test_an_infinite_or_nan_reward_ends_the_run(service: ServiceClient, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="a reward is inf"):
        train(service, tmp_path, reward=lambda problem, tokens: float("inf"))


@pytest.mark.engine
@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo"])
def test_the_reward_rises(tmp_path: Path, loss_fn: str) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    with ServiceClient.local("tiny-random", data_dir=str(tmp_path / "server")) as service:
        lines = train(
            service,
            tmp_path / "run",
            model="tiny-random",
            steps=20,
            group_size=8,
            schedule=constant(0.005),
            loss_fn=loss_fn,
        )
    rewards = [metrics["reward"] for _, metrics in lines]
    assert np.mean(rewards[:3]) < 0.65
    assert np.mean(rewards[-3:]) > 0.85
