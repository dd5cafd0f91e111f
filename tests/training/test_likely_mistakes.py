"""Batches that can be trained on, but are probably mistakes, get a warning."""

from __future__ import annotations

from typing import Any, List

import numpy as np
import pytest
from support.scripted_server import PATIENCE_S

from tinkex import ServiceClient, TrainingClient, types
from tinkex._training.checks import MistakeWatch
from tinkex.types import Datum, ImageChunk, ModelInput, TensorData

TOKENS = [5, 6, 7, 8]


def datum(targets: Any = (6, 7, 8, 9), tokens: Any = tuple(TOKENS), **inputs: Any) -> Datum:
    model_input = tokens if isinstance(tokens, ModelInput) else ModelInput.from_ints(list(tokens))
    return Datum(model_input, {"target_tokens": targets, **inputs})


@pytest.fixture
def run(scripted: ServiceClient) -> TrainingClient:
    return scripted.create_lora_training_client("base")


def warnings_of(data: List[Datum], caplog: pytest.LogCaptureFixture) -> List[str]:
    caplog.clear()
    watch = MistakeWatch("run m")
    watch.check_targets(data)
    watch.check_weights(data)
    return list(caplog.messages)


@pytest.mark.parametrize(
    "unshifted",
    [
        datum(TOKENS),
        datum(TensorData(TOKENS, "int64")),
        datum(list(range(5, 105)), range(5, 105)),
        datum(TOKENS, ModelInput([*ModelInput.from_ints([5, 6]).chunks,
                                  *ModelInput.from_ints([7, 8]).chunks])),
    ],
    ids=["short", "tensor", "long", "chunks"],
)  # fmt: skip
def test_unshifted_targets_get_a_warning_that_shows_the_right_ones(
    unshifted: Datum, caplog: pytest.LogCaptureFixture
) -> None:
    (message,) = warnings_of([datum(), unshifted], caplog)
    assert "run m: target_tokens of data[1] are its input tokens" in message
    assert "target_tokens = tokens[1:]" in message


def test_other_targets_get_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    image = ModelInput([*ModelInput.from_ints([5]).chunks, ImageChunk(b"x", "png")])
    good = [
        datum(),
        datum([5, 7, 8, 9]),
        datum([3, 3, 3], [3, 3, 3]),  # shifted or not, they are the same
        datum([3], [3]),
        datum([5], image),
        datum(np.array([[5, 1], [6, 1], [7, 1], [8, 1]])),
        Datum(ModelInput.from_ints(TOKENS), {"my_input": TOKENS}),
    ]
    assert warnings_of(good, caplog) == []


def test_a_batch_without_any_weight_gets_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    nothing = datum(weights=[0.0] * 4)
    (message,) = warnings_of([nothing, nothing], caplog)
    assert "all weights of a batch of 2 are 0" in message
    assert "completion" in message
    for other in (datum(weights=[0.0, 0.0, 0.0, 0.5]), datum()):  # without weights, all count
        assert warnings_of([nothing, other], caplog) == []


def test_each_warning_is_given_once_per_run(
    run: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    batch = [datum(TOKENS, weights=[0.0] * 4)]
    for _ in range(3):
        run.forward_backward(batch, "cross_entropy").result(PATIENCE_S)
    messages = [message for message in caplog.messages if message.startswith("run ")]
    assert [("input tokens" in m, "all weights" in m) for m in messages] == [
        (True, False),
        (False, True),
    ]
    assert all(run.model_id in message for message in messages)


def test_weights_of_0_get_no_warning_if_the_loss_does_not_train_on_them(
    run: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("torch")
    nothing = datum(weights=[0.0] * 4, logprobs=[-1.0] * 4, advantages=[1.0] * 4)
    run.forward([nothing], "cross_entropy").result(PATIENCE_S)
    run.forward_backward([nothing], "importance_sampling").result(PATIENCE_S)
    run.forward_backward_custom([nothing], lambda d, p: (p[0].sum(), {})).result(PATIENCE_S)
    assert "weights" not in caplog.text


def test_targets_of_a_custom_loss_are_checked_too(
    run: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("torch")
    run.forward_backward_custom([datum(TOKENS)], lambda d, p: (p[0].sum(), {})).result(PATIENCE_S)
    assert "target_tokens of data[0] are its input tokens" in caplog.text


def test_a_warning_does_not_change_what_is_trained(run: TrainingClient) -> None:
    step = run.train_step([datum(TOKENS)], "cross_entropy", types.AdamParams())
    assert len(step.forward_backward.loss_fn_outputs) == 1
