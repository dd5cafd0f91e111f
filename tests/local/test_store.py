"""Stored data survives a restart; the leftovers of a crash do not."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import pytest
from local.harness import Api, serving

from tinkex.errors import LocalServerError
from tinkex.local.errors import HTTPError, StorageError
from tinkex.local.state import database
from tinkex.local.state.database import Reserve
from tinkex.local.state.store import CheckpointRow, Store
from tinkex.types import LoraConfig


class Wall:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def save(
    store: Store,
    name: str,
    text: str = "x",
    *,
    overwrite: bool = False,
    ttl_s: Optional[float] = None,
) -> CheckpointRow:
    with store.checkpoints.saving(
        "s:train:0", "weights", name, overwrite=overwrite, ttl_s=ttl_s, user_metadata=None
    ) as folder:
        (folder / "adapter").write_text(text)
    row = store.checkpoints.find("s:train:0", "weights", name)
    assert row is not None
    return row


def test_a_restart_keeps_runs_and_checkpoints(tmp_path: Path) -> None:
    with serving(tmp_path) as api:
        session = api.session()
        model = api.model(session)
        api.result(api.submit_pass(model, 1))
        api.result(api.step(model, 2))
        path = api.save(model, 3, "kept")
        expected = api.result(api.submit_pass(model, 4))["metrics"]
    with serving(tmp_path) as api:
        detail = api.post("session_heartbeat", 404, session_id=session)["detail"]
        assert "the server was closed" in detail
        assert "lost" in api.step(model, 5, expect=404)["detail"]
        run = api.get(f"training_runs/{model}")
        assert run["lora_rank"] == 8
        assert run["last_checkpoint"]["tinker_path"] == path
        assert api.post("weights_info", tinker_path=path)["lora_rank"] == 8
        made = api.post(
            "load_weights", session_id=api.session(), model_seq_id=0, path=path, optimizer=True
        )
        resumed = api.result(made)["model_id"]
        assert api.result(api.submit_pass(resumed, 1))["metrics"] == expected


def test_a_server_works_on_the_folder_of_a_crashed_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add_session("s", {})
    store.add_run("s:train:0", "s", "base", LoraConfig(rank=4), {"type": "adamw"}, None)
    kept = save(store, "kept")
    parent = store.checkpoints.folder_of(kept).parent
    (parent / ".half.1234.tmp").mkdir()
    (parent / "no-row").mkdir()
    frozen = store.freeze(kept)
    store.close()  # without ending the session: as after a crash

    store = Store(tmp_path)
    row = store.session("s")
    assert row is not None
    assert (row.state, row.reason) == ("lost", "the server was restarted")
    assert sorted(one.name for one in parent.iterdir()) == ["kept"]
    assert not frozen.exists()
    run = store.run("s:train:0")
    assert run is not None
    assert run.lora == LoraConfig(rank=4)
    store.close()


def test_a_save_that_raises_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept = save(store, "a", "first")
    saving = store.checkpoints.saving(
        "s:train:0", "weights", "a", overwrite=True, ttl_s=None, user_metadata=None
    )

    def interrupted() -> None:
        with saving as folder:
            (folder / "adapter").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (store.checkpoints.folder_of(kept) / "adapter").read_text() == "first"
    assert [one.name for one in store.checkpoints.folder_of(kept).parent.iterdir()] == ["a"]
    store.close()


def test_overwriting_replaces_the_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = save(store, "a", "first")
    with pytest.raises(HTTPError, match="exists"):
        save(store, "a", "second")
    second = save(store, "a", "second!", overwrite=True)
    assert (store.checkpoints.folder_of(second) / "adapter").read_text() == "second!"
    assert second.size_bytes == 7
    assert not store.checkpoints.folder_of(first).exists()
    third = save(store, "a", "third", overwrite=True)
    assert (store.checkpoints.folder_of(third) / "adapter").read_text() == "third"
    assert len(store.checkpoints.of_run("s:train:0")) == 1
    store.close()


def test_a_checkpoint_expires(tmp_path: Path) -> None:
    wall = Wall()
    store = Store(tmp_path, wall=wall)
    short, for_ever = save(store, "short", ttl_s=3600), save(store, "for-ever")
    wall.now += 3599
    store.checkpoints.delete_expired()
    assert store.checkpoints.find("s:train:0", "weights", "short") is not None
    wall.now += 1
    assert store.checkpoints.find("s:train:0", "weights", "short") is None
    again = save(store, "short", "again")  # the name is free before the files are gone
    assert (store.checkpoints.folder_of(again) / "adapter").read_text() == "again"
    store.checkpoints.set_ttl(for_ever, 10)
    wall.now += 10
    store.checkpoints.delete_expired()
    assert [row.name for row in store.checkpoints.of_run("s:train:0")] == ["short"]
    assert not store.checkpoints.folder_of(for_ever).exists()
    assert store.checkpoints.folder_of(again).exists()
    assert short.expires_at == 1_700_003_600.0
    store.close()


def test_a_frozen_copy_outlives_its_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path)
    row = save(store, "a", "weights")
    (store.checkpoints.folder_of(row) / "deeper").mkdir()
    (store.checkpoints.folder_of(row) / "deeper" / "file").write_text("too")
    frozen = store.freeze(row)
    store.checkpoints.delete(row)
    assert (frozen / "adapter").read_text() == "weights"
    assert (frozen / "deeper" / "file").read_text() == "too"
    assert store.checkpoints.find("s:train:0", "weights", "a") is None
    with pytest.raises(HTTPError, match="was deleted just now"):
        store.freeze(row)
    assert list((tmp_path / "samplers").iterdir()) == [frozen]
    store.close()


def test_without_hard_links_weights_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    row = save(store, "a", "weights")

    def no_links(source: str, target: str) -> None:
        raise OSError("not on this file system")

    monkeypatch.setattr("os.link", no_links)
    assert (store.freeze(row) / "adapter").read_text() == "weights"
    store.close()


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(LocalServerError, match="in use by another") as problem:
        Store(tmp_path)
    assert "--data-dir" in str(problem.value)
    store.close()
    Store(tmp_path).close()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalServerError, match="cannot use the data directory"):
        Store(tmp_path / "file")
    (tmp_path / "tinkex.sqlite3").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(LocalServerError, match="cannot use the data directory"):
        Store(tmp_path)
    (tmp_path / "tinkex.sqlite3").unlink()
    Store(tmp_path).close()  # the failed start has released the folder


def test_a_run_in_use_moves_to_the_front_of_the_list_at_most_once_a_second(tmp_path: Path) -> None:
    wall = Wall()
    store = Store(tmp_path, wall=wall)
    for name in ("a", "b"):
        store.add_run(name, "s", "base", LoraConfig(), {}, None)
        wall.now += 1
    assert [row.run_id for row in store.runs(10, 0)[0]] == ["b", "a"]
    store.touch_run("a")
    assert [row.run_id for row in store.runs(10, 0)[0]] == ["a", "b"]
    wall.now += 0.5
    store.touch_run("a")
    run = store.run("a")
    assert run is not None
    assert run.last_request_at == wall.now - 0.5
    store.close()


def test_runs_and_checkpoints_are_listed_in_pages(api: Api) -> None:
    session = api.session()
    models = [api.model(session, n) for n in range(3)]
    page = api.get("training_runs?limit=2&offset=1")
    assert [run["training_run_id"] for run in page["training_runs"]] == [models[1], models[0]]
    assert page["cursor"] == {"offset": 1, "limit": 2, "total_count": 3}
    for seq_id, model in ((1, models[0]), (2, models[0]), (1, models[1])):
        api.save(model, seq_id, f"c{seq_id}")
    newest = api.get("checkpoints?limit=2")
    assert [one["tinker_path"] for one in newest["checkpoints"]] == [
        f"tinker://{models[1]}/weights/c1",
        f"tinker://{models[0]}/weights/c2",
    ]
    assert newest["cursor"]["total_count"] == 3
    own = api.get(f"training_runs/{models[0]}/checkpoints")["checkpoints"]
    assert [one["checkpoint_id"] for one in own] == ["weights/c2", "weights/c1"]
    assert "unknown" in api.get("training_runs/nix", 404)["detail"]
    assert "unknown" in api.get("training_runs/nix/checkpoints", 404)["detail"]


def test_a_checkpoint_is_published_given_an_expiry_and_deleted(api: Api) -> None:
    model = api.model()
    made = api.post(
        "save_weights",
        model_id=model,
        seq_id=1,
        path="a",
        ttl_seconds=7200,
        user_metadata={"k": "v"},
    )
    path = api.result(made)["path"]
    url = f"/api/v1/training_runs/{model}/checkpoints/weights/a"

    def checkpoint() -> dict:
        found: dict = api.get(f"training_runs/{model}/checkpoints")["checkpoints"][0]
        return found

    found = checkpoint()
    assert found["tinker_path"] == path
    assert found["checkpoint_type"] == "training"
    assert found["size_bytes"] > 0
    assert found["user_metadata"] == {"k": "v"}
    assert found["expires_at"] > found["time"]
    client = api.client
    assert client.post(f"{url}/publish").status_code == 200
    assert checkpoint()["public"] is True
    assert client.post(f"{url}/publish").status_code == 409
    assert client.delete(f"{url}/publish").status_code == 200
    assert client.delete(f"{url}/publish").status_code == 409
    assert client.put(f"{url}/ttl", json={"ttl_seconds": None}).status_code == 200
    assert checkpoint().get("expires_at") is None
    assert client.put(f"{url}/ttl", json={"ttl_seconds": 1}).status_code == 400
    assert client.delete(url).status_code == 200
    gone = client.delete(url)
    assert gone.status_code == 404
    assert "no checkpoint weights/a" in gone.get_json()["detail"]
    assert client.delete(url.replace("weights", "heights")).status_code == 400
    assert "no checkpoint" in api.post("weights_info", 404, tinker_path=path)["detail"]


class FullDisk:
    """A connection on a disk without room for a change, until *roomy* says there is some."""

    def __init__(self, connection: sqlite3.Connection, roomy: Callable[[], bool]) -> None:
        self._connection = connection
        self._roomy = roomy

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        if not sql.startswith("SELECT") and not self._roomy():
            raise sqlite3.OperationalError("database or disk is full")
        return self._connection.execute(sql, values)

    def close(self) -> None:
        self._connection.close()


def fill_disk(store: Store, roomy: Callable[[], bool]) -> None:
    store._db._connection = FullDisk(store._db._connection, roomy)  # type: ignore[assignment]


def test_the_reserve_makes_room_for_changes_on_a_full_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    reserve = tmp_path / "reserve"
    assert reserve.stat().st_size == 1 << 20
    linked, other = save(store, "linked"), save(store, "other")
    store.freeze(linked)  # the copy keeps the files, so deleting the checkpoint frees no space
    fill_disk(store, lambda: not reserve.exists())
    store.checkpoints.delete(linked)
    assert "full disk" in caplog.text
    assert [row.name for row in store.checkpoints.of_run("s:train:0")] == ["other"]
    assert not store.checkpoints.folder_of(linked).exists()
    store.checkpoints.set_public(other, True)
    assert store.checkpoints.of_run("s:train:0")[0].public
    store.restore_reserve()
    assert reserve.stat().st_size == 1 << 20
    store.close()


def test_a_deletion_works_even_after_the_reserve_is_used_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    row = save(store, "a")
    (tmp_path / "reserve").unlink()
    fill_disk(store, lambda: not store.checkpoints.folder_of(row).exists())
    with pytest.raises(StorageError, match=r"disk is full.*free some space"):
        store.checkpoints.set_public(row, True)
    store.checkpoints.delete(row)
    assert store.checkpoints.of_run("s:train:0") == []
    assert not store.checkpoints.folder_of(row).exists()
    store.close()


def test_a_killed_server_starts_again_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    save(store, "a")
    store.close()
    assert not (tmp_path / "reserve").exists()
    (tmp_path / "reserve").write_bytes(bytes(1 << 20))  # as a killed server leaves it
    connect = database._connect

    def full(path: str) -> sqlite3.Connection:
        if (tmp_path / "reserve").exists():
            raise sqlite3.OperationalError("database or disk is full")
        return connect(path)

    monkeypatch.setattr(database, "_connect", full)
    store = Store(tmp_path)
    assert [row.name for row in store.checkpoints.of_run("s:train:0")] == ["a"]
    store.close()


def test_the_error_about_a_full_disk_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Store) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Store, "_tidy", full)
    with pytest.raises(LocalServerError, match="disk is full") as caught:
        Store(tmp_path)
    assert str(tmp_path) in str(caught.value)
    monkeypatch.undo()
    Store(tmp_path).close()  # the folder was released


def test_a_reserve_that_finds_no_room_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, data: bytes) -> int:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    reserve = Reserve(tmp_path / "reserve")
    reserve.fill()
    assert not (tmp_path / "reserve").exists()
    assert not reserve.release()


def test_a_start_removes_only_files_that_a_store_created(tmp_path: Path) -> None:
    mine = [
        tmp_path / "samplers" / "drums" / "kick.wav",
        tmp_path / "samplers" / "notes.txt",
        tmp_path / "checkpoints" / "experiment" / "step-100" / "best" / "model.pt",
        tmp_path / "checkpoints" / "yolo" / "weights" / "best" / "model.pt",
    ]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("years of work")
    Store(tmp_path).close()
    store = Store(tmp_path)
    store.add_run("s:train:0", "s", "base", LoraConfig(), {}, None)
    kept = save(store, "kept")
    with store.new_sampler_folder() as left:
        pass
    orphan = store.checkpoints.folder_of(kept).with_name("orphan")
    orphan.mkdir()
    store.close()
    store = Store(tmp_path)
    assert [file.read_text() for file in mine] == ["years of work"] * 4
    assert store.checkpoints.folder_of(kept).exists()
    assert not left.exists()
    assert not orphan.exists()
    store.close()


def test_the_error_about_a_missing_checkpoint_names_the_folder_searched(tmp_path: Path) -> None:
    with serving(tmp_path) as api:
        model = api.model()
        path = api.save(model, 1, "a")
        for wrong in (f"tinker://{model}/weights/b", "tinker://other/weights/a"):
            assert str(tmp_path) in api.post("weights_info", 404, tinker_path=wrong)["detail"]
        files = tmp_path / "checkpoints" / model.replace(":", "_") / "weights" / "a"
        files.rename(tmp_path / "moved")
        for create in ("create_sampling_session", "copy_weights"):
            body = {"session_id": api.session(), "sampling_session_seq_id": 0, "model_path": path}
            if create == "copy_weights":
                body = {"source_path": path, "destination_project_id": "p"}
            assert f"there is no folder {files}" in api.post(create, 404, **body)["detail"]
