"""Supervised training on the embedded server: metrics, held-out loss, and how it continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from tinkex import AdamParams, Datum, ModelInput, Run, ServiceClient, read_run
from tinkex.errors import NoProgressError
from tinkex.recipes import (
    Batches,
    evaluate,
    find_sampler,
    learnt_weight,
    linear,
    train_supervised,
)

STEPS = 12


def example(index: int, weights: Optional[List[float]] = None) -> Datum:
    inputs: Dict[str, Any] = {"target_tokens": [index + 1, index + 2, index + 3]}
    if weights is not None:
        inputs["weights"] = weights
    return Datum(ModelInput.from_ints([index, index + 1, index + 2]), inputs)


DATA = [example(index, [0, 1, 1]) for index in range(1, 10)]
HELDOUT = [example(20), example(21, [1, 0, 0])]
BATCHES = Batches(DATA, 2, steps=STEPS, seed=3)
SCHEDULE = linear(0.01, STEPS, warmup=2)


class Crash(NoProgressError):
    """Stands for an end of the program that leaves no chance to save."""


class Lines:
    """Records what was logged; raises at a step."""

    def __init__(self, crash_in: Optional[int] = None) -> None:
        self.lines: List[Any] = []
        self._crash_in = crash_in

    def __call__(self, index: int, metrics: Any) -> None:
        if index == self._crash_in:
            raise Crash("the lights went out")
        self.lines.append((index, dict(metrics)))


def open_run(service: ServiceClient, folder: Path) -> Run:
    return service.open_run(folder, "deterministic", rank=4, seed=1, save_every=3)


def train(service: ServiceClient, folder: Path, log: Lines, **options: Any) -> Optional[float]:
    with open_run(service, folder) as run:
        given = {"heldout": HELDOUT, "eval_every": 4, "log": log, **options}
        return train_supervised(run, BATCHES, SCHEDULE, **given)


def test_losses_are_means_per_token_to_learn(service: ServiceClient, tmp_path: Path) -> None:
    log = Lines()
    final = train(service, tmp_path, log)
    trainer = service.create_lora_training_client("deterministic", rank=4, seed=1)
    before = trainer.forward(BATCHES[0], "cross_entropy").result().metrics["loss:sum"]
    index, first = log.lines[0]
    assert index == 0
    assert first["tokens"] == 4
    assert first["loss"] == before / 4
    assert first["learning_rate"] == 0.005
    assert first["heldout_loss"] == evaluate(trainer, HELDOUT)
    total = trainer.forward(HELDOUT, "cross_entropy").result().metrics["loss:sum"]
    assert first["heldout_loss"] == total / learnt_weight(HELDOUT)
    assert learnt_weight(HELDOUT) == 3 + 1  # all of a datum without weights
    assert final is not None
    assert final < first["heldout_loss"]


def test_heldout_losses_belong_to_the_exact_number_of_steps(
    service: ServiceClient, tmp_path: Path
) -> None:
    log = Lines()
    final = train(service, tmp_path, log)
    found = {index: m["heldout_loss"] for index, m in log.lines if "heldout_loss" in m}
    assert found[STEPS] == final
    by_hand = {}
    trainer = service.create_lora_training_client("deterministic", rank=4, seed=1)
    for index, batch in enumerate(BATCHES):
        by_hand[index] = evaluate(trainer, HELDOUT)
        trainer.train_step(batch, "cross_entropy", SCHEDULE(index))
    by_hand[STEPS] = evaluate(trainer, HELDOUT)
    assert found == {index: by_hand[index] for index in (0, 4, 8, STEPS)}


@pytest.mark.parametrize("crash_in", [0, 4, 7, 11, STEPS])
def test_an_interrupted_run_has_the_results_of_an_uninterrupted_one(
    service: ServiceClient, tmp_path: Path, crash_in: int
) -> None:
    uninterrupted, first, second = Lines(), Lines(crash_in), Lines()
    final = train(service, tmp_path / "whole", uninterrupted)
    with pytest.raises(Crash):
        train(service, tmp_path / "parts", first)
    assert train(service, tmp_path / "parts", second) == final
    assert dict([*first.lines, *second.lines]) == dict(uninterrupted.lines)
    records = [read_run(tmp_path / name).steps for name in ("whole", "parts")]
    expected, found = ([(step.index, step.metrics) for step in steps] for steps in records)
    assert found == expected
    assert [index for index, _ in found] == list(range(STEPS))


def test_accumulation_gives_the_same_gradient_in_several_passes(
    service: ServiceClient, tmp_path: Path
) -> None:
    once, parts = Lines(), Lines()
    train(service, tmp_path / "once", once)
    train(service, tmp_path / "parts", parts, accumulation=2)
    assert [index for index, _ in parts.lines] == [index for index, _ in once.lines]
    for (_, found), (_, expected) in zip(parts.lines, once.lines):
        assert found == pytest.approx(expected, rel=1e-6)


def test_without_heldout_data_nothing_is_measured(service: ServiceClient, tmp_path: Path) -> None:
    log = Lines()
    assert train(service, tmp_path, log, heldout=()) is None
    assert [index for index, _ in log.lines] == list(range(STEPS))
    assert all("heldout_loss" not in metrics for _, metrics in log.lines)


def test_the_journal_names_the_weights_for_sampling(service: ServiceClient, tmp_path: Path) -> None:
    with open_run(service, tmp_path) as run:
        train_supervised(run, BATCHES, SCHEDULE)
        path = run.save_for_sampler()
    record = read_run(tmp_path)
    assert record.sampler is not None
    assert (record.sampler.path, record.sampler.steps) == (path, STEPS)
    assert find_sampler(service, record) == path
    sampler = service.create_sampling_client(path)
    assert sampler.sample(ModelInput.from_ints([1]), 1).result().sequences


def test_for_an_unfinished_run_the_newest_checkpoint_is_sampled(
    service: ServiceClient, tmp_path: Path
) -> None:
    with pytest.raises(Crash):
        train(service, tmp_path, Lines(crash_in=7))
    record = read_run(tmp_path)
    assert record.sampler is None
    path = find_sampler(service, record)
    assert "/sampler_weights/" in path
    sampler = service.create_sampling_client(path)
    prompt = ModelInput.from_ints([1, 2, 3])
    newest = service.create_training_client_from_state(record.checkpoints[-1].path)
    expected = newest.save_weights_and_get_sampling_client().compute_logprobs(prompt).result()
    assert sampler.compute_logprobs(prompt).result() == expected


def test_adam_params_may_come_from_any_function(service: ServiceClient, tmp_path: Path) -> None:
    log = Lines()
    with open_run(service, tmp_path) as run:
        train_supervised(run, BATCHES[:2], lambda index: AdamParams(0.1 * index), log=log)
    assert [metrics["learning_rate"] for _, metrics in log.lines] == [0.0, 0.1]
    assert json.dumps(log.lines)
