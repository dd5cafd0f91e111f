"""``model_dump`` and ``model_dump_json``, which programs for the official SDK call on results."""

from __future__ import annotations

import json
import math
from datetime import datetime, timedelta, timezone

import pytest

from tinkex import types

NOON = datetime(2026, 1, 2, 12, tzinfo=timezone.utc)
CHECKPOINT = types.Checkpoint("weights/a", "training", NOON, "tinker://r/weights/a", public=True)
RUN = types.TrainingRun("r", "m", "owner", True, NOON, last_checkpoint=CHECKPOINT)


def test_all_fields_are_dumped_including_those_of_nested_messages() -> None:
    dumped = RUN.model_dump()
    assert dumped["training_run_id"] == "r"
    assert dumped["last_request_time"] == NOON
    assert dumped["last_sampler_checkpoint"] is None
    assert dumped["last_checkpoint"] == {
        "checkpoint_id": "weights/a",
        "checkpoint_type": "training",
        "time": NOON,
        "tinker_path": "tinker://r/weights/a",
        "size_bytes": None,
        "public": True,
        "user_metadata": None,
        "expires_at": None,
    }


def test_the_json_form_has_times_as_strings_and_reads_back() -> None:
    loaded = json.loads(RUN.model_dump_json(indent=2))
    assert loaded == RUN.model_dump(mode="json")
    assert loaded["last_checkpoint"]["time"] == "2026-01-02T12:00:00Z"
    assert types.TrainingRun.from_wire(loaded) == RUN


def test_a_time_of_another_zone_keeps_its_offset() -> None:
    there = NOON.astimezone(timezone(timedelta(hours=2)))
    dumped = types.CheckpointArchiveUrlResponse("u", there).model_dump(mode="json")
    assert dumped["expires"] == "2026-01-02T14:00:00+02:00"


def test_json_is_compact_unless_it_is_indented() -> None:
    response = types.SaveWeightsResponse("tinker://r/weights/ä")
    assert response.model_dump_json() == '{"path":"tinker://r/weights/ä"}'
    assert response.model_dump_json(indent=1) == '{\n "path": "tinker://r/weights/ä"\n}'


def test_none_can_be_excluded_everywhere() -> None:
    dumped = RUN.model_dump(exclude_none=True)
    assert "last_sampler_checkpoint" not in dumped
    assert "size_bytes" not in dumped["last_checkpoint"]


def test_fields_can_be_chosen() -> None:
    assert CHECKPOINT.model_dump(include={"checkpoint_id", "public"}, exclude={"public"}) == {
        "checkpoint_id": "weights/a"
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_has_null_for_values_that_it_cannot_express(value: float) -> None:
    response = types.OptimStepResponse({"norm": value})
    assert response.model_dump_json() == '{"metrics":{"norm":null}}'
    assert response.model_dump()["metrics"]["norm"] is value


def test_an_object_of_an_unknown_kind_is_dumped_as_it_was_sent() -> None:
    event = {
        "bucket_start": "2026-01-02T12:00:00Z",
        "bucket_end": "2026-01-02T13:00:00Z",
        "event_info": {"type": "new", "amount": 3},
    }
    read = types.BillingUsageEvent.from_wire(event)
    assert read.model_dump()["event_info"] == {"type": "new", "amount": 3}
