"""A pipeline step of several passes: all of their gradients go into one update, or none."""

from __future__ import annotations

from typing import Any, Iterator, List

import numpy as np
import pytest

from tinkex import ServiceClient, TrainingClient, types
from tinkex.errors import (
    BadRequestError,
    IncompleteGradientError,
    InvalidInputError,
)
from tinkex.testing import FakeServer, Journal

ADAM = types.AdamParams(learning_rate=0.01)


def batch(first: int) -> List[types.Datum]:
    """A batch of one datum, which the server refuses if its first token is 40000."""
    inputs = {"target_tokens": np.array([1, 2]), "weights": [1.0, 1.0]}
    return [types.Datum(types.ModelInput.from_ints([first, 1]), inputs)]


BAD = batch(40_000)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def run(fake: FakeServer) -> Iterator[TrainingClient]:
    with ServiceClient(base_url=fake.url) as client:
        yield client.create_lora_training_client("deterministic", rank=4)


def trained(journal: Journal, run: TrainingClient) -> List[str]:
    """Return the run's requests that the server executed, once all queued requests are settled."""
    run.save_state("after").result()
    return [what for what in journal.executed(run) if what not in ("create", "save")]


@pytest.mark.parametrize("passes", [[BAD, batch(3)], [BAD, batch(3), batch(5)]])
def test_after_a_refused_first_pass_no_optimizer_step_is_sent(
    fake: FakeServer, run: TrainingClient, passes: Any
) -> None:
    with pytest.raises(BadRequestError, match="step 0"):
        next(run.pipeline([passes], "cross_entropy", ADAM, depth=1))
    assert trained(fake.journal, run) == []


def test_the_next_step_does_not_take_the_gradient_of_half_a_step(
    fake: FakeServer, run: TrainingClient
) -> None:
    batches = [[batch(3), BAD], [batch(7), batch(8)]]
    with pytest.raises(IncompleteGradientError, match=r"1 of 2 parts.*datum 1") as caught:
        next(run.pipeline(batches, "cross_entropy", ADAM, depth=2))
    assert "step 0" in str(caught.value)
    assert trained(fake.journal, run) == ["forward_backward"]


def test_after_half_a_step_only_the_rest_of_it_is_accepted(
    fake: FakeServer, run: TrainingClient
) -> None:
    with pytest.raises(IncompleteGradientError):
        next(run.pipeline([[batch(3), BAD]], "cross_entropy", ADAM, depth=1))
    with pytest.raises(IncompleteGradientError, match="1 of 2 parts"):
        run.train_step(batch(7), "cross_entropy", ADAM)
    step = next(run.pipeline([[batch(3), batch(5)]], "cross_entropy", ADAM, depth=1))
    assert len(step.forward_backward.loss_fn_outputs) == 2
    assert trained(fake.journal, run) == ["forward_backward", "forward_backward", "optim_step"]


@pytest.mark.parametrize(
    ("passes", "params", "error"),
    [
        ([batch(3), [*batch(4), "not a datum"]], ADAM, r"data\[2\] is a str"),
        ([batch(3), []], ADAM, "pass 1 of the batch is empty"),
        ([batch(3), batch(4)], lambda index: "nonsense", "optim_params is 'nonsense'"),
    ],
    ids=["datum", "empty", "schedule"],
)
def test_a_step_is_checked_before_its_first_pass_is_sent(
    fake: FakeServer, run: TrainingClient, passes: Any, params: Any, error: str
) -> None:
    with pytest.raises(InvalidInputError, match=error):
        next(run.pipeline([passes], "cross_entropy", params))
    assert not run._run.has_gradient
    assert trained(fake.journal, run) == []


def test_each_pass_is_a_request_of_its_own(fake: FakeServer, run: TrainingClient) -> None:
    passes = [batch(3), batch(4) + batch(5)]
    (step,) = run.pipeline([passes], "cross_entropy", ADAM)
    assert [len(o["logprobs"]) for o in step.forward_backward.loss_fn_outputs] == [2, 2, 2]
    assert trained(fake.journal, run) == ["forward_backward", "forward_backward", "optim_step"]


def test_a_custom_loss_is_computed_for_each_pass(fake: FakeServer, run: TrainingClient) -> None:
    pytest.importorskip("torch")
    calls: List[int] = []

    def loss(data: Any, logprobs: Any) -> Any:
        calls.append(len(data))
        total = sum(row.sum() for row in logprobs)
        return -total, {"count:sum": len(data), "largest:max": len(data), "each:mean": len(data)}

    (step,) = run.pipeline([[batch(3), batch(4) + batch(5)]], loss, ADAM)
    assert calls == [1, 2]
    outputs = step.forward_backward.loss_fn_outputs
    expected = -sum(float(output["logprobs"].to_numpy().sum()) for output in outputs)
    assert step.metrics["loss:sum"] == pytest.approx(expected, rel=1e-6)
    assert step.metrics["surrogate_loss:sum"] == pytest.approx(expected, rel=1e-6)
    assert step.metrics["count:sum"] == 3
    assert step.metrics["largest:max"] == 2
    assert step.metrics["each:mean"] == pytest.approx(5 / 3)
    work = ["forward"] * 2 + ["forward_backward"] * 2 + ["optim_step"]
    assert trained(fake.journal, run) == work


def test_a_custom_loss_that_fails_for_a_later_pass_adds_no_gradient(
    fake: FakeServer, run: TrainingClient
) -> None:
    pytest.importorskip("torch")

    def loss(data: Any, logprobs: Any) -> Any:
        if len(data) == 2:
            raise ValueError("not for two")
        return -logprobs[0].sum(), {}

    with pytest.raises(ValueError, match="not for two"):
        next(run.pipeline([[batch(3), batch(4) + batch(5)]], loss, ADAM))
    assert trained(fake.journal, run) == ["forward"] * 2
