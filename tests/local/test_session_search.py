"""Searching for sessions, and the data that the server returns about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from local.harness import Api, ManualClock, serving

from tinkex.local.routes.session_search import Search, status_of
from tinkex.local.state.rows import SessionRow, timestamp

OWNER = "tml:user:local"


def row(session_id: str, created_at: float = 100.0, **changes: Any) -> SessionRow:
    facts: Dict[str, Any] = {
        "session_id": session_id, "created_at": created_at, "state": "live", "facts": {},
        "ended_at": None, "reason": None, "project_id": None, "end_reason": None,
        "end_detail": None, **changes,
    }  # fmt: skip
    return SessionRow(**facts)


def found(rows: List[SessionRow], **body: Any) -> List[str]:
    return [one.session_id for one in Search.read(body).page(rows, OWNER)[0]]


ROWS = [
    row("live", 105.0, facts={"user_metadata": {"a": "1", "b": "2"}, "display_name": "Night run"}),
    row("done", 104.0, state="finished", end_reason="success", project_id="p1"),
    row("broke", 103.0, state="finished", end_reason="errored", end_detail="boom"),
    row("gone", 102.0, state="expired", reason="no heartbeat for 60 s"),
    row("lost", 101.0, state="lost", reason="the server was restarted"),
]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, ["live", "done", "broke", "gone", "lost"]),
        ({"session_id": "gone"}, ["gone"]),
        ({"project_ids": ["p1", "p2"]}, ["done"]),
        ({"project_ids": ["default"]}, ["live", "broke", "gone", "lost"]),
        ({"project_ids": []}, []),
        ({"user_metadata": {"a": "1"}}, ["live"]),
        ({"user_metadata": {"a": "1", "b": "3"}}, []),
        ({"display_name": "Night run"}, ["live"]),
        ({"owner": {"type": "own"}, "limit": 2}, ["live", "done"]),
        ({"owner": {"type": "user", "owner_urns": [OWNER]}, "limit": 1}, ["live"]),
        ({"owner": {"type": "user", "owner_urns": ["tml:user:other"]}}, []),
        ({"statuses": [{"type": "active"}]}, ["live"]),
        ({"statuses": [{"type": "cancelled"}]}, ["gone", "lost"]),
        ({"statuses": [{"type": "failed"}]}, []),
        ({"statuses": [{"type": "client_finished"}]}, ["done", "broke"]),
        ({"statuses": [{"type": "client_finished", "reasons": ["errored"]}]}, ["broke"]),
        (
            {"statuses": [{"type": "active"}, {"type": "client_finished", "reasons": ["success"]}]},
            ["live", "done"],
        ),
    ],
)
def test_sessions_are_filtered(body: Dict[str, Any], expected: List[str]) -> None:
    assert found(ROWS, **body) == expected


def test_pages_contain_every_session_once_even_those_created_at_the_same_instant() -> None:
    rows = [row(f"s{n:02}", created_at=100.0 + n // 4) for n in range(23)]
    seen: List[str] = []
    cursor: Optional[Dict[str, str]] = None
    while True:
        body = {"limit": 5, "cursor": cursor} if cursor else {"limit": 5}
        page, cursor = Search.read(body).page(rows, OWNER)
        seen += [one.session_id for one in page]
        if cursor is None:
            break
    assert seen == sorted((one.session_id for one in rows), reverse=True)


def test_a_full_last_page_has_no_cursor() -> None:
    assert Search.read({"limit": 5}).page(ROWS, OWNER)[1] is None


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 201}, "limit"),
        ({"display_name": ""}, "display_name"),
        ({"owner": {"type": "nobody"}}, "owner"),
        ({"owner": {"type": "user"}}, "owner_urns"),
        ({"owner": {"type": "user", "owner_urns": []}}, "1 to 10"),
        ({"statuses": [{"type": "asleep"}]}, "asleep"),
        ({"statuses": ["active"]}, "unknown"),
        ({"statuses": [{"type": "client_finished", "reasons": ["tired"]}]}, "reasons"),
        ({"cursor": {}}, "last_created_at"),
        ({"cursor": {"last_created_at": "yesterday", "last_session_id": "s"}}, "yesterday"),
        ({"project_ids": "p1"}, "project_ids"),
    ],
)
def test_the_fault_of_a_search_is_named(api: Api, body: Dict[str, Any], says: str) -> None:
    assert says in api.post("sessions/search", 400, **body)["detail"]


def test_a_status_says_how_the_session_ended() -> None:
    assert [status_of(one) for one in ROWS] == [
        {"type": "active"},
        {"type": "client_finished", "reason": {"type": "success"}, "detail": None},
        {"type": "client_finished", "reason": {"type": "errored"}, "detail": "boom"},
        {"type": "cancelled", "detail": "no heartbeat for 60 s"},
        {"type": "cancelled", "detail": "the server was restarted"},
    ]


def test_an_instant_has_microseconds_and_a_zone() -> None:
    assert timestamp(1.5) == "1970-01-01T00:00:01.500000Z"


# Over the routes


def test_a_found_session_comes_with_its_data(api: Api) -> None:
    session = str(
        api.post(
            "create_session",
            tags=["t"],
            user_metadata={"k": "v"},
            project_id="p",
            display_name="named",
            sdk_version="0.38.0",
        )["session_id"]
    )
    api.session()
    model = api.model(session)
    api.save(model, 1, "a")
    answer = api.post("sessions/search", user_metadata={"k": "v"}, owner={"type": "own"})
    assert answer["next_cursor"] is None
    (summary,) = answer["sessions"]
    size = api.get("checkpoints")["checkpoints"][0]["size_bytes"]
    assert summary.pop("created_at").endswith("Z")
    assert summary == {
        "session_id": session,
        "owner": OWNER,
        "project_id": "p",
        "status": {"type": "active"},
        "checkpoints_count": 1,
        "checkpoint_storage_bytes": size,
        "display_name": "named",
        "user_metadata": {"k": "v"},
    }
    shown = api.get(f"sessions/{session}?access_scope=accessible")
    assert shown["training_run_ids"] == [model]
    assert shown["display_name"] == "named"


def test_the_first_end_of_a_session_counts(tmp_path: Path) -> None:
    with serving(tmp_path) as api:
        session = api.session()
        for reason, detail in (("errored", "ValueError: x"), ("success", None)):
            api.post(f"sessions/{session}/finish", reason={"type": reason}, detail=detail)
        api.post("sessions/nobody/finish", 404, reason={"type": "success"}, detail=None)
        api.post(f"sessions/{session}/finish", 400, reason={"type": "bored"})
    with serving(tmp_path) as api:  # it survives a restart
        (summary,) = api.post("sessions/search", session_id=session)["sessions"]
        assert summary["status"]["reason"] == {"type": "errored"}
        assert summary["status"]["detail"] == "ValueError: x"


def test_sessions_that_end_in_another_way_count_as_cancelled(tmp_path: Path) -> None:
    clock = ManualClock()
    with serving(tmp_path, clock=clock, session_ttl_s=60) as api:
        expired = api.session()
        clock.now += 60
        lost = api.session()
        api.backend.housekeeping(clock.now)
    with serving(tmp_path) as api:
        cancelled = api.post("sessions/search", statuses=[{"type": "cancelled"}])["sessions"]
        details = {one["session_id"]: one["status"]["detail"] for one in cancelled}
        assert details == {
            expired: "no heartbeat for 60 s",
            lost: "the server was closed",
        }


def test_a_session_is_assigned_to_a_project(api: Api) -> None:
    session = api.session()
    url = f"/api/v1/sessions/{session}/project"
    assert api.client.put(url, json={"project_id": "p"}).status_code == 200
    (summary,) = api.post("sessions/search", project_ids=["p"])["sessions"]
    assert summary["session_id"] == session
    for body, status in (({}, 400), ({"project_id": ""}, 400), ({"project_id": 7}, 400)):
        assert api.client.put(url, json=body).status_code == status
    gone = api.client.put("/api/v1/sessions/nobody/project", json={"project_id": "p"})
    assert gone.status_code == 404


def test_a_session_whose_response_was_lost_is_not_created_twice(api: Api) -> None:
    def create(**headers: str) -> str:
        answer = api.client.post("/api/v1/create_session", json={"tags": []}, headers=headers)
        return str(answer.get_json()["session_id"])

    assert create(**{"X-Idempotency-Key": "k"}) == create(**{"X-Idempotency-Key": "k"})
    assert create(**{"X-Idempotency-Key": "other"}) != create(**{"X-Idempotency-Key": "k"})
    assert create() != create()
    assert len(api.get("sessions")["sessions"]) == 4
