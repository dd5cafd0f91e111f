"""Sessions live as long as their heartbeats; their runs and samplers end with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from local.harness import Api, HeldEngine, ManualClock, serving

from tinkex.local.state.session_table import SessionTable


def test_a_session_without_heartbeats_expires() -> None:
    table = SessionTable(ttl_s=60)
    table.add("a", now=0)
    assert table.alive("a", now=59.9)
    assert table.next_due() == 60
    assert table.drop_expired(now=59.9) == []
    assert table.drop_expired(now=60) == ["a"]
    assert not table.alive("a", now=0)
    assert table.next_due() is None


def test_a_heartbeat_postpones_the_end() -> None:
    table = SessionTable(ttl_s=60)
    table.add("a", now=0)
    table.add("b", now=10)
    assert table.beat("a", now=50)
    assert table.next_due() == 70  # now b expires next
    assert table.drop_expired(now=100) == ["b"]
    assert table.drop_expired(now=110) == ["a"]


def test_a_late_heartbeat_does_not_revive_a_session() -> None:
    table = SessionTable(ttl_s=60)
    table.add("a", now=0)
    assert not table.beat("a", now=60)
    assert not table.beat("unknown", now=0)
    assert table.drop_expired(now=60) == ["a"]


def test_heartbeats_keep_a_session_and_their_absence_ends_it(tmp_path: Path) -> None:
    clock = ManualClock()
    engine = HeldEngine()
    with serving(tmp_path, engine, clock=clock, session_ttl_s=60, missing_seq_id_s=999) as api:
        session = api.session()
        model = api.model(session)
        sampler = api.sampler(session)
        api.result(api.submit_sample(sampler, 0))
        clock.now += 50
        api.post("session_heartbeat", session_id=session)
        clock.now += 50
        api.post("session_heartbeat", session_id=session)
        gap = api.step(model, 9)  # waits for earlier numbers
        engine.log.clear()
        clock.now += 60
        problem = api.post("session_heartbeat", 404, session_id=session)
        assert "no heartbeat for 60 s" in problem["detail"]
        assert "load the last checkpoint" in problem["detail"]
        # The engine thread waits on the real clock.
        api.backend.scheduler.rotation.request_housekeeping()
        failure = api.result(gap)
        assert failure["category"] == "user"
        assert "no heartbeat for 60 s" in failure["error"]
        assert session in failure["error"]
        assert "expired" in api.step(model, 10, expect=404)["detail"]
        body = api.sample_body(sampler, 1)
        assert "expired" in api.post("asample", 404, **body)["detail"]
        other = api.model()  # after another turn of the engine the rest is unloaded
        assert sorted(engine.log) == ["unload 0", "unload sampler 0"]
        api.step(other, 1)


def test_the_engine_thread_wakes_for_a_session_that_expires(tmp_path: Path) -> None:
    with serving(tmp_path, session_ttl_s=1.0) as api:
        session = api.session()
        request_id = api.submit_model(session)
        gap = api.client.post(
            "/api/v1/optim_step",
            json={"model_id": f"{session}:train:0", "seq_id": 2, "adam_params": {}},
        )
        assert gap.status_code == 200
        assert "no heartbeat" in api.result(gap.get_json())["error"]
        assert "model_id" in api.result(request_id)


def test_a_finished_session_is_gone(api: Api, engine: HeldEngine) -> None:
    session = api.session()
    model = api.model(session)
    gap = api.step(model, 5)
    api.post(f"sessions/{session}/finish", reason={"type": "errored"}, detail="oh")
    assert "the client ended it: errored, oh" in api.result(gap)["error"]
    assert api.post("session_heartbeat", 410, session_id=session)
    assert "finished" in api.step(model, 1, expect=410)["detail"]
    api.post("create_model", 410, session_id=session, model_seq_id=1, base_model="deterministic")
    api.post(
        "create_sampling_session",
        410,
        session_id=session,
        sampling_session_seq_id=0,
        base_model="deterministic",
    )
    api.post(f"sessions/{session}/finish", reason={"type": "success"})  # repeating is no error
    problem = api.post("session_heartbeat", 410, session_id=session)
    assert "errored" in problem["detail"]  # the first reason stands


def test_an_unknown_session_is_not_found(api: Api) -> None:
    for path in ("session_heartbeat", "create_model", "create_sampling_session", "load_weights"):
        assert "nobody" in api.post(path, 404, session_id="nobody")["detail"]
    assert "nobody" in api.post("sessions/nobody/finish", 404)["detail"]
    assert "nobody" in api.get("sessions/nobody", 404)["detail"]


def test_an_unknown_reason_to_finish_is_refused(api: Api) -> None:
    session = api.session()
    api.post(f"sessions/{session}/finish", 400, reason={"type": "bored"})
    api.post("session_heartbeat", session_id=session)


def test_sessions_are_listed_newest_first_with_their_runs_and_samplers(api: Api) -> None:
    first = api.post("create_session", user_metadata={"a": "b"}, display_name="one")["session_id"]
    second = api.session()
    model, sampler = api.model(first), api.sampler(first)
    assert api.get("sessions")["sessions"] == [second, first]
    assert api.get("sessions?limit=1&offset=1")["sessions"] == [first]
    assert api.get(f"sessions/{first}") == {
        "training_run_ids": [model],
        "sampler_ids": [sampler],
        "user_metadata": {"a": "b"},
        "display_name": "one",
    }
    api.get("sessions?limit=many", 400)


def test_other_sessions_continue_when_one_ends(api: Api) -> None:
    ending, staying = api.session(), api.session()
    model = api.model(staying)
    api.model(ending)
    api.post(f"sessions/{ending}/finish")
    assert "metrics" in api.result(api.submit_pass(model, 1))


def test_failing_housekeeping_does_not_end_the_engine_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()
    with serving(tmp_path, clock=clock) as api:
        monkeypatch.setattr(api.backend.store.checkpoints, "delete_expired", lambda: 1 / 0)
        clock.now += 20
        api.model()  # its new session triggers the housekeeping ...
        api.model()  # ... which runs before a later turn
        assert "housekeeping failed" in caplog.text
