"""A few examples of interleavings.py, and evidence that it finds faults."""

from __future__ import annotations

from typing import Any, Callable, Dict

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from proofs.stateful import calls
from proofs.stateful.machine import Interleavings
from proofs.stateful.witness import WitnessEngine

from tinkex._results.poll_loop import PollLoop
from tinkex._training.sequence import SequenceRules
from tinkex.local.scheduling.lanes import Lane
from tinkex.types import AdamParams

OPTIM_STEP = "POST /api/v1/optim_step"


def test_no_interleaving_loses_or_repeats_work() -> None:
    few = settings(
        max_examples=4,
        stateful_step_count=20,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Interleavings, settings=few)


# A proof that finds nothing wrong must be able to find faults


def found(script: Callable[[Interleavings], None]) -> str:
    """Run *script* on a machine, and return the machine's findings."""
    machine = Interleavings()
    machine.begin(batch_polls=False, cancels=False, heartbeat_s=10.0)
    try:
        script(machine)
        machine.teardown()
    except AssertionError as error:
        return str(error)
    finally:
        if machine.is_running:
            machine.end()
    return ""


def train(machine: Interleavings) -> None:
    for actor in range(2):
        machine.submit(actor, 0, ["forward_backward", "optim_step", "save"], 0)
        machine.settle()


def lose_a_response(machine: Interleavings) -> None:
    machine.inject_failing("500 after work for good", OPTIM_STEP, 1)
    train(machine)


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert found(train) == ""
    assert found(lose_a_response) == ""


def test_a_step_executed_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = WitnessEngine.optim_step

    def twice(engine: WitnessEngine, model_id: str, params: AdamParams) -> Dict[str, float]:
        step(engine, model_id, params)
        return step(engine, model_id, params)

    monkeypatch.setattr(WitnessEngine, "optim_step", twice)
    assert "was executed 2 times, and asked for 1 times" in found(train)


def test_a_dropped_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WitnessEngine, "optim_step", lambda *_: {"labels:sum": 2.0})
    assert "was acknowledged 1 times, and executed 0 times" in found(train)


def test_a_future_that_is_never_settled_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(machine: Interleavings) -> None:
        monkeypatch.setattr(PollLoop, "_finish", lambda *_: None)
        monkeypatch.setattr(calls, "MOST_S", 1.0)
        train(machine)

    assert "never settled" in found(script)


def test_a_lost_request_that_is_not_resent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def any_body(rules: SequenceRules[Any, Any], message: Any) -> Any:
        rules._sent = message
        return message

    monkeypatch.setattr(SequenceRules, "before_send", any_body)
    assert "bodies" in found(lose_a_response)


def test_a_server_that_does_not_recognize_repetitions_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Lane, "find", lambda *_: None)
    assert "times, and asked for 1 times" in found(lose_a_response)


def test_weights_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step, taken = WitnessEngine.optim_step, []

    def disturbed(engine: WitnessEngine, model_id: str, params: AdamParams) -> Dict[str, float]:
        taken.append(model_id)
        if len(taken) == 1:  # the replay lacks this step
            engine._states[model_id].gradient.append(0)
        return step(engine, model_id, params)

    monkeypatch.setattr(WitnessEngine, "optim_step", disturbed)
    assert "differs from the checkpoint made without faults" in found(train)


def test_an_optimizer_step_on_a_part_of_a_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinkex._training.gradient import Gradient

    monkeypatch.setattr(Gradient, "ensure_complete", lambda _: None)

    def script(machine: Interleavings) -> None:
        machine.inject_failing("400", "POST /api/v1/forward_backward", 2)
        machine.submit(0, 0, ["split", "optim_step"], 0)
        machine.settle()

    assert "was taken on a part of" in found(script)


def test_an_error_without_a_reason_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no reason")

    monkeypatch.setattr(WitnessEngine, "optim_step", fails)
    assert "failed without a reason" in found(train)


def test_a_session_that_never_ends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinkex._sessions.session_record import HTTPLink

    monkeypatch.setattr(HTTPLink, "finish", lambda *_: 200)
    assert "sessions left" in found(train)
