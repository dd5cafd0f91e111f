"""Run folders, on the embedded server: after any end, a run continues to the same weights."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Type

import numpy as np
import pytest
import requests
from support.disks import no_room
from support.programs import environment
from support.threads import wait_until

from tinkex import Run, RunStep, ServiceClient, TrainingClient, read_run, types
from tinkex._runtime import lifecycle
from tinkex.errors import (
    BadRequestError,
    ClientClosedError,
    InvalidInputError,
    NoProgressError,
    RequestFailedError,
    RunFolderError,
    SessionLostError,
)
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.runs.journal import Journal
from tinkex.runs.records import ServerRecord
from tinkex.types import AdamParams

ADAM = AdamParams(learning_rate=0.01)
STEPS = 12


def batch(index: int) -> List[types.Datum]:
    tokens = types.TensorData.from_numpy(np.array([index + 2, 2], dtype=np.int64))
    return [types.Datum(types.ModelInput.from_ints([index + 1, 1]), {"target_tokens": tokens})]


BATCHES = [batch(index) for index in range(STEPS)]


class Crash(NoProgressError):
    """Stands for an end of the program that leaves no chance to save."""


@contextlib.contextmanager
def ending_in(error: Optional[Type[BaseException]], match: Optional[str] = None) -> Iterator[None]:
    """Expect the block to raise *error*, possibly wrapped."""
    if error is None:
        yield
        return
    with pytest.raises(error, match=match):
        yield


def open_run(service: ServiceClient, folder: Path, **options: Any) -> Run:
    return service.open_run(folder, "deterministic", **{"rank": 4, "save_every": 3, **options})


def train(run: Run, crash_in: Optional[int] = None, depth: int = 0) -> List[int]:
    """Do the remaining steps of STEPS; return their indices."""
    done = []
    steps: Iterator[RunStep[Any]]
    if depth:
        steps = run.pipeline(BATCHES, "cross_entropy", ADAM, depth=depth)
    else:
        steps = run.steps(BATCHES)
    for step in steps:
        if step.index == crash_in:
            raise Crash("the lights went out")
        if not depth:
            result = run.trainer.train_step(step.batch, "cross_entropy", ADAM)
            step.log(result.forward_backward.metrics)
        done.append(step.index)
    return done


def losses(folder: Path) -> List[float]:
    steps = read_run(folder).steps
    assert [step.index for step in steps] == list(range(len(steps)))
    return [step.metrics["loss:sum"] for step in steps]


def final_loss(service: ServiceClient, folder: Path) -> float:
    saved = read_run(folder).checkpoints[-1]
    trainer = service.create_training_client_from_state_with_optimizer(saved.path)
    return trainer.forward(batch(0), "cross_entropy").result().metrics["loss:sum"]


@pytest.fixture
def expected(service: ServiceClient) -> List[float]:
    """The losses of an uninterrupted run, and the loss of its final weights."""
    trainer = service.create_lora_training_client("deterministic", rank=4)
    found = [
        trainer.train_step(each, "cross_entropy", ADAM).forward_backward.metrics["loss:sum"]
        for each in BATCHES
    ]
    found.append(trainer.forward(batch(0), "cross_entropy").result().metrics["loss:sum"])
    assert len(set(found)) == STEPS + 1
    return found


# To be continued


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("crash_in", [0, 1, 3, 7, 11])
def test_a_crashed_run_continues_to_the_same_weights(
    service: ServiceClient, tmp_path: Path, expected: List[float], crash_in: int, depth: int
) -> None:
    with ending_in(Crash), open_run(service, tmp_path) as run:
        train(run, crash_in, depth)
    with open_run(service, tmp_path) as run:
        done = train(run, depth=depth)
        resumed = run.resumed_from
    first = resumed.steps if resumed else 0
    assert done == list(range(first, STEPS))
    assert first % 3 == 0
    assert crash_in - 3 - depth <= first <= crash_in + depth
    assert [*losses(tmp_path), final_loss(service, tmp_path)] == expected


def test_a_run_that_crashes_after_each_step(
    service: ServiceClient, tmp_path: Path, expected: List[float]
) -> None:
    for crash_in in range(1, STEPS):
        with ending_in(Crash), open_run(service, tmp_path, save_every=1) as run:
            train(run, crash_in)
    with open_run(service, tmp_path, save_every=1) as run:
        train(run)
    assert [*losses(tmp_path), final_loss(service, tmp_path)] == expected
    assert len(read_run(tmp_path).model_ids) == STEPS


def test_a_finished_run_has_no_steps_left(service: ServiceClient, tmp_path: Path) -> None:
    with open_run(service, tmp_path) as run:
        assert train(run) == list(range(STEPS))
    before = read_run(tmp_path).checkpoints
    assert (before[-1].steps, before[-1].ttl_seconds) == (STEPS, None)
    with open_run(service, tmp_path) as run:
        assert train(run) == []
        assert run.steps_done == STEPS
    assert read_run(tmp_path).checkpoints == before


def test_without_a_seed_the_first_random_seed_is_kept(
    service: ServiceClient, tmp_path: Path
) -> None:
    with ending_in(Crash), open_run(service, tmp_path) as run:
        seed = run.record.spec["seed"]
        train(run, crash_in=1)
    with open_run(service, tmp_path) as run:
        assert run.record.spec["seed"] == seed
        assert run.resumed_from is None


def test_several_loops_one_after_the_other(service: ServiceClient, tmp_path: Path) -> None:
    seen: List[Any] = []

    def epochs(run: Run, crash_in: Optional[int]) -> None:
        for epoch in range(3):
            for step in run.steps(BATCHES[:4]):
                if step.index == crash_in:
                    raise Crash("the lights went out")
                seen.append((epoch, step.index))
                run.trainer.train_step(step.batch, "cross_entropy", ADAM)

    for crash_in in (5, 8, None):
        with ending_in(Crash if crash_in else None), open_run(service, tmp_path) as run:
            epochs(run, crash_in)
    again = [(0, 3), (1, 4)]  # saved after 3 and 6 steps
    again2 = [(1, 6), (1, 7)]
    assert seen == [
        *[(0, 0), (0, 1), (0, 2), (0, 3), (1, 4)],
        *again,
        *[(1, 5), (1, 6), (1, 7)],
        *again2,
        *[(2, 8), (2, 9), (2, 10), (2, 11)],
    ]
    assert [step.index for step in read_run(tmp_path).steps] == list(range(12))


def test_a_loop_within_a_loop_is_refused(service: ServiceClient, tmp_path: Path) -> None:
    with open_run(service, tmp_path) as run:
        with ending_in(InvalidInputError, "cannot be nested"):
            for _ in run.steps(BATCHES):
                for _ in run.steps(BATCHES):
                    pass


class DataSet:
    """A sequence that is not registered as one, and records which items were read."""

    def __init__(self) -> None:
        self.read: List[int] = []

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> List[types.Datum]:
        self.read.append(index)
        return batch(index)


def test_only_the_needed_batches_are_read_from_a_data_set_or_function(
    service: ServiceClient, tmp_path: Path
) -> None:
    for kind in ("data set", "function", "iterable"):
        data = DataSet()

        def from_place(first: int, data: DataSet = data) -> Iterator[Any]:
            return (data[index] for index in range(first, 5))

        batches: Any = {"data set": data, "function": from_place, "iterable": map(batch, range(5))}
        folder = tmp_path / kind
        with ending_in(Crash), open_run(service, folder) as run:
            for step in run.steps(BATCHES[:5]):
                run.trainer.train_step(step.batch, "cross_entropy", ADAM)
                if step.index == 4:
                    raise Crash("the lights went out")
        with open_run(service, folder) as run:
            assert [step.index for step in run.steps(batches[kind])] == [3, 4]
        assert data.read == ([] if kind == "iterable" else [3, 4])


@pytest.mark.parametrize("batches", [5, None, 1.5])
def test_invalid_batches(service: ServiceClient, tmp_path: Path, batches: Any) -> None:
    with open_run(service, tmp_path) as run:
        with pytest.raises(InvalidInputError, match="batches is"):
            list(run.steps(batches))


def test_fewer_batches_than_before(service: ServiceClient, tmp_path: Path) -> None:
    with open_run(service, tmp_path) as run:
        train(run)
    with open_run(service, tmp_path) as run:
        with pytest.raises(InvalidInputError, match="only 2 batches, but the run has done 12"):
            list(run.steps(iter(BATCHES[:2])))


def test_state_is_restored_with_the_weights(service: ServiceClient, tmp_path: Path) -> None:
    def draw(run: Run, crash_in: Optional[int]) -> None:
        rng = np.random.default_rng()
        for step in run.steps(range(7)):
            rng.bit_generator.state = run.state["rng"]
            step.log(drawn=rng.integers(1000))
            run.state["rng"] = rng.bit_generator.state
            run.trainer.train_step(batch(0), "cross_entropy", ADAM)
            if step.index == crash_in:
                raise Crash("the lights went out")

    first = {"rng": np.random.default_rng(7).bit_generator.state}
    with ending_in(Crash), open_run(service, tmp_path, state=first) as run:
        draw(run, 5)
    with open_run(service, tmp_path, state=first) as run:
        assert run.resumed_from is not None
        draw(run, None)
    rng = np.random.default_rng(7)
    expected = [int(rng.integers(1000)) for _ in range(7)]
    assert [step.metrics["drawn"] for step in read_run(tmp_path).steps] == expected


def test_start_from_a_checkpoint(service: ServiceClient, tmp_path: Path) -> None:
    trainer = service.create_lora_training_client("deterministic", rank=4)
    trainer.train_step(batch(0), "cross_entropy", ADAM)
    path = trainer.save_state("a").result().path
    now = trainer.forward(batch(0), "cross_entropy").result().metrics["loss:sum"]
    with open_run(service, tmp_path, start_from=path) as run:
        done = run.trainer.forward(batch(0), "cross_entropy").result()
        assert done.metrics["loss:sum"] == now
    with pytest.raises(RunFolderError, match=r"other settings: .*start_from was 'tinker://"):
        open_run(service, tmp_path, start_from=path.replace("/a", "/b"))


# Steps and saves


def test_a_step_that_is_left_with_break_counts_if_it_has_trained(
    service: ServiceClient, tmp_path: Path
) -> None:
    with open_run(service, tmp_path) as run:
        for step in run.steps(BATCHES):
            if step.index == 4:
                break
            run.trainer.train_step(step.batch, "cross_entropy", ADAM)
        for step in run.steps(BATCHES):
            run.trainer.train_step(step.batch, "cross_entropy", ADAM)
            step.log(last=step.index)
            break
    record = read_run(tmp_path)
    assert [step.index for step in record.steps] == [0, 1, 2, 3, 4]
    assert record.steps[-1].metrics == {"last": 4}
    newest = record.checkpoints[-1]
    assert (newest.steps, newest.loop, newest.batch) == (5, 1, 1)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_pipeline_that_is_left_with_break_waits_for_the_submitted_steps(
    service: ServiceClient, tmp_path: Path, expected: List[float], depth: int
) -> None:
    with open_run(service, tmp_path) as run:
        for step in run.pipeline(BATCHES, "cross_entropy", ADAM, depth=depth):
            if step.index == 4:
                break
    assert len(losses(tmp_path)) == read_run(tmp_path).checkpoints[-1].steps == 4 + depth
    with open_run(service, tmp_path) as run:
        train(run, depth=depth)
    assert [*losses(tmp_path), final_loss(service, tmp_path)] == expected


@pytest.mark.parametrize("trained", [False, True], ids=["before training", "after training"])
def test_ctrl_c_saves_only_whole_steps(
    service: ServiceClient, tmp_path: Path, trained: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with ending_in(KeyboardInterrupt), open_run(service, tmp_path, save_every=2) as run:
        for step in run.steps(BATCHES):
            if step.index == 3 and not trained:
                raise KeyboardInterrupt
            run.trainer.train_step(step.batch, "cross_entropy", ADAM)
            if step.index == 3:
                raise KeyboardInterrupt
    assert read_run(tmp_path).checkpoints[-1].steps == (2 if trained else 3)
    assert ("left within a step" in caplog.text) == trained


def test_ctrl_c_within_a_step_keeps_the_checkpoint_being_saved(
    service: ServiceClient, tmp_path: Path
) -> None:
    with ending_in(KeyboardInterrupt), open_run(service, tmp_path, save_every=2) as run:
        for step in run.steps(BATCHES):
            run.trainer.forward_backward(step.batch, "cross_entropy")
            if step.index == 2:
                assert read_run(tmp_path).checkpoints == []  # it is recorded at the end of a step
                raise KeyboardInterrupt
            run.trainer.optim_step(ADAM).result()
    assert read_run(tmp_path).checkpoints[-1].steps == 2


def test_ctrl_c_in_a_pipeline_saves_the_steps_that_were_sent(
    service: ServiceClient,
    tmp_path: Path,
    expected: List[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ending_in(KeyboardInterrupt), open_run(service, tmp_path) as run:
        for step in run.pipeline(BATCHES, "cross_entropy", ADAM, depth=3):
            if step.index == 4:
                raise KeyboardInterrupt
    assert read_run(tmp_path).checkpoints[-1].steps >= 5
    with open_run(service, tmp_path) as run:
        train(run, depth=3)
    assert [*losses(tmp_path), final_loss(service, tmp_path)] == expected


@pytest.mark.parametrize("on_session_loss", ["raise", "resume"])
def test_steps_that_the_loop_did_not_see_are_logged_with_their_metrics(
    service: ServiceClient, tmp_path: Path, on_session_loss: str
) -> None:
    def metrics(step: RunStep[Any]) -> Dict[str, float]:
        assert step.result is not None
        return {"half": step.result.metrics["loss:sum"] / 2}

    options = {"on_session_loss": on_session_loss}
    with ending_in(KeyboardInterrupt), open_run(service, tmp_path, **options) as run:
        for step in run.pipeline(BATCHES, "cross_entropy", ADAM, depth=3, metrics=metrics):
            with step:
                if step.index == 4:
                    assert step.metrics["half"] == step.metrics["loss:sum"] / 2
                    raise KeyboardInterrupt
    record = read_run(tmp_path)
    assert record.checkpoints[-1].steps == len(record.steps) > 5
    assert [s.metrics["half"] for s in record.steps] == [loss / 2 for loss in losses(tmp_path)]


def test_weights_for_sampling_are_in_the_journal(service: ServiceClient, tmp_path: Path) -> None:
    with open_run(service, tmp_path) as run:
        train(run)
        path = run.save_for_sampler()
    sampler = read_run(tmp_path).sampler
    assert sampler is not None
    assert (sampler.path, sampler.steps) == (path, STEPS)
    assert path.endswith(f"/sampler_weights/sampler-{STEPS}-1")


@pytest.mark.parametrize("depth", [0, 3])
def test_weights_for_sampling_contain_the_steps_that_the_journal_names(
    service: ServiceClient, tmp_path: Path, expected: List[float], depth: int
) -> None:
    """Even after the loop was left, and any number of times."""
    with open_run(service, tmp_path) as run:
        if depth:
            for step in run.pipeline(BATCHES, "cross_entropy", ADAM, depth=depth):
                if step.index == 1:
                    break
        else:
            for step in run.steps(BATCHES):
                run.trainer.train_step(step.batch, "cross_entropy", ADAM)
                if step.index == 1:
                    break
        paths = [run.save_for_sampler(), run.save_for_sampler()]
        sampler = run.record.sampler
        assert sampler is not None
        assert sampler.path == paths[1] != paths[0]
        assert sampler.steps == run.steps_done == (1 + depth if depth else 2)
        assert len(run.record.steps) == sampler.steps
        probe = run.trainer.forward(batch(run.steps_done), "cross_entropy").result()
        assert probe.metrics["loss:sum"] == expected[run.steps_done]
    assert read_run(tmp_path).checkpoints[-1].steps == sampler.steps


def test_weights_for_sampling_are_not_saved_within_a_step(
    service: ServiceClient, tmp_path: Path
) -> None:
    with open_run(service, tmp_path) as run:
        for step in run.steps(BATCHES[:2]):
            assert run.save_for_sampler()  # the current step has not trained yet
            assert run.record.sampler is not None
            assert run.record.sampler.steps == step.index
            run.trainer.train_step(step.batch, "cross_entropy", ADAM)
            with pytest.raises(InvalidInputError, match=f"within step {step.index}"):
                run.save_for_sampler()
        for _ in run.pipeline(BATCHES, "cross_entropy", ADAM):
            with pytest.raises(InvalidInputError, match="within step"):
                run.save_for_sampler()
        assert run.save_for_sampler()
        assert run.record.sampler.steps == run.steps_done == 2 + STEPS


@pytest.mark.parametrize("always", [False, True], ids=["once", "always"])
@pytest.mark.parametrize("on_session_loss", ["raise", "resume"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, InvalidInputError])
def test_failing_loggers_lose_no_step(
    service: ServiceClient,
    tmp_path: Path,
    expected: List[float],
    error: Type[BaseException],
    on_session_loss: str,
    always: bool,
) -> None:
    failures = []

    def metrics(step: RunStep[Any]) -> Dict[str, int]:
        if step.index == 4 or (always and step.index > 4):
            failures.append(step.index)
            raise error(f"no metrics of {step.index}")
        return {"own": step.index}

    options = {"on_session_loss": on_session_loss, "save_every": 100}
    with ending_in(error, "no metrics of 4"), open_run(service, tmp_path, **options) as run:
        for step in run.pipeline(BATCHES, "cross_entropy", ADAM, depth=3, metrics=metrics):
            with step:
                pass
    record = read_run(tmp_path)
    done = record.checkpoints[-1].steps
    assert done == len(record.steps) == 7
    assert losses(tmp_path) == expected[:done]
    assert failures == ([4, 5, 6] if always else [4])
    assert [s.metrics.get("own") for s in record.steps] == [
        None if index in failures else index for index in range(done)
    ]


@pytest.mark.parametrize("ending", ["close", "save_for_sampler", "loop"])
def test_errors_of_loggers_after_the_loop_are_raised_at_the_end(
    service: ServiceClient, tmp_path: Path, ending: str
) -> None:
    def metrics(step: RunStep[Any]) -> Dict[str, int]:
        if step.index >= 2:
            raise ZeroDivisionError(f"no metrics of {step.index}")
        return {}

    with (
        ending_in(ZeroDivisionError, "no metrics of 2"),
        open_run(service, tmp_path, save_every=100) as run,
    ):
        for step in run.pipeline(BATCHES, "cross_entropy", ADAM, depth=3, metrics=metrics):
            if step.index == 1:
                break
        if ending == "save_for_sampler":
            run.save_for_sampler()
        elif ending == "loop":
            list(run.steps(BATCHES))
    assert read_run(tmp_path).checkpoints[-1].steps == len(losses(tmp_path)) == 4


def test_no_checkpoint_is_made_while_a_gradient_accumulates(
    service: ServiceClient, tmp_path: Path
) -> None:
    with ending_in(Crash), open_run(service, tmp_path, save_every=1) as run:
        for step in run.steps(BATCHES):
            run.trainer.forward_backward(step.batch, "cross_entropy").result()
            if step.index % 4 == 3:
                run.trainer.optim_step(ADAM).result()
            if step.index == 10:
                raise Crash("the lights went out")
    assert read_run(tmp_path).checkpoints[-1].steps in (4, 8)  # 8 may not have arrived yet
    with open_run(service, tmp_path) as run:
        assert run.steps_done % 4 == 0


def test_a_checkpoint_after_a_failed_step_is_dropped(
    service: ServiceClient, tmp_path: Path, local: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that reads its results one step late notices a failure only after the save."""
    fail_in, calls = 2, iter(range(100))
    original = DeterministicEngine.forward_backward

    def forward_backward(engine: Any, *args: Any) -> Any:
        if next(calls) == fail_in:
            raise RuntimeError("out of memory")
        return original(engine, *args)

    monkeypatch.setattr(DeterministicEngine, "forward_backward", forward_backward)
    with ending_in(RequestFailedError), open_run(service, tmp_path, save_every=1) as run:
        waiting = None
        for step in run.steps(BATCHES):
            passed = run.trainer.forward_backward(step.batch, "cross_entropy")
            stepped = run.trainer.optim_step(ADAM)
            if waiting is not None:
                for future in waiting:
                    future.result()
            waiting = (passed, stepped)
    assert all(saved.steps <= fail_in for saved in read_run(tmp_path).checkpoints)


def test_late_metrics_belong_to_their_step(service: ServiceClient, tmp_path: Path) -> None:
    steps: List[RunStep[Any]] = []
    with open_run(service, tmp_path) as run:
        for step in run.steps(range(3)):
            step.log({"a:sum": 1}, text="x", flag=True, nothing=None)
            steps.append(step)
        steps[0].log(late=np.float32(0.5), worst=float("nan"))
        with pytest.raises(InvalidInputError, match="'b' is of type list"):
            steps[1].log(b=[1])
    record = read_run(tmp_path)
    assert record.steps[0].metrics == {
        **{"a:sum": 1, "text": "x", "flag": True, "nothing": None},
        **{"late": 0.5, "worst": "nan"},
    }
    assert record.steps[1].metrics == {"a:sum": 1, "text": "x", "flag": True, "nothing": None}
    for line in (tmp_path / "journal.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    with pytest.raises(ClientClosedError):
        steps[2].log(more=1)


# Checkpoints on the server


def names_on_server(service: ServiceClient) -> List[str]:
    listed = service.create_rest_client().list_user_checkpoints().result().checkpoints
    return [found.tinker_path for found in listed]


def test_older_checkpoints_are_deleted_and_the_others_expire(
    service: ServiceClient, tmp_path: Path
) -> None:
    with open_run(service, tmp_path, save_every=2, keep=2, ttl_seconds=7200) as run:
        train(run)
    kept = read_run(tmp_path).checkpoints
    assert [saved.ttl_seconds for saved in kept] == [7200, None]
    assert sorted(names_on_server(service)) == sorted(saved.path for saved in kept)
    listed = service.create_rest_client().list_user_checkpoints().result().checkpoints
    assert sorted(found.expires_at is None for found in listed) == [False, True]


def test_a_deleted_checkpoint_is_skipped(
    service: ServiceClient,
    tmp_path: Path,
    expected: List[float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with ending_in(Crash), open_run(service, tmp_path) as run:
        train(run, crash_in=10)
    before, newest = read_run(tmp_path).checkpoints
    rest = service.create_rest_client()
    rest.delete_checkpoint_from_tinker_path(newest.path).result()
    with open_run(service, tmp_path) as run:
        assert run.resumed_from == before
        assert f"the checkpoint of {newest.steps} steps cannot be loaded" in caplog.text
        train(run)
    assert [*losses(tmp_path), final_loss(service, tmp_path)] == expected


def test_a_run_whose_checkpoints_are_all_gone_does_not_start_over(
    service: ServiceClient, tmp_path: Path
) -> None:
    with open_run(service, tmp_path) as run:
        train(run)
    before = (tmp_path / "journal.jsonl").read_bytes()
    with LocalServer(DeterministicEngine()) as other, ServiceClient(base_url=other.url) as client:
        with pytest.raises(RunFolderError, match="has none of the 2 checkpoints") as caught:
            open_run(client, tmp_path)
        assert "data_dir" in str(caught.value)
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    with open_run(service, tmp_path) as run:
        assert run.steps_done == STEPS


def test_a_save_whose_response_was_lost_is_found(
    service: ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: List[float]
) -> None:
    save = TrainingClient.save_state

    def save_twice(trainer: TrainingClient, *args: Any, **options: Any) -> Any:
        save(trainer, *args, **options)
        return save(trainer, *args, **options)  # 409: the checkpoint exists already

    monkeypatch.setattr(TrainingClient, "save_state", save_twice)
    with open_run(service, tmp_path) as run:
        train(run)
    assert read_run(tmp_path).checkpoints[-1].steps == STEPS
    assert final_loss(service, tmp_path) == expected[-1]


def test_failing_saves_are_retried_three_times(
    service: ServiceClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = DeterministicEngine.save
    failing = 2

    def fail(engine: Any, *args: Any, **options: Any) -> Any:
        nonlocal failing
        failing -= 1
        if failing >= 0:
            raise RuntimeError("no space left")
        return original(engine, *args, **options)

    monkeypatch.setattr(DeterministicEngine, "save", fail)
    with open_run(service, tmp_path) as run:
        train(run)
    assert caplog.text.count("was not saved; trying again") == 2
    assert read_run(tmp_path).checkpoints[-1].steps == STEPS
    failing = 100
    with ending_in(RequestFailedError), open_run(service, tmp_path / "b", save_every=1) as run:
        train(run)
    assert run.steps_done < STEPS


# The folder


def test_a_folder_can_be_used_by_one_process_only(service: ServiceClient, tmp_path: Path) -> None:
    with open_run(service, tmp_path):
        with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()} on ") as caught:
            open_run(service, tmp_path)
        assert "run.close()" in str(caught.value)
    open_run(service, tmp_path).close()


def test_the_child_of_a_fork_does_not_hold_the_folder(
    service: ServiceClient, tmp_path: Path
) -> None:
    run = open_run(service, tmp_path)
    read, write = os.pipe()
    begun, begin = os.pipe()
    child = os.fork()
    if child == 0:  # the child lives until the pipe is closed
        os.close(write)
        os.write(begin, b".")
        os.read(read, 1)
        os._exit(0)
    try:
        assert os.read(begun, 1)
        run.close()
        open_run(service, tmp_path).close()
    finally:
        for end in (write, read, begun, begin):
            os.close(end)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, "other settings: rank was 4, now 8"),
        ({"seed": 3}, "other settings: seed was 2, now 3"),
        ({"train_mlp": False}, "other settings: train_mlp was True, now False"),
        ({"config": {"lr": 2}}, "other settings: lr was 1, now 2"),
        ({"config": None}, "other settings: lr was 1, now not given"),
    ],
)
def test_another_run_in_the_folder_is_refused(
    service: ServiceClient, tmp_path: Path, change: Dict[str, Any], message: str
) -> None:
    given = {"config": {"lr": 1}, "seed": 2}
    open_run(service, tmp_path, **given).close()
    with pytest.raises(RunFolderError, match=message):
        open_run(service, tmp_path, **{**given, **change})
    with pytest.raises(RunFolderError, match="base_model was 'deterministic', now 'other'"):
        service.open_run(tmp_path, "other", rank=4, **given)  # type: ignore[arg-type]
    open_run(service, tmp_path, **given).close()
    if "config" in change:
        open_run(service, tmp_path, **{**given, **change}, accept_changes=True).close()
        assert read_run(tmp_path).config == (change["config"] or {})


def test_a_torn_last_line_is_cut_off(
    service: ServiceClient, tmp_path: Path, expected: List[float]
) -> None:
    with ending_in(Crash), open_run(service, tmp_path) as run:
        train(run, crash_in=8)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for kept in range(len(lines)):
        for torn in {1, len(lines[kept]) // 2, len(lines[kept]) - 1}:
            journal.write_bytes(b"".join(lines[:kept]) + lines[kept][:torn])
            assert read_run(tmp_path).steps is not None
            Journal(tmp_path).close()
            assert journal.read_bytes() == b"".join(lines[:kept])
    journal.write_bytes(b"".join(lines) + b"\0" * 100)  # as after a power failure
    with open_run(service, tmp_path) as run:
        train(run)
    assert [*losses(tmp_path), final_loss(service, tmp_path)] == expected


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"at": 1}', '{"kind": "start"}'])
def test_a_damaged_line_is_reported(service: ServiceClient, tmp_path: Path, line: str) -> None:
    open_run(service, tmp_path).close()
    journal = tmp_path / "journal.jsonl"
    first, rest = journal.read_text().split("\n", 1)
    journal.write_text(f"{first}\n{line}\n{rest}")
    for read in (lambda: open_run(service, tmp_path), lambda: read_run(tmp_path)):
        with pytest.raises(RunFolderError, match=r"line 2 of .*journal\.jsonl is"):
            read()


def test_lines_of_a_later_version_are_skipped(service: ServiceClient, tmp_path: Path) -> None:
    open_run(service, tmp_path).close()
    with (tmp_path / "journal.jsonl").open("a") as journal:
        journal.write('{"kind": "weather", "at": 1}\n')
        server = {"base_url": "http://a.test", "region": "north"}
        start = {"kind": "start", "model_id": "m", "steps": 0, "server": server, "mood": "good"}
        journal.write(json.dumps(start) + "\n")
    assert read_run(tmp_path).server == ServerRecord(base_url="http://a.test")
    with (tmp_path / "journal.jsonl").open("a") as journal:
        journal.write('{"kind": "weather", "at": 2}\n')
    open_run(service, tmp_path).close()


def test_a_full_disk_ends_the_run_and_loses_nothing(
    service: ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: List[float]
) -> None:
    write = os.write
    room = 2000

    def write_if_there_is_room(file: int, data: Any) -> int:
        nonlocal room
        if not data or bytes(data[:1]) != b"{":
            return write(file, data)
        if room <= 0:
            raise OSError(28, "No space left on device")
        written = write(file, data[:room])
        room -= written
        return written

    monkeypatch.setattr(os, "write", write_if_there_is_room)
    with pytest.raises(RunFolderError, match=r"cannot write the journal .*No space left") as caught:
        with open_run(service, tmp_path) as run:
            train(run)
    assert "continues from the last checkpoint" in str(caught.value)
    assert (tmp_path / "journal.jsonl").read_bytes().endswith(b"}\n")
    room = 10**9
    with open_run(service, tmp_path) as run:
        assert run.resumed_from is not None
        train(run)
    assert [*losses(tmp_path), final_loss(service, tmp_path)] == expected


def test_a_disk_without_room_ends_the_run_and_loses_nothing(
    service: ServiceClient, tmp_path: Path, expected: List[float]
) -> None:
    disk = contextlib.ExitStack()
    with ending_in(RunFolderError, r"cannot write the journal .*too large"):
        with open_run(service, tmp_path) as run:
            for step in run.steps(BATCHES):
                result = run.trainer.train_step(step.batch, "cross_entropy", ADAM)
                step.log(result.forward_backward.metrics)
                if step.index == 7:
                    disk.enter_context(no_room())
    disk.close()
    journal = (tmp_path / "journal.jsonl").read_bytes()
    with no_room(), pytest.raises(RunFolderError, match="cannot use the run folder") as caught:
        open_run(service, tmp_path)
    assert "run the program again" in str(caught.value)
    assert (tmp_path / "journal.jsonl").read_bytes() == journal
    assert len(read_run(tmp_path).steps) == 7
    with open_run(service, tmp_path) as run:
        assert run.resumed_from is not None
        train(run)
    assert [*losses(tmp_path), final_loss(service, tmp_path)] == expected


HOLDING = """
import sys
from tinkex import ServiceClient
with ServiceClient(base_url=sys.argv[1]) as service:
    with service.open_run(sys.argv[2], "deterministic", rank=4):
        print("open", flush=True)
        sys.stdin.readline()
"""


def test_two_processes_do_not_share_a_folder(
    local: LocalServer, service: ServiceClient, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", HOLDING, local.url, str(tmp_path)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(local.url),
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(RunFolderError, match=f"in use by process {other.pid} on "):
            open_run(service, tmp_path)
        assert len(read_run(tmp_path).model_ids) == 1
        other.kill()  # the system then releases the lock
    with open_run(service, tmp_path) as run:
        train(run)
    assert len(losses(tmp_path)) == STEPS


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("name", ["run.lock", "journal.jsonl"])
def test_a_run_that_has_become_read_only(service: ServiceClient, tmp_path: Path, name: str) -> None:
    with open_run(service, tmp_path) as run:
        train(run)
    (tmp_path / name).chmod(0o400)
    with pytest.raises(RunFolderError, match=r"Permission denied[\s\S]*run the program again"):
        open_run(service, tmp_path)
    (tmp_path / name).chmod(0o600)
    assert len(losses(tmp_path)) == STEPS
    open_run(service, tmp_path).close()


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(service: ServiceClient, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match=r"cannot use the run folder .*Permission denied"):
        open_run(service, tmp_path / "a")


def test_a_file_in_the_place_of_the_folder(service: ServiceClient, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot use the run folder .*: it is not") as error:
        open_run(service, tmp_path / "a")
    assert error.value.hint == "Choose another folder."
    with pytest.raises(RunFolderError, match="cannot read the journal"):
        read_run(tmp_path / "b")


def test_a_run_that_could_not_be_opened_leaves_the_folder_free(
    service: ServiceClient, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="nonesuch"):
        service.open_run(tmp_path, "nonesuch", rank=4)
    lifecycle_size = len(lifecycle._tracked)
    open_run(service, tmp_path).close()
    assert len(lifecycle._tracked) <= lifecycle_size + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_every": 0}, "save_every"),
        ({"save_minutes": 0}, "save_minutes"),
        ({"keep": 0}, "keep"),
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"on_session_loss": "shrug"}, "on_session_loss"),
        ({"max_session_losses": 0}, "max_session_losses"),
        ({"config": {"a": {1}}}, "config cannot be written as JSON"),
        ({"state": {"a": {1}}}, "state cannot be written as JSON"),
    ],
)
def test_bad_options(
    service: ServiceClient, tmp_path: Path, options: Dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        open_run(service, tmp_path, **options)


def test_saving_at_time_intervals(
    service: ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("tinkex.runs.saver.time.monotonic", lambda: now)
    with ending_in(Crash):
        with open_run(service, tmp_path, save_every=None, save_minutes=2) as run:
            for step in run.steps(BATCHES):
                run.trainer.train_step(step.batch, "cross_entropy", ADAM)
                now += 50
                if step.index == 8:
                    raise Crash("the lights went out")
    # The time is checked after each step: it is due after 150 s, and 150 s later.
    assert [saved.steps for saved in read_run(tmp_path).checkpoints] == [3, 6]


# Lost sessions


def end_session(service: ServiceClient) -> None:
    """Have the server end the session behind the client's back."""
    url = f"{service.config.base_url}/api/v1/sessions/{service.session_id}/finish"
    assert requests.post(url, json={"reason": {"type": "success"}}, timeout=10).ok


@pytest.mark.parametrize("depth", [0, 3])
def test_a_run_survives_a_lost_session(
    service: ServiceClient, tmp_path: Path, expected: List[float], depth: int
) -> None:
    lose_in = [1, 7, 11]
    sessions = set()
    with open_run(service, tmp_path, on_session_loss="resume") as run:
        steps: Iterator[RunStep[Any]] = run.steps(BATCHES)
        if depth:
            steps = run.pipeline(BATCHES, "cross_entropy", ADAM, depth=depth)
        for step in steps:
            with step:
                if step.index in lose_in:
                    lose_in.remove(step.index)
                    end_session(run.service)
                sessions.add(run.service.session_id)
                if not depth:
                    result = run.trainer.train_step(step.batch, "cross_entropy", ADAM)
                    step.log(result.forward_backward.metrics)
    assert len(sessions) >= 3  # the last loss may be noticed only when the run is closed
    assert [*losses(tmp_path), final_loss(service_like(service), tmp_path)] == expected


_fresh: List[ServiceClient] = []


def service_like(service: ServiceClient) -> ServiceClient:
    """Return a service like *service*, whose session is lost."""
    _fresh.append(ServiceClient(base_url=service.config.base_url))
    return _fresh[-1]


@pytest.fixture(autouse=True)
def fresh_sessions_are_closed() -> Iterator[None]:
    yield
    while _fresh:
        _fresh.pop().close()


def test_a_lost_session_is_raised_unless_the_run_is_told_to_survive_it(
    service: ServiceClient, tmp_path: Path, expected: List[float]
) -> None:
    with ending_in(SessionLostError), open_run(service, tmp_path) as run:
        for step in run.steps(BATCHES):
            with step:
                if step.index == 7:
                    end_session(run.service)
                done = run.trainer.train_step(step.batch, "cross_entropy", ADAM)
                step.log(done.forward_backward.metrics)
    fresh = service_like(service)
    with open_run(fresh, tmp_path) as run:
        train(run)
    assert [*losses(tmp_path), final_loss(fresh, tmp_path)] == expected


def test_repeatedly_lost_sessions(
    service: ServiceClient, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr("tinkex.runs.connection.time.sleep", lambda seconds: None)
    options = {"on_session_loss": "resume", "max_session_losses": 3, "save_every": None}
    with ending_in(SessionLostError), open_run(service, tmp_path, **options) as run:
        for step in run.steps(BATCHES):
            with step:
                end_session(run.service)
                run.trainer.train_step(step.batch, "cross_entropy", ADAM)
    assert caplog.text.count("continuing in a new session from the start, after: ") == 3
    assert "Create a new ServiceClient" not in caplog.text


def test_the_body_must_be_inside_the_step_to_survive_a_lost_session(
    service: ServiceClient, tmp_path: Path
) -> None:
    with open_run(service, tmp_path, on_session_loss="resume") as run:
        with pytest.raises(InvalidInputError, match="within `with step:`"):
            for _ in run.steps(BATCHES):
                pass
        with pytest.raises(InvalidInputError, match="batches is an iterator"):
            run.steps(iter(BATCHES))


def test_a_budget_carries_over_to_new_sessions(local: LocalServer, tmp_path: Path) -> None:
    from tinkex import Budget, BudgetExceededError

    with ServiceClient(base_url=local.url, budget=Budget(tokens=8)) as service:
        with ending_in(BudgetExceededError):
            with open_run(service, tmp_path, on_session_loss="resume", save_every=1) as run:
                for step in run.steps(BATCHES):
                    with step:
                        if step.index == 1:
                            end_session(run.service)
                        run.trainer.train_step(step.batch, "cross_entropy", ADAM)
        assert service.usage().tokens.trained <= 8
        wait_until(lambda: service.inflight() == [], "nothing is under way")


def test_a_checkpoint_is_recorded_after_the_lines_of_its_steps(
    service: ServiceClient, tmp_path: Path
) -> None:
    """In a pipeline a checkpoint may be saved before the loop has seen its last step."""
    with open_run(service, tmp_path, save_every=1) as run:
        for step in run.pipeline(BATCHES, "cross_entropy", ADAM, depth=4):
            wait_until(lambda: service.inflight() == [], "all that was submitted is done")
            assert step.result is not None
    written = 0
    for line in (tmp_path / "journal.jsonl").read_text().splitlines():
        entry = json.loads(line)
        written += entry["kind"] == "step"
        assert entry["kind"] != "checkpoint" or entry["steps"] <= written
    assert written == STEPS


def test_a_run_whose_model_was_refused_may_start_with_other_settings(
    service: ServiceClient, tmp_path: Path
) -> None:
    with pytest.raises(BadRequestError, match="at most"):
        open_run(service, tmp_path, rank=100_000)
    assert not read_run(tmp_path).has_begun
    with open_run(service, tmp_path, rank=4) as run:
        assert run.record.spec["rank"] == 4
    with pytest.raises(RunFolderError, match="rank was 4, now 8"):
        open_run(service, tmp_path, rank=8)
