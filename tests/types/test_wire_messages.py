"""Control messages: JSON to dataclasses and back."""

from __future__ import annotations

import json
import math
import threading
import warnings
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given, strategies as st
from support.properties import several

from tinkex.errors import ResponseDecodeError
from tinkex.types import (
    Checkpoint,
    CheckpointsListResponse,
    CreateSessionResponse,
    GetInfoResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    LoraConfig,
    OptimStepResponse,
    SupportedModel,
    TrainingRun,
    TrainingRunsResponse,
    UntypedFuture,
)
from tinkex.types._wire import Wire, excerpt, parse_datetime

CHECKPOINT = {
    "checkpoint_id": "weights/a",
    "checkpoint_type": "training",
    "time": "2026-11-22T15:04:05.5Z",
    "tinker_path": "tinker://r/weights/a",
}
RUN = {
    "training_run_id": "r",
    "base_model": "b",
    "model_owner": "o",
    "is_lora": True,
    "last_request_time": "2026-11-22T15:04:05+01:00",
    "last_checkpoint": CHECKPOINT,
}


def test_unknown_fields_are_ignored_at_every_depth():
    payload = {
        "training_runs": [{**RUN, "new": 1, "last_checkpoint": {**CHECKPOINT, "x": {}}}],
        "y": 1,
    }
    (run,) = TrainingRunsResponse.from_wire(payload).training_runs
    assert run.last_checkpoint.tinker_path == "tinker://r/weights/a"
    assert run.last_sampler_checkpoint is None


@pytest.mark.parametrize("null", [False, True])
def test_a_missing_field_and_a_null_give_the_same_error(null):
    payload = {"session_id": None} if null else {}
    with pytest.raises(
        ResponseDecodeError, match=r"CreateSessionResponse.*'session_id' is missing"
    ):
        CreateSessionResponse.from_wire(payload)


def test_a_null_inside_a_nested_message_takes_the_default():
    payload = {"model_id": "m", "model_data": {"arch": None}, "lora_rank": None}
    assert GetInfoResponse.from_wire(payload).model_data.arch is None
    run = TrainingRun.from_wire({**RUN, "corrupted": None, "last_checkpoint": None})
    assert run.corrupted is False
    assert run.last_checkpoint is None
    checkpoints = {"checkpoints": [{**CHECKPOINT, "public": None}], "cursor": None}
    assert CheckpointsListResponse.from_wire(checkpoints).checkpoints[0].public is False


def test_a_null_in_a_list_of_messages_is_left_out():
    payload = {"supported_models": [None, {"model_name": "m"}]}
    models = GetServerCapabilitiesResponse.from_wire(payload).supported_models
    assert models == [SupportedModel("m")]


def test_a_null_in_a_required_nested_field_is_refused():
    with pytest.raises(ResponseDecodeError, match="checkpoint_id"):
        CheckpointsListResponse.from_wire({"checkpoints": [{**CHECKPOINT, "checkpoint_id": None}]})


@pytest.mark.parametrize("payload", [None, [], "text", 5])
def test_a_value_that_is_not_an_object_is_refused(payload):
    with pytest.raises(ResponseDecodeError, match="expected a JSON object for UntypedFuture"):
        UntypedFuture.from_wire(payload)


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        (GetServerCapabilitiesResponse, {"supported_models": [5]}),
        (GetServerCapabilitiesResponse, {"supported_models": 5}),
        (TrainingRun, {**RUN, "last_checkpoint": "x"}),
        (TrainingRun, {**RUN, "last_request_time": "yesterday"}),
        (TrainingRun, {**RUN, "last_request_time": 5}),
        (TrainingRun, {**RUN, "last_request_time": "2026-13-01T00:00:00Z"}),
    ],
)
def test_an_impossible_value_is_refused(message, payload):
    with pytest.raises(ResponseDecodeError, match=message.__name__):
        message.from_wire(payload)


def test_none_is_not_sent():
    assert LoraConfig(rank=8).to_wire() == {
        "rank": 8,
        "train_unembed": True,
        "train_mlp": True,
        "train_attn": True,
    }
    assert UntypedFuture("r").to_wire() == {"request_id": "r"}
    run = TrainingRun.from_wire(RUN).to_wire()
    assert "last_sampler_checkpoint" not in run
    assert "expires_at" not in run["last_checkpoint"]


def test_messages_are_read_and_written():
    run = TrainingRun.from_wire({**RUN, "user_metadata": {"a": "b"}})
    assert TrainingRun.from_wire(json.loads(json.dumps(run.to_wire()))) == run


def test_bulk_fields_are_passed_through_unchanged():
    ids, metrics, metadata = ["a"] * 3, {"loss:sum": 1.0}, {"k": {"deep": [1]}}
    assert (
        UntypedFuture.from_wire({"request_id": "r", "sample_sequence_ids": ids}).sample_sequence_ids
        is ids
    )
    assert OptimStepResponse.from_wire({"metrics": metrics}).metrics == metrics
    session = {"training_run_ids": [], "sampler_ids": [], "user_metadata": metadata}
    assert GetSessionResponse.from_wire(session).user_metadata is metadata


def test_bulk_fields_are_not_copied_when_written():
    ids = ["a"] * 3
    assert UntypedFuture("r", sample_sequence_ids=ids).to_wire()["sample_sequence_ids"] is ids


@pytest.mark.parametrize("metrics", [{}, {"metrics": None}])
def test_an_optimizer_step_may_have_no_metrics(metrics):
    assert OptimStepResponse.from_wire(metrics).metrics == {}


def test_a_null_metric_is_nan_and_an_integer_becomes_a_float():
    found = OptimStepResponse.from_wire({"metrics": {"a": None, "b": 1}}).metrics
    assert math.isnan(found["a"])
    assert type(found["b"]) is float


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        (OptimStepResponse, {"metrics": []}),
        (OptimStepResponse, {"metrics": {"a": "1"}}),
        (OptimStepResponse, {"metrics": {"a": True}}),
        (UntypedFuture, {"request_id": "r", "sample_sequence_ids": {}}),
        (UntypedFuture, {"request_id": "r", "sample_sequence_ids": [None]}),
        (GetSessionResponse, {"training_run_ids": [], "sampler_ids": [], "user_metadata": [1]}),
    ],
)
def test_a_bulk_field_of_the_wrong_type_is_refused(message, payload):
    with pytest.raises(ResponseDecodeError, match=message.__name__):
        message.from_wire(payload)


@pytest.mark.parametrize(
    ("text", "microsecond", "offset_h"),
    [
        ("2026-11-22T15:04:05Z", 0, 0),
        ("2026-11-22T15:04:05", 0, 0),
        ("2026-11-22 15:04:05+00:00", 0, 0),
        ("2026-11-22t15:04:05.5z", 500_000, 0),
        ("2026-11-22T15:04:05.123Z", 123_000, 0),
        ("2026-11-22T15:04:05.123456+02:00", 123_456, 2),
        ("2026-11-22T15:04:05.123456789Z", 123_456, 0),
        ("2026-11-22T15:04:05-0500", 0, -5),
    ],
)
def test_times_of_every_server_are_read(text, microsecond, offset_h):
    zone = timezone(timedelta(hours=offset_h))
    parsed = parse_datetime(text)
    assert parsed == datetime(2026, 11, 22, 15, 4, 5, microsecond, tzinfo=zone)
    assert parsed.utcoffset() == timedelta(hours=offset_h)


@pytest.mark.parametrize(
    "value", ["", "now", "2026-11-22", "2026-11-22T25:00:00Z", 20261122, 1.5, []]
)
def test_other_times_are_refused(value):
    with pytest.raises(ValueError, match=r"time"):
        parse_datetime(value)


def test_times_are_written_with_their_zone():
    assert Checkpoint.from_wire(CHECKPOINT).to_wire()["time"] == "2026-11-22T15:04:05.500000+00:00"


def test_reading_does_not_change_the_warning_filters_of_other_threads():
    # warnings.catch_warnings replaces the filters of the whole process, and overlapping threads
    # would restore each other's.
    before = list(warnings.filters)
    barrier = threading.Barrier(4)

    def read() -> None:
        barrier.wait()
        for _ in range(200):
            GetInfoResponse.from_wire({"model_id": "m", "model_data": {}})

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_an_excerpt_is_truncated():
    assert excerpt("a" * 500, limit=10) == "'aaaaaaaaa... (502 characters)"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
MESSAGES = {
    TrainingRun: RUN,
    Checkpoint: CHECKPOINT,
    CheckpointsListResponse: {"checkpoints": [CHECKPOINT], "cursor": {"offset": 0}},
    SupportedModel: {"model_name": "m"},
    GetServerCapabilitiesResponse: {"supported_models": [{"model_name": "m"}]},
    GetInfoResponse: {"model_id": "m", "model_data": {"arch": "x"}},
    GetSessionResponse: {"training_run_ids": ["a"], "sampler_ids": []},
}


@several(300)
@given(data=st.data(), value=anything)
def test_anything_in_any_field_is_read_or_refused(data, value):
    message = data.draw(st.sampled_from(list(MESSAGES)))
    payload = dict(MESSAGES[message])
    payload[data.draw(st.sampled_from(list(payload)))] = value
    try:
        received = message.from_wire(payload)
    except ResponseDecodeError:
        return
    assert isinstance(received, Wire)
