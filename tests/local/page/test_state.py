"""The routes of the page: what they return, and to whom."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from local.harness import (
    WAIT_S,
    Api,
    HeldEngine,
    ManualClock,
    datum,
    serving,
)

from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.state.activity import MOST_RUNS, MOST_SAMPLES, Activity

FILES = ("page.js", "chart.js", "tokens.js", "prompt.js", "page.css", "icon.svg")


def state(api: Api, since: str = "", expect: int = 200, **headers: str) -> Any:
    answer = api.client.get(f"/page/state?since={since}", headers=headers)
    assert answer.status_code == expect, answer.text
    return answer.get_json()


def trained(api: Api, model_id: str, steps: int, first: int = 1) -> None:
    for step in range(steps):
        api.submit_pass(model_id, first + 2 * step)
        last = api.step(model_id, first + 2 * step + 1)
    api.result(last)


# Files


def test_the_page_and_its_files_need_no_key_and_hold_no_data(tmp_path: Path) -> None:
    with serving(tmp_path, api_key="tml-secret") as api:
        page = api.client.get("/")
        assert page.status_code == 200
        assert page.content_type == "text/html; charset=utf-8"
        for name in FILES:
            assert api.client.get(f"/page/files/{name}").status_code == 200
        assert "secret" not in page.text
        assert 'data-key="needed"' in page.text
    assert api.backend.info.model_name not in page.text  # type: ignore[attr-defined]


def test_the_page_of_a_server_without_a_key_asks_for_none(api: Api) -> None:
    assert 'data-key="none"' in api.client.get("/").text


def test_the_page_runs_its_own_scripts_only_and_loads_nothing_from_elsewhere(api: Api) -> None:
    page = api.client.get("/")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|<style", page.text)
    named = set(re.findall(r'(?:src|href)="([^"#]+)"', page.text))
    assert named <= {f"page/files/{name}" for name in FILES}
    for name in FILES:
        text = api.client.get(f"/page/files/{name}").text
        assert "innerHTML" not in text
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}  # SVG's
        assert set(re.findall(r'from "\./([\w.]+)"', text)) <= set(FILES)


def test_no_other_file_is_served(api: Api) -> None:
    for path in ("/page/files/routes.py", "/page/files/index.html", "/page/files/..%2fstate.py"):
        assert api.client.get(path).status_code == 404
    assert api.client.post("/", json={}).status_code == 405


# Protection


def test_the_state_needs_the_key(tmp_path: Path) -> None:
    with serving(tmp_path, api_key="tml-secret") as api:
        assert "is missing" in state(api, expect=401)["detail"]
        assert "not this server's" in state(api, expect=401, **{"X-API-Key": "tml-other"})["detail"]
        assert state(api, **{"X-API-Key": "tml-secret"})["fresh"]


def test_another_name_of_this_machine_gets_nothing(api: Api) -> None:
    for path in ("/", "/page/state", "/page/files/page.js"):
        assert api.client.get(path, headers={"Host": "evil.example"}).status_code == 421


# What is new


def test_a_run_has_its_loss_per_token_by_step(api: Api) -> None:
    model_id = api.model()
    passed = api.result(api.submit_pass(model_id, 1, [datum(), datum(2)]))
    second = api.result(api.submit_pass(model_id, 2, [datum(3)]))
    api.result(api.step(model_id, 3))
    curve = state(api)["curves"][model_id]
    total = passed["metrics"]["loss:sum"] + second["metrics"]["loss:sum"]
    assert curve["loss"] == pytest.approx(total / 9)
    assert (curve["steps"], curve["tokens"], curve["stride"]) == (1, 9, 1)
    assert curve["point_steps"] == [1]
    assert curve["point_losses"] == [pytest.approx(total / 9, rel=1e-5)]


def test_a_reader_gets_only_new_data(api: Api) -> None:
    model_id = api.model()
    trained(api, model_id, 3)
    first = state(api)
    assert first["fresh"]
    assert first["curves"][model_id]["point_steps"] == [1, 2, 3]
    idle = state(api, first["cursor"])
    assert (idle["fresh"], idle["curves"], idle["samples"], idle["tables"]) == (False, {}, [], None)
    trained(api, model_id, 2, first=7)
    news = state(api, first["cursor"])["curves"][model_id]
    assert (news["start"], news["point_steps"], news["steps"]) == (3, [4, 5], 5)


@pytest.mark.parametrize("cursor", ["x", "..", "00000000.7.ab", "%00", "9" * 400])
def test_a_cursor_of_another_server_is_ignored(api: Api, cursor: str) -> None:
    trained(api, api.model(), 1)
    assert state(api, cursor)["fresh"]
    assert state(api, cursor)["tables"] is not None


@pytest.mark.parametrize("version", ["-1", "x", "9" * 400, "1e3", "\u00b2"])
def test_an_invalid_version_is_ignored(api: Api, version: str) -> None:
    epoch = state(api)["cursor"].partition(".")[0]
    assert state(api, f"{epoch}.{version}.0")["fresh"]


def test_forward_passes_have_no_curve(api: Api) -> None:
    model_id = api.model()
    body = {"model_id": model_id, "seq_id": 1}
    targets = {"data": [2, 3], "dtype": "int64", "shape": [2]}
    model_input = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    data = [{"model_input": model_input, "loss_fn_inputs": {"target_tokens": targets}}]
    asked = {"data": data, "loss_fn": "cross_entropy"}
    api.result(api.post("forward", **body, forward_input=asked))
    assert state(api)["curves"] == {}
    assert state(api)["tokens"]["total_trained"] == 0


def test_a_step_without_a_pass_has_no_loss(api: Api) -> None:
    model_id = api.model()
    api.result(api.step(model_id, 1))
    curve = state(api)["curves"][model_id]
    assert (curve["steps"], curve["loss"], curve["point_steps"]) == (1, None, [])


def test_tables_are_sent_again_once_they_have_changed(api: Api) -> None:
    model_id = api.model()
    first = state(api)
    assert [run["id"] for run in first["tables"]["runs"]] == [model_id]
    assert first["tables"]["runs"][0]["rank"] == 8
    path = api.save(model_id, 1, "step-1")
    tables = state(api, first["cursor"])["tables"]
    (checkpoint,) = tables["checkpoints"]
    assert checkpoint["path"] == path
    assert (checkpoint["kind"], checkpoint["name"]) == ("weights", "step-1")
    assert checkpoint["size_bytes"] > 0


def test_a_name_of_a_run_is_shown_if_it_is_text(api: Api) -> None:
    session_id = api.session()
    api.result(api.submit_model(session_id, 0, user_metadata={"name": "warm-up"}))
    api.result(api.submit_model(session_id, 1, user_metadata={"other": "x"}))
    named = {run["id"]: run["name"] for run in state(api)["tables"]["runs"]}
    assert named == {f"{session_id}:train:0": "warm-up", f"{session_id}:train:1": None}


def test_a_session_shows_its_heartbeats_until_it_is_dead(tmp_path: Path) -> None:
    clock = ManualClock()
    with serving(tmp_path, clock=clock, session_ttl_s=60) as api:
        session_id = api.session()
        clock.now += 7
        assert state(api)["heartbeats"] == {session_id: 7.0}
        clock.now += 60
        api.backend.scheduler.rotation.request_housekeeping()  # type: ignore[attr-defined]
        deadline = time.monotonic() + WAIT_S
        while state(api)["tables"]["sessions"][0]["state"] == "live":
            assert time.monotonic() < deadline
        news = state(api)
        assert news["heartbeats"] == {}
        assert news["tables"]["sessions"][0]["state"] == "expired"
        assert news["tables"]["sessions"][0]["reason"] == "no heartbeat for 60 s"


def test_live_sessions_are_shown_however_old_they_are(api: Api) -> None:
    first = api.session()
    for _ in range(60):
        api.post(f"sessions/{api.session()}/finish")
    shown = {session["id"] for session in state(api)["tables"]["sessions"]}
    assert first in shown
    assert len(shown) == 51


def test_waiting_requests_are_counted(api: Api, engine: HeldEngine) -> None:
    model_id = api.model()
    held = api.hold(model_id, 1)
    assert engine.holding.wait(WAIT_S)
    for seq_id in (2, 3, 5):  # one of them waits for seq_id 4
        api.submit_pass(model_id, seq_id)
    sampler = api.sampler(model_id.partition(":")[0])
    sampled = [api.submit_sample(sampler, seq_id) for seq_id in range(2)]
    assert state(api)["queue"] == {"runs": {model_id: 3}, "samples": 2, "sampling": 0}
    engine.let_go.set()
    api.result(held)
    for one in sampled:
        api.result(one)
    assert state(api)["queue"]["samples"] == 0


# Samples


def test_a_sample_is_shown_with_the_probability_of_each_token(api: Api) -> None:
    session_id = api.session()
    drawn = api.result(api.submit_sample(api.sampler(session_id), 0))["sequences"][0]
    (sample,) = state(api)["samples"]
    assert sample["model"] == "deterministic"
    assert sample["prompt"] == "\x05\x06\x07"
    assert not sample["prompt_is_cut"]
    assert sample["tokens"] == [chr(token) for token in drawn["tokens"]]
    assert sample["logprobs"] == pytest.approx(drawn["logprobs"])
    assert (sample["prompt_length"], sample["length"]) == (3, len(drawn["tokens"]))
    assert state(api)["tokens"]["total_sampled"] == len(drawn["tokens"])


def test_tokens_are_counted_in_the_seconds_in_which_they_were_sampled(
    tmp_path: Path, engine: HeldEngine
) -> None:
    clock = ManualClock()
    with serving(tmp_path, engine, clock=clock, session_ttl_s=600) as api:
        model_id = api.model()
        api.submit_pass(model_id, 1, loss_fn="cispo")
        assert engine.holding.wait(WAIT_S)
        waiting = api.submit_sample(api.sampler(model_id.partition(":")[0]), 0)
        clock.now += 60  # spent in the queue
        engine.let_go.set()
        count = len(api.result(waiting)["sequences"][0]["tokens"])
        clock.now += 1
        sampled = state(api)["tokens"]["sampled"]
        assert sampled[-1] == count > 0
        assert sum(sampled) == count


def test_a_sample_names_the_weights_it_was_drawn_from(api: Api) -> None:
    model_id = api.model()
    session_id = model_id.partition(":")[0]
    path = api.save(model_id, 1, "a", "save_weights_for_sampler")
    api.result(api.submit_sample(api.sampler(session_id, 0, model_path=path), 0))
    body = {"model_id": model_id, "seq_id": 2, "sampling_session_seq_id": 1}
    made = api.result(api.post("save_weights_for_sampler", **body))
    api.result(api.submit_sample(made["sampling_session_id"], 0))
    asked = {"model": path, "prompt": "hi", "max_tokens": 3}
    assert api.client.post("/v1/completions", json=asked).status_code == 200
    assert [sample["model"] for sample in state(api)["samples"]] == [path, model_id, path]


def test_long_samples_are_kept_in_part(api: Api) -> None:
    sampler = api.sampler(api.session())
    made = [
        api.submit_sample(
            sampler,
            seq_id,
            prompt={"chunks": [{"type": "encoded_text", "tokens": [65] * 700 + [66]}]},
            sampling_params={"max_tokens": 400, "stop": []},
        )
        for seq_id in range(25)
    ]
    for one in made:
        api.result(one)
    samples = state(api)["samples"]
    assert len(samples) == MOST_SAMPLES
    assert samples[0]["prompt"] == "A" * 199 + "B"
    assert (samples[0]["prompt_length"], samples[0]["length"]) == (701, 400)
    assert samples[0]["prompt_is_cut"]
    assert len(samples[0]["tokens"]) == len(samples[0]["logprobs"]) == 300
    assert [one["id"] for one in samples] == sorted(one["id"] for one in samples)


def test_requests_for_log_probabilities_are_not_shown_as_samples(api: Api) -> None:
    sampler = api.sampler(api.session())
    scored = api.submit_sample(
        sampler, 0, prompt_logprobs=True, sampling_params={"max_tokens": 1, "stop": []}
    )
    api.result(scored)
    assert state(api)["samples"] == []


# Bounds


def test_the_curves_of_the_runs_trained_last_are_kept() -> None:
    activity = Activity()
    for number in range(MOST_RUNS + 10):
        activity.note_pass(f"run-{number}", 4, {"loss:sum": 2.0}, activity.clock())
        activity.note_step(f"run-{number}")
        activity.note_step("run-0")
    runs = activity.since(0).runs
    assert len(runs) == MOST_RUNS
    assert "run-0" in runs
    assert "run-1" not in runs
    assert runs[f"run-{MOST_RUNS}"].loss == 0.5


@pytest.mark.parametrize(
    ("metrics", "loss"),
    [
        ({"loss:sum": 6.0, "weights:sum": 3.0, "tokens:sum": 4.0}, 2.0),
        ({"loss:sum": 6.0, "weights:sum": -3.0, "tokens:sum": 4.0}, 1.5),
        ({"loss:sum": 6.0, "weights:sum": 0.0}, 1.2),
        ({"custom/x:sum": 6.0}, None),
    ],
)
def test_the_loss_per_token_is_divided_by_the_weights_if_there_are_weights(
    metrics: Any, loss: Any
) -> None:
    activity = Activity()
    activity.note_pass("run", 5, metrics, activity.clock())
    activity.note_step("run")
    assert activity.since(0).runs["run"].loss == loss


def test_a_curve_of_twenty_thousand_steps_is_sent_in_one_response(api: Api) -> None:
    activity = api.backend.activity  # type: ignore[attr-defined]
    for step in range(20_000):
        activity.note_pass("run", 4, {"loss:sum": 4.0 + step / 7}, activity.clock())
        activity.note_step("run")
    answer = api.client.get("/page/state")
    assert len(answer.data) < 100_000
    assert answer.get_json()["curves"]["run"]["steps"] == 20_000
    before = state(api)["cursor"]
    activity.note_pass("run", 4, {"loss:sum": 4.0}, activity.clock())
    for _ in range(8):
        activity.note_step("run")
    assert len(state(api, before)["curves"]["run"]["point_steps"]) <= 1


def test_a_failed_pass_is_not_recorded(api: Api, engine: HeldEngine) -> None:
    model_id = api.model()
    engine.explode = True
    api.result(api.submit_pass(model_id, 1))
    assert state(api)["curves"] == {}


def test_a_reader_misses_no_point_while_the_server_works(tmp_path: Path) -> None:
    """Data copied under the lock is consistent, whatever the engine thread does meanwhile."""
    with serving(tmp_path, DeterministicEngine()) as api:
        model_id = api.model()
        cursor, steps = "", []
        for seq_id in range(1, 101, 2):
            api.submit_pass(model_id, seq_id)
            last = api.step(model_id, seq_id + 1)
            news = state(api, cursor)
            cursor = news["cursor"]
            if model_id in news["curves"]:
                curve = news["curves"][model_id]
                assert curve["start"] == len(steps)
                steps += curve["point_steps"]
        api.result(last)
        steps += state(api, cursor)["curves"].get(model_id, {"point_steps": []})["point_steps"]
        assert steps == list(range(1, 51))
