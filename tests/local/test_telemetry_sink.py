"""What the telemetry sink accepts, what it refuses, and how much it keeps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Dict

import pytest
from local.harness import Api, serving

COMMON = {
    "event_id": "6f1c0d4e-0000-4000-8000-000000000000",
    "event_session_index": 0,
    "severity": "INFO",
    "timestamp": "2026-11-22T19:00:00.123456Z",
}

EVENTS = [
    {"event": "SESSION_START", **COMMON},
    {"event": "SESSION_END", **COMMON, "duration": "0:00:01.5"},
    {
        "event": "UNHANDLED_EXCEPTION",
        **COMMON,
        "error_type": "ValueError",
        "error_message": "x",
        "traceback": None,
    },
    {"event": "GENERIC_EVENT", **COMMON, "event_name": "user_error", "event_data": {"a": 1}},
]


def batch(*events: Any, **changes: Any) -> Dict[str, Any]:
    return {
        "events": list(events),
        "platform": "Linux",
        "sdk_version": "0.38.0",
        "session_id": "sessionless-1",
        "process_uuid": "p",
        **changes,
    }


def test_events_are_accepted_and_kept(api: Api) -> None:
    assert api.post("telemetry", **batch(*EVENTS)) == {"status": "accepted"}
    kept = api.backend.telemetry.events()
    assert [one["event"] for one in kept] == [one["event"] for one in EVENTS]
    assert kept[3]["event_data"] == {"a": 1}
    assert kept[0]["session_id"] == "sessionless-1"


def test_only_the_last_events_are_kept(tmp_path: Path) -> None:
    with serving(tmp_path, telemetry_kept=3) as api:
        for number in range(5):
            event = {**EVENTS[0], "event_session_index": number}
            api.post("telemetry", **batch(event))
        kept = api.backend.telemetry.events()
        assert [one["event_session_index"] for one in kept] == [2, 3, 4]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"platform": None}, "platform"),
        ({"session_id": 1}, "session_id"),
        ({"events": None}, "events"),
        ({"events": {}}, "events"),
        ({"events": [{}] * 1001}, "events"),
        ({"events": ["x"]}, "event 0"),
        ({"events": [{**EVENTS[0], "event": "HELLO"}]}, "HELLO"),
        ({"events": [{**EVENTS[0], "event": []}]}, "event 0"),
        ({"events": [EVENTS[0], {**EVENTS[0], "event_id": None}]}, "event 1: field 'event_id'"),
        ({"events": [{**EVENTS[0], "event_session_index": True}]}, "event_session_index"),
        ({"events": [{**EVENTS[0], "severity": "LOUD"}]}, "LOUD"),
        ({"events": [{**EVENTS[0], "timestamp": "noon"}]}, "noon"),
        ({"events": [{**EVENTS[3], "event_data": []}]}, "event_data"),
        ({"events": [{"event": "SESSION_END", **COMMON}]}, "duration"),
    ],
)
def test_a_malformed_batch_is_refused_as_a_whole(
    api: Api, change: Dict[str, Any], says: str
) -> None:
    assert says in api.post("telemetry", 400, **batch(**change))["detail"]
    assert api.backend.telemetry.events() == []


def test_telemetry_is_not_logged(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        event = {**EVENTS[3], "event_data": {"request_headers": {"X-API-Key": "tml-secret"}}}
        api.post("telemetry", **batch(event))
    assert "tml-secret" not in caplog.text
