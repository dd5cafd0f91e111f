"""The audit log: changes to checkpoints and projects, by day."""

from __future__ import annotations

from datetime import date, datetime, timezone
from pathlib import Path
from typing import List

import pytest
from local.harness import Api, serving

from tinkex import AdminClient, ServiceClient
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.state.store import Store

#: 2026-01-02, 23:59:59 in UTC.
BEFORE_MIDNIGHT = datetime(2026, 1, 2, 23, 59, 59, tzinfo=timezone.utc).timestamp()


class Wall:
    def __init__(self) -> None:
        self.now = BEFORE_MIDNIGHT

    def __call__(self) -> float:
        return self.now


def events(api: Api, query: str = "") -> List[str]:
    return [entry["event"] for entry in api.get(f"audit{query}")["entries"]]


def test_changes_to_a_checkpoint_are_in_the_log_of_today(api: Api) -> None:
    model = api.model()
    path = api.save(model, 1, "a")
    size = api.get("checkpoints")["checkpoints"][0]["size_bytes"]
    url = f"/api/v1/training_runs/{model}/checkpoints/weights/a"
    api.client.post(f"{url}/publish")
    api.client.delete(f"{url}/publish")
    api.client.put(f"{url}/ttl", json={"ttl_seconds": 7200})
    api.result(api.post("save_weights", model_id=model, seq_id=2, path="a", overwrite=True))
    api.client.delete(url)
    entries = api.get("audit?event_type=checkpoints")["entries"]
    assert [entry["event"] for entry in entries] == [
        "checkpoint.created",
        "checkpoint.published",
        "checkpoint.unpublished",
        "checkpoint.ttl_changed",
        "checkpoint.overwritten",
        "checkpoint.deleted",
    ]
    assert {(entry["model_id"], entry["tinker_path"]) for entry in entries} == {(model, path)}
    assert entries[0]["event_details"] == {
        "checkpoint_type": "training",
        "size_bytes": size,
        "expires_at": None,
    }
    assert entries[3]["event_details"]["expires_at"] > entries[3]["timestamp"]
    assert events(api, "?event_type=projects") == []


def test_moving_a_session_is_a_project_event(api: Api) -> None:
    session = api.session()
    api.client.put(f"/api/v1/sessions/{session}/project", json={"project_id": "p"})
    (entry,) = api.get("audit?event_type=projects")["entries"]
    assert entry["event"] == "session.moved"
    assert entry["event_details"] == {"session_id": session, "project_id": "p"}
    assert events(api, "?event_type=checkpoints") == events(api, "?event_type=teams") == []


def test_a_day_ends_at_midnight_in_utc_and_outlives_the_server(tmp_path: Path) -> None:
    wall = Wall()
    store = Store(tmp_path, wall=wall)
    with store.checkpoints.saving(
        "r", "weights", "a", overwrite=False, ttl_s=1.0, user_metadata=None
    ):
        pass
    wall.now += 1
    store.checkpoints.delete_expired()
    store.close()
    with serving(tmp_path) as api:
        assert events(api, "?day=2026-01-01") == []
        assert events(api, "?day=2026-01-02") == ["checkpoint.created"]
        assert events(api, "?day=2026-01-03") == ["checkpoint.expired"]
        assert events(api) == []  # today


@pytest.mark.parametrize(
    ("query", "says"),
    [("?event_type=secrets", "'secrets'; it must be one of all"), ("?day=today", "YYYY-MM-DD")],
)
def test_invalid_queries_of_the_log_are_refused(api: Api, query: str, says: str) -> None:
    assert says in api.get(f"audit{query}", 400)["detail"]


def test_the_admin_client_reads_the_log() -> None:
    with (
        LocalServer(DeterministicEngine()) as server,
        ServiceClient(base_url=server.url) as service,
        AdminClient(base_url=server.url) as admin,
    ):
        trainer = service.create_lora_training_client("deterministic")
        path = trainer.save_state("a").result(20).path
        (entry,) = admin.get_audit_log().result(20).entries
        assert admin.get_audit_log(day=date(2020, 1, 1)).result(20).entries == []
    assert (entry.event, entry.tinker_path) == ("checkpoint.created", path)
    assert entry.model_id == trainer.model_id
