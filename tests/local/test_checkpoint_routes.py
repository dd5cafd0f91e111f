"""Exports, copies, samplers that follow a run, and other operations on checkpoints."""

from __future__ import annotations

import functools
import re
import sqlite3
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
from local.harness import WAIT_S, Api, HeldEngine, serving
from support.threads import wait_until

from tinkex.local.state.checkpoints import Checkpoints
from tinkex.local.state.store import Store


def ephemeral(api: Api, model: str, seq_id: int, number: int, kind: str) -> str:
    made = api.post(
        "save_weights_for_sampler",
        model_id=model,
        seq_id=seq_id,
        sampling_session_seq_id=number,
        kind=kind,
    )
    result = api.result(made)
    assert result["type"] == "save_weights_for_sampler"
    return str(result["sampling_session_id"])


def logprobs(api: Api, sampler: str, seq_id: int) -> List[float]:
    made = api.submit_sample(sampler, seq_id, prompt_logprobs=True)
    return list(api.result(made)["prompt_logprobs"])


def train(api: Api, model: str, seq_id: int) -> None:
    api.submit_pass(model, seq_id)
    api.result(api.step(model, seq_id + 1))


# Samplers of a run


def test_inflight_samplers_share_the_newest_weights_of_their_run(
    api: Api, engine: HeldEngine
) -> None:
    session = api.session()
    model, other = api.model(session, 0), api.model(session, 1)
    fixed = ephemeral(api, model, 1, 0, "snapshot")
    first = ephemeral(api, model, 2, 1, "inflight")
    apart = ephemeral(api, other, 1, 2, "inflight")
    before = logprobs(api, first, 0)
    assert before == logprobs(api, fixed, 0) == logprobs(api, apart, 0)
    train(api, model, 3)
    assert logprobs(api, first, 1) == before  # only a save publishes new weights
    second = ephemeral(api, model, 5, 3, "inflight")
    after = logprobs(api, second, 0)
    assert after != before
    assert logprobs(api, first, 2) == after
    assert logprobs(api, fixed, 1) == before
    assert logprobs(api, apart, 1) == before
    assert api.get(f"samplers/{first}")["base_model"] == "deterministic"
    assert sum("unload sampler" in line for line in engine.log) == 1  # the first version's sampler


def test_the_weights_of_inflight_samplers_are_freed_with_the_last_user(tmp_path: Path) -> None:
    engine = HeldEngine()
    with serving(tmp_path, engine) as api:
        session = api.session()
        model = api.model(session)
        for number in range(3):
            ephemeral(api, model, number + 1, number, "inflight")
        logprobs(api, f"{session}:sample:0", 0)
        assert len(list((tmp_path / "samplers").iterdir())) == 1
        api.post(f"sessions/{session}/finish")
        api.model()  # by now the engine thread has done all earlier work
        wait_until(lambda: not list((tmp_path / "samplers").iterdir()), "the files are deleted")
        assert not engine._samplers


def test_a_running_generation_ends_with_the_weights_it_began_with(tmp_path: Path) -> None:
    class Stepwise(HeldEngine):
        def sample(self, sampler_id: str, requests: Any, dropped: Any = ()) -> Any:
            for finished in super().sample(sampler_id, requests, dropped):
                self.holding.set()
                yield finished

    engine = Stepwise()
    with serving(tmp_path, engine) as api:
        session = api.session()
        model = api.model(session)
        first = ephemeral(api, model, 1, 0, "inflight")
        long = {"max_tokens": 20_000, "stop": [], "seed": 1}
        running = api.submit_sample(first, 0, sampling_params=long)
        assert engine.holding.wait(WAIT_S)
        train(api, model, 2)
        ephemeral(api, model, 4, 1, "inflight")
        short = api.submit_sample(first, 1, sampling_params={**long, "max_tokens": 4})
        assert api.result(short)["sequences"][0]["logprobs"] != []
        assert api.backend.futures.wait(running["request_id"], 0.0).seq_id == 0
        api.post("cancel_future", request_id=running["request_id"])
        assert "cancelled" in api.result(running)["error"]


def test_a_repeated_inflight_save_creates_one_sampler(api: Api) -> None:
    session = api.session()
    model = api.model(session)
    assert ephemeral(api, model, 1, 0, "inflight") == ephemeral(api, model, 1, 5, "inflight")
    assert api.get(f"sessions/{session}")["sampler_ids"] == [f"{session}:sample:0"]


# Exports and copies


def test_exported_weights_can_be_loaded_and_sampled(api: Api) -> None:
    session = api.session()
    model = api.model(session)
    train(api, model, 1)
    made = api.post("save_weights_external", model_id=model, seq_id=3, path="x", ttl_seconds=3600)
    path = api.result(made)["path"]
    sampler = api.sampler(session, 0, model_path=path)
    assert api.get(f"samplers/{sampler}")["model_path"] == path
    again = api.post("load_weights", session_id=session, model_seq_id=1, path=path, optimizer=False)
    assert api.result(again)["path"] == path
    refused = api.post(
        "load_weights", 400, session_id=session, model_seq_id=2, path=path, optimizer=True
    )
    assert "weights" in refused["detail"]
    listed = api.get("checkpoints")["checkpoints"]
    assert listed[0]["expires_at"] is not None


def fetch_export(api: Api, path: str) -> Dict[str, bytes]:
    """Return the files of an export, by name."""
    run_id, kind, name = path[len("tinker://") :].split("/")
    listed = api.get(f"training_runs/{run_id}/checkpoints/{kind}/{name}/external_weights_urls")
    files = {}
    for relative, url in listed["urls"].items():
        answer = api.client.get(url[url.index("/signed/") :], buffered=True)
        assert answer.status_code == 200, answer.text
        files[relative] = answer.data
    return files


def test_an_export_is_encrypted_for_every_recipient(api: Api) -> None:
    pyrage = pytest.importorskip("pyrage")
    identities = [pyrage.x25519.Identity.generate() for _ in range(2)]
    stranger = pyrage.x25519.Identity.generate()
    model = api.model()
    train(api, model, 1)
    save = functools.partial(api.post, "save_weights_external", model_id=model)
    plain = fetch_export(api, api.result(save(seq_id=3, path="plain"))["path"])
    keys = [str(identity.to_public()) for identity in identities]
    saved = api.result(save(seq_id=4, path="secret", age_encryption_recipients=keys))
    encrypted = fetch_export(api, saved["path"])
    assert set(encrypted) == {f"{name}.age" for name in plain}
    assert saved["size_bytes"] == sum(map(len, encrypted.values()))
    for name, content in plain.items():
        for identity in identities:
            assert pyrage.decrypt(encrypted[f"{name}.age"], [identity]) == content
        with pytest.raises(pyrage.DecryptError):
            pyrage.decrypt(encrypted[f"{name}.age"], [stranger])


def test_an_encrypted_export_cannot_be_loaded_or_sampled_from(api: Api) -> None:
    pyrage = pytest.importorskip("pyrage")
    session = api.session()
    key = str(pyrage.x25519.Identity.generate().to_public())
    body = {"model_id": api.model(session), "seq_id": 1, "path": "x"}
    saved = api.post("save_weights_external", **body, age_encryption_recipients=[key])
    path = api.result(saved)["path"]
    load = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": False}
    sampler = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
    for route, body in (("load_weights", load), ("create_sampling_session", sampler)):
        assert f"{path} is encrypted" in api.post(route, 400, **body)["detail"]


@pytest.mark.parametrize(
    ("route", "keys", "says"),
    [
        ("save_weights_external", [], "0 keys"),
        ("save_weights_external", ["age1x"] * 11, "11 keys"),
        ("save_weights_external", ["age1x"], r"\[0\] is not a public key of age"),
        ("save_weights_external", [7], r"\[0\] is not a public key of age"),
        ("save_weights_external", "age1x", "must be of type list"),
        ("save_weights", ["age1x"], "save_weights_external does"),
        ("save_weights_for_sampler", ["age1x"], "save_weights_external does"),
    ],
)
def test_invalid_encryption_recipients_are_refused(
    api: Api, route: str, keys: Any, says: str
) -> None:
    pytest.importorskip("pyrage")
    model = api.model()
    body = {"model_id": model, "seq_id": 1, "path": "x", "age_encryption_recipients": keys}
    assert re.search(says, api.post(route, 400, **body)["detail"])
    api.save(model, 2, "next")  # the run continues


def test_encryption_without_pyrage_names_what_to_install(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyrage", None)  # as if it were not installed
    body = {"model_id": api.model(), "seq_id": 1, "path": "x"}
    refused = api.post("save_weights_external", 400, **body, age_encryption_recipients=["age1x"])
    assert "tinkex[age]" in refused["detail"]
    assert api.get("checkpoints")["checkpoints"] == []


def test_a_copy_is_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    with serving(tmp_path) as api:
        session = api.session()
        model = api.model(session)
        train(api, model, 1)
        path = api.save(model, 3, "a")
        copied = api.post(
            "copy_weights", source_path=path, destination_project_id="p", ttl_seconds=3600
        )["tinker_path"]
        run_id, kind, name = copied[len("tinker://") :].split("/")
        assert (kind, name) == ("weights", "a")
        assert run_id != model
        assert "load its last checkpoint" in api.step(run_id, 1, expect=404)["detail"]
        api.client.delete(f"/api/v1/training_runs/{model}/checkpoints/weights/a")
        assert api.post("weights_info", tinker_path=copied)["lora_rank"] == 8
        of_project = api.get("training_runs?project_id=p")
        assert [one["training_run_id"] for one in of_project["training_runs"]] == [run_id]
        assert of_project["cursor"]["total_count"] == 1
        loaded = api.post(
            "load_weights", session_id=session, model_seq_id=1, path=copied, optimizer=True
        )
        assert api.result(loaded)["path"] == copied
    with serving(tmp_path) as api:  # the copy survives a restart
        assert api.post("weights_info", tinker_path=copied)["base_model"] == "deterministic"


def test_a_repeated_request_for_a_copy_returns_the_same_copy(api: Api) -> None:
    path = api.save(api.model(), 1, "a")

    def copy(key: str) -> str:
        answer = api.client.post(
            "/api/v1/copy_weights",
            json={"source_path": path},
            headers={"X-Idempotency-Key": key, "X-Tinker-Weights-Access-Token": "t"},
        )
        return str(answer.get_json()["tinker_path"])

    assert copy("k1") == copy("k1") != copy("k2")
    assert api.get("training_runs")["cursor"]["total_count"] == 3


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "source_path"),
        ({"source_path": "nonsense"}, 400, "not a checkpoint path"),
        ({"source_path": "tinker://no/weights/a"}, 404, "unknown"),
        ({"source_path": "tinker://no/weights/a", "ttl_seconds": 1}, 404, "unknown"),
    ],
)
def test_a_copy_of_a_missing_checkpoint_is_refused(
    api: Api, body: Any, status: int, says: str
) -> None:
    assert says in api.post("copy_weights", status, **body)["detail"]
    assert api.get("training_runs")["training_runs"] == []


def test_a_copy_that_fails_leaves_no_run(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = api.save(api.model(), 1, "a")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Checkpoints, "copy_files", full)
    assert "no space" in api.post("copy_weights", 507, source_path=path)["detail"]
    assert api.get("training_runs")["cursor"]["total_count"] == 1
    assert len(api.get("checkpoints")["checkpoints"]) == 1


# Lists, scopes, and databases of older versions


def test_a_run_moves_with_its_session_to_another_project(api: Api) -> None:
    session = str(api.post("create_session", project_id="p1")["session_id"])
    model = api.model(session)
    assert api.get("training_runs?project_id=p1")["cursor"]["total_count"] == 1
    answer = api.client.put(f"/api/v1/sessions/{session}/project", json={"project_id": "p2"})
    assert answer.get_json() == {}
    assert api.get("training_runs?project_id=p1")["training_runs"] == []
    moved = api.get("training_runs?project_id=p2")["training_runs"]
    assert [one["training_run_id"] for one in moved] == [model]
    assert moved[0]["model_owner"] == "tml:user:local"


@pytest.mark.parametrize("path", ["training_runs", "training_runs/x", "sessions", "sessions/x"])
def test_a_scope_that_does_not_exist_is_refused(api: Api, path: str) -> None:
    assert "access_scope" in api.get(f"{path}?access_scope=all", 400)["detail"]


def test_an_expired_checkpoint_is_not_listed_before_it_is_swept(tmp_path: Path) -> None:
    now = [1_800_000_000.0]
    with serving(tmp_path, store=Store(tmp_path, wall=lambda: now[0])) as api:
        model = api.model()
        made = api.post("save_weights", model_id=model, seq_id=1, path="a", ttl_seconds=3600)
        path = api.result(made)["path"]
        assert len(api.get("checkpoints")["checkpoints"]) == 1
        now[0] += 3600
        assert api.get("checkpoints") == {
            "checkpoints": [],
            "cursor": {"offset": 0, "limit": 100, "total_count": 0},
        }
        assert api.get(f"training_runs/{model}/checkpoints")["checkpoints"] == []
        assert "last_checkpoint" not in {
            name for name, value in api.get(f"training_runs/{model}").items() if value
        }
        assert "no checkpoint" in api.post("weights_info", 404, tinker_path=path)["detail"]


def test_a_database_of_the_first_version_is_migrated(tmp_path: Path) -> None:
    with sqlite3.connect(str(tmp_path / "tinkex.sqlite3")) as old:
        old.executescript(
            """
            CREATE TABLE sessions (
                session_id TEXT PRIMARY KEY, created_at REAL NOT NULL, state TEXT NOT NULL,
                facts TEXT NOT NULL, ended_at REAL, reason TEXT);
            CREATE TABLE runs (
                run_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, created_at REAL NOT NULL,
                last_request_at REAL NOT NULL, base_model TEXT NOT NULL, lora TEXT NOT NULL,
                optimizer TEXT NOT NULL, user_metadata TEXT);
            INSERT INTO sessions VALUES ('s', 1.0, 'live', '{}', NULL, NULL);
            INSERT INTO runs VALUES ('s:train:0', 's', 1.0, 1.0, 'deterministic', '{"rank": 4}',
                '{"type": "adamw"}', NULL);
            """
        )
    old.close()
    with serving(tmp_path) as api:
        assert api.get("training_runs/s:train:0")["lora_rank"] == 4
        found = api.post("sessions/search", user_metadata={}, owner={"type": "own"})["sessions"]
        assert found[0]["status"]["type"] == "cancelled"
        assert found[0]["project_id"] == "default"
        assert api.model()


def test_a_run_names_its_newest_checkpoint_of_each_kind(api: Api) -> None:
    model = api.model()
    assert "last_checkpoint" not in api.get(f"training_runs/{model}")
    for seq_id, name in ((1, "b"), (3, "a")):
        api.save(model, seq_id, name)
        api.save(model, seq_id + 1, name, "save_weights_for_sampler")
    (run,) = api.get("training_runs")["training_runs"]
    assert run["last_checkpoint"]["checkpoint_id"] == "weights/a"
    assert run["last_sampler_checkpoint"]["checkpoint_id"] == "sampler_weights/a"
