"""AdminClient: its requests, and what it makes of the answers."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from typing import Any, Dict, Iterator
from urllib.parse import parse_qs, urlsplit

import pytest
from support.scripted_server import PATIENCE_S, Answer, ScriptedServer

from tinkex import AdminClient, types
from tinkex.errors import (
    InvalidInputError,
    PermissionDeniedError,
    ResponseDecodeError,
    RouteMissingError,
)

KEY = "tml-admin-key"
AUDIT = "GET /api/v1/audit"
USAGE = "GET /api/v1/billing/usage/events"
STORAGE = "GET /api/v1/billing/usage/checkpoints/current"
ENTRY = {"timestamp": "2026-01-02T03:04:05Z", "event": "checkpoint.deleted"}
HOUR = datetime(2026, 1, 1, tzinfo=timezone.utc)
INDIA = timezone(timedelta(hours=5, minutes=30))


@pytest.fixture
def admin(server: ScriptedServer) -> Iterator[AdminClient]:
    with AdminClient(base_url=server.url, api_key=KEY) as client:
        yield client


def query(server: ScriptedServer, route: str) -> Dict[str, Any]:
    (received,) = server.requests(route)
    return {name: value for name, (value,) in parse_qs(urlsplit(received.path).query).items()}


# The audit log


def test_the_audit_log_of_a_day(server: ScriptedServer, admin: AdminClient) -> None:
    details = {"event_details": {"by": {"deep": [1]}}, "tinker_path": "tinker://r/weights/a"}
    server.on(AUDIT, Answer(body={"entries": [{**ENTRY, **details}, ENTRY]}))
    log = admin.get_audit_log("checkpoints", date(2026, 1, 2)).result(PATIENCE_S)
    assert query(server, AUDIT) == {"event_type": "checkpoints", "day": "2026-01-02"}
    first, second = log.entries
    assert first.timestamp == datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    assert first.event == "checkpoint.deleted"
    assert first.event_details == {"by": {"deep": [1]}}
    assert first.tinker_path == "tinker://r/weights/a"
    assert (second.event_details, second.model_id) == ({}, None)


def test_the_audit_log_may_be_on_another_host_which_gets_no_key(
    server: ScriptedServer, admin: AdminClient
) -> None:
    with ScriptedServer() as storage:
        storage.on("GET /log", Answer(body={"entries": [ENTRY]}))
        location = f"{storage.url}/log?signature=1"
        server.on(AUDIT, Answer(302, headers={"Location": location}))
        log = admin.get_audit_log().result(PATIENCE_S)
        (asked,) = storage.requests()
    assert [entry.event for entry in log.entries] == ["checkpoint.deleted"]
    assert asked.path == "/log?signature=1"
    assert KEY not in str(asked.headers)
    assert "x-api-key" not in asked.headers
    assert query(server, AUDIT) == {"event_type": "all"}
    assert server.requests(AUDIT)[0].headers["x-api-key"] == KEY


@pytest.mark.parametrize(
    "arguments", [("everything",), ("all", "2026-01-02"), ("all", HOUR)], ids=str
)
def test_invalid_requests_for_the_audit_log(admin: AdminClient, arguments: Any) -> None:
    with pytest.raises(InvalidInputError):
        admin.get_audit_log(*arguments)


# Usage


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (HOUR, HOUR + timedelta(days=1)),
        (HOUR.replace(tzinfo=None), "2026-01-02"),
        ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00+00:00"),
        (
            "2026-01-01T01:00:00+01:00",
            HOUR.astimezone(timezone(timedelta(hours=5, minutes=30))) + timedelta(1),
        ),
    ],
    ids=["aware", "naive and a date", "RFC 3339", "other zones"],
)
def test_usage_is_requested_in_whole_hours_of_utc(
    server: ScriptedServer, admin: AdminClient, start: Any, end: Any
) -> None:
    server.on(USAGE, Answer(body={"data": []}))
    assert admin.get_billing_usage(start, end).result(PATIENCE_S).data == []
    assert query(server, USAGE) == {
        "starting_on": "2026-01-01T00:00:00Z",
        "ending_before": "2026-01-02T00:00:00Z",
    }


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (HOUR, HOUR),
        (HOUR, HOUR - timedelta(hours=1)),
        (HOUR, HOUR + timedelta(days=14, hours=1)),
        (HOUR, HOUR + timedelta(minutes=90)),
        (HOUR + timedelta(microseconds=1), HOUR + timedelta(hours=1)),
        ("2026-01-01T00:00:00+05:30", "2026-01-02T00:00:00+05:30"),
        ("yesterday", HOUR),
        ("2026-13-01", HOUR),
        (None, HOUR),
        (date(2026, 1, 1), HOUR),
    ],
)
def test_a_wrong_period_of_usage_is_refused_before_anything_is_sent(
    server: ScriptedServer, admin: AdminClient, start: Any, end: Any
) -> None:
    with pytest.raises(InvalidInputError):
        admin.get_billing_usage(start, end)
    assert server.requests() == []


def test_usage_of_fourteen_days_is_allowed(server: ScriptedServer, admin: AdminClient) -> None:
    server.on(USAGE, Answer(body={"data": []}))
    admin.get_billing_usage(HOUR, HOUR + timedelta(days=14)).result(PATIENCE_S)


INFOS = {
    "training": ({"type": "training", "token_count": 5}, types.TrainingUsage(5)),
    "prefill": (
        {"type": "sampling_prefill", "cached": True, "token_count": 5},
        types.SamplingPrefillUsage(5, cached=True),
    ),
    "sample": ({"type": "sampling_sample", "token_count": 5}, types.SamplingSampleUsage(5)),
    "checkpoint": ({"type": "checkpoint", "count": 2}, types.CheckpointUsage(2)),
    "storage": (
        {"type": "storage", "free": False, "gigabyte_hours": 1.5},
        types.StorageUsage(1.5),
    ),
    "one of tomorrow": (
        {"type": "teleport", "meters": 5},
        types.UnknownVariant("teleport", {"type": "teleport", "meters": 5}),
    ),
    "without a type": ({"x": 1}, types.UnknownVariant(None, {"x": 1})),
}


@pytest.mark.parametrize("kind", INFOS)
def test_usage_of_every_kind(server: ScriptedServer, admin: AdminClient, kind: str) -> None:
    raw, expected = INFOS[kind]
    event = {
        "bucket_start": "2026-01-01T00:00:00Z",
        "bucket_end": "2026-01-01T01:00:00Z",
        "event_info": raw,
        "session_id": "s",
        "estimated_cost_usd": 0.25,
        "user_id": None,
    }
    answer = {
        "data": [event],
        "sessions": {"s": {"user_metadata": {"a": "b"}}, "t": {}},
        "cost_data_through": "2026-01-01T00:00:00Z",
    }
    server.on(USAGE, Answer(body=answer))
    usage = admin.get_billing_usage("2026-01-01", "2026-01-02").result(PATIENCE_S)
    (found,) = usage.data
    assert found.event_info == expected
    assert (found.bucket_end - found.bucket_start, found.estimated_cost_usd) == (
        timedelta(hours=1),
        0.25,
    )
    assert usage.sessions["s"].user_metadata == {"a": "b"}
    assert usage.sessions["t"].user_metadata is None
    assert usage.cost_data_through == HOUR
    wire = usage.to_wire()["data"][0]["event_info"]
    assert {**raw, **wire} == wire, "and it can be written again"


def test_invalid_usage_data_is_a_typed_error(server: ScriptedServer, admin: AdminClient) -> None:
    event = {"bucket_start": "2026-01-01T00:00:00Z", "bucket_end": "2026-01-01T01:00:00Z"}
    server.on(USAGE, Answer(body={"data": [{**event, "event_info": 5}]}))
    with pytest.raises(ResponseDecodeError, match="billing/usage/events"):
        admin.get_billing_usage("2026-01-01", "2026-01-02").result(PATIENCE_S)


# Storage


def test_current_storage(server: ScriptedServer, admin: AdminClient) -> None:
    row = {"checkpoint_count": 3, "size_bytes": 2**31, "size_gigabytes": 2.0, "user_name": "me"}
    server.on(STORAGE, Answer(body={"data": [row], "effective_rate_usd_per_gigabyte_month": 0.31}))
    usage = admin.get_current_checkpoint_storage_usage("p-1").result(PATIENCE_S)
    assert query(server, STORAGE) == {"project_id": "p-1"}
    assert usage.effective_rate_usd_per_gigabyte_month == 0.31
    assert usage.data == [types.CheckpointStorageUsage(3, 2**31, 2.0, user_name="me")]


def test_storage_of_all_projects(server: ScriptedServer, admin: AdminClient) -> None:
    server.on(STORAGE, Answer(body={"data": []}))
    admin.get_current_checkpoint_storage_usage().result(PATIENCE_S)
    assert query(server, STORAGE) == {}


# Both


CALLS = {
    AUDIT: lambda a: a.get_audit_log(),
    USAGE: lambda a: a.get_billing_usage("2026-01-01", "2026-01-02"),
    STORAGE: lambda a: a.get_current_checkpoint_storage_usage(),
}


@pytest.mark.parametrize("route", CALLS)
@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_without_the_routes_is_recognized(
    server: ScriptedServer, admin: AdminClient, route: str, status: int
) -> None:
    server.on(route, Answer(status, {"detail": "we do not do that here"}))
    with pytest.raises(RouteMissingError, match=route.replace("/api/v1/", "")):
        CALLS[route](admin).result(PATIENCE_S)


@pytest.mark.parametrize("route", CALLS)
def test_a_caller_without_permission_gets_a_typed_error(
    server: ScriptedServer, admin: AdminClient, route: str
) -> None:
    server.on(route, Answer(403, {"detail": "admins only"}))
    with pytest.raises(PermissionDeniedError, match="admins only"):
        CALLS[route](admin).result(PATIENCE_S)
