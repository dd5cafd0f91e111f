"""A full or read-only disk: an error that names it, nothing half-written, nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from local.harness import WAIT_S
from support.clocks import ManualClock
from support.disks import fill, no_room, small_disk
from support.served import tinkex_serve
from support.threads import wait_until

from tinkex import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TrainingClient
from tinkex.errors import InternalServerError, LocalServerError, RequestFailedError
from tinkex.local import LocalServer
from tinkex.local.backend import Backend
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.errors import StorageError
from tinkex.local.state.store import Store

DATA = [Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})]
ADAM = AdamParams(learning_rate=0.01)
PROMPT, PARAMS = ModelInput.from_ints([1, 2]), SamplingParams(max_tokens=2)


@pytest.fixture
def requests() -> List[str]:
    return []


@pytest.fixture
def server(tmp_path: Path, requests: List[str]) -> Iterator[LocalServer]:
    data_dir = tmp_path / "data"
    with LocalServer(DeterministicEngine(), data_dir=data_dir, access_log=requests.append) as made:
        yield made


@pytest.fixture
def service(server: LocalServer) -> Iterator[ServiceClient]:
    with ServiceClient(base_url=server.url) as made:
        yield made


def files_below(folder: Path) -> List[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def save_until_it_fails(trainer: TrainingClient) -> None:
    """Save until a save fails; the reserve of the database has room for some."""
    for number in range(600):
        trainer.save_state(f"s{number}").result(timeout=WAIT_S)


def listed(service: ServiceClient) -> List[str]:
    found = service.create_rest_client().list_user_checkpoints().result().checkpoints
    return sorted(checkpoint.checkpoint_id for checkpoint in found)


def test_a_save_without_room_leaves_nothing_and_training_continues(
    server: LocalServer, service: ServiceClient
) -> None:
    trainer = service.create_lora_training_client("deterministic", rank=4)
    trainer.train_step(DATA, "cross_entropy", ADAM)
    saves: List[Callable[[], Any]] = [
        lambda: trainer.save_state("a"),
        lambda: trainer.save_weights_for_sampler("a"),
        lambda: trainer.save_weights_external("a"),
    ]
    first = trainer.save_state("first").result().path
    before = files_below(server.data_dir / "checkpoints")
    with no_room():
        for save in saves:
            with pytest.raises(RequestFailedError, match=r"cannot write to .* free some") as caught:
                save().result(timeout=WAIT_S)
            assert caught.value.category == "server"
        with pytest.raises(RequestFailedError, match="free some space"):
            trainer.save_weights_and_get_sampling_client()
        trainer.train_step(DATA, "cross_entropy", ADAM)
        assert listed(service) == ["weights/first"]
    files = [name for name in files_below(server.data_dir / "checkpoints") if name.count("/") > 1]
    assert files == [name for name in before if name.count("/") > 1]
    assert files_below(server.data_dir / "samplers") == []
    for save in saves:
        save().result(timeout=WAIT_S)
    trainer.save_weights_and_get_sampling_client().sample(PROMPT, 1, PARAMS).result(timeout=WAIT_S)
    assert len(listed(service)) == 4
    loaded = service.create_training_client_from_state_with_optimizer(first)
    loaded.forward_backward(DATA, "cross_entropy")
    metrics = loaded.optim_step(ADAM).result().metrics
    assert metrics is not None
    assert metrics["optimizer_steps:max"] == 2.0


def test_a_checkpoint_without_room_for_its_record_does_not_exist(tmp_path: Path) -> None:
    store = Store(tmp_path)
    options: Dict[str, Any] = {"ttl_s": None, "user_metadata": None}
    with store.checkpoints.saving("r", "weights", "a", overwrite=False, **options) as folder:
        (folder / "adapter").write_text("old")
    for overwrite, name in ((False, "b"), (True, "a")):
        with pytest.raises(StorageError, match="free some space"), no_room():
            with store.checkpoints.saving("r", "weights", name, overwrite=overwrite, **options):
                pass  # empty files, so that only the database needs room
    (row,) = store.checkpoints.of_run("r")
    assert (store.checkpoints.folder_of(row) / "adapter").read_text() == "old"
    checkpoint = Path("checkpoints", "r", "weights", "a")
    assert row.folder == str(checkpoint)
    files = [file for file in files_below(tmp_path) if file.startswith(str(checkpoint.parent))]
    assert files == [str(checkpoint.parent), str(checkpoint), str(checkpoint / "adapter")]
    assert [event.event for event in store.audit_log(0, 1e12, None)] == ["checkpoint.created"]
    store.close()


def test_a_failed_write_is_refused_and_not_retried_by_the_client(
    service: ServiceClient, requests: List[str]
) -> None:
    trainer = service.create_lora_training_client("deterministic", rank=4)
    path = trainer.save_state("a").result().path
    rest = service.create_rest_client()
    changes: List[Callable[[], Any]] = [
        lambda: rest.publish_checkpoint_from_tinker_path(path).result(),
        lambda: rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result(),
        lambda: rest.copy_weights(path, "project").result(),
        lambda: service.create_sampling_client(path),
        lambda: service.create_lora_training_client("deterministic", rank=4),
    ]

    def refused() -> int:
        return sum(" 507 " in line for line in requests)

    with no_room():
        for change in changes:
            requests.clear()
            with pytest.raises(InternalServerError, match=r"free some space") as caught:
                change()
            assert caught.value.status == 507
            wait_until(lambda: refused() > 0, "the response is in the access log")
            assert refused() == 1
        with pytest.raises(InternalServerError, match=r"free some space"):
            ServiceClient(base_url=service.config.base_url)
    (checkpoint,) = rest.list_user_checkpoints().result().checkpoints
    assert not checkpoint.public
    assert checkpoint.expires_at is None
    assert rest.list_training_runs().result().cursor.total_count == 1
    for change in changes:
        change()
    service.create_sampling_client(path).sample(PROMPT, 1, PARAMS).result(timeout=WAIT_S)


def test_a_deletion_without_room_can_be_repeated(service: ServiceClient) -> None:
    trainer = service.create_lora_training_client("deterministic", rank=4)
    path = trainer.save_state("a").result().path
    rest = service.create_rest_client()
    with no_room(), pytest.raises(InternalServerError, match="free some space"):
        rest.delete_checkpoint_from_tinker_path(path).result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert listed(service) == []


def test_a_read_only_database_keeps_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.checkpoints.saving(
        "r", "weights", "a", overwrite=False, ttl_s=None, user_metadata=None
    ) as folder:
        (folder / "adapter").write_text("weights")
    (row,) = store.checkpoints.of_run("r")
    store._db.execute(("PRAGMA query_only = ON",))
    with pytest.raises(StorageError, match=r"readonly database.*make the folder writable"):
        store.checkpoints.delete(row)
    assert (store.checkpoints.folder_of(row) / "adapter").read_text() == "weights"
    assert (tmp_path / "reserve").exists()  # using it would not help
    store._db.execute(("PRAGMA query_only = OFF",))
    store.close()


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write anywhere")
def test_a_folder_that_becomes_read_only(server: LocalServer, service: ServiceClient) -> None:
    trainer = service.create_lora_training_client("deterministic", rank=4)
    trainer.save_state("a").result()
    kind = next((server.data_dir / "checkpoints").glob("*/weights"))
    kind.chmod(0o500)
    try:
        with pytest.raises(RequestFailedError, match="make the folder writable"):
            trainer.save_state("b").result(timeout=WAIT_S)
    finally:
        kind.chmod(0o700)
    trainer.save_state("b").result(timeout=WAIT_S)
    assert listed(service) == ["weights/a", "weights/b"]


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write anywhere")
def test_no_server_starts_in_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(LocalServerError, match=r"(?s)Permission denied.*Choose a folder"):
        LocalServer(DeterministicEngine(), data_dir=tmp_path).start()


def test_a_server_that_ends_on_a_full_disk_releases_the_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = LocalServer(DeterministicEngine(), data_dir=tmp_path)
    server.start()
    with ServiceClient(base_url=server.url) as service:
        path = service.create_lora_training_client("deterministic").save_state("a").result().path
        with no_room():
            server.close()
        assert "is not in the database" in caplog.text
        with LocalServer(DeterministicEngine(), data_dir=tmp_path) as again:
            with ServiceClient(base_url=again.url) as another:
                assert listed(another) == ["weights/a"]
                another.create_training_client_from_state(path)


def test_a_session_that_expires_on_a_full_disk_is_freed_and_recorded_later(tmp_path: Path) -> None:
    clock = ManualClock()
    engine = DeterministicEngine()
    backend = Backend(engine, Store(tmp_path), clock=clock.monotonic)
    sessions = [backend.create_session({}) for _ in range(2)]
    clock.advance(100)
    with no_room():
        backend.housekeeping(clock.monotonic())
    assert not backend.has_sessions()
    backend.housekeeping(clock.monotonic())
    for session_id in sessions:
        row = backend.store.session(session_id)
        assert row is not None
        assert row.state == "expired"
    backend.store.close()


def test_ending_a_session_on_a_full_disk_can_be_repeated(tmp_path: Path) -> None:
    backend = Backend(DeterministicEngine(), Store(tmp_path))
    session_id = backend.create_session({})
    with no_room(), pytest.raises(StorageError):
        backend.finish_session(session_id, "success", None)
    backend.finish_session(session_id, "success", None)
    row = backend.store.session(session_id)
    assert row is not None
    assert row.state == "finished"
    backend.store.close()


def test_a_really_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        with LocalServer(DeterministicEngine(), data_dir=disk) as server:
            with ServiceClient(base_url=server.url) as service:
                trainer = service.create_lora_training_client("deterministic", rank=4)
                first = trainer.save_state("first").result().path
                ballast = fill(disk)
                rest = service.create_rest_client()
                with pytest.raises(RequestFailedError, match=r"No space left on device|is full"):
                    save_until_it_fails(trainer)
                trainer.train_step(DATA, "cross_entropy", ADAM)
                kept = set(listed(service))
                rest.delete_checkpoint_from_tinker_path(first).result()
                assert set(listed(service)) == kept - {"weights/first"}
                ballast.unlink()
                trainer.save_state("last").result(timeout=WAIT_S)
                for name in (listed(service)[0], "weights/last"):
                    service.create_training_client_from_state(f"tinker://{trainer.model_id}/{name}")


# Two servers


IN_USE = """
import sys
from tinkex.errors import LocalServerError
from tinkex.local import LocalServer, load_engine
try:
    LocalServer(load_engine("deterministic"), data_dir=sys.argv[1]).start()
except LocalServerError as error:
    print(error)
"""


def test_a_second_process_on_the_folder_is_refused_without_disturbing_the_first(
    tmp_path: Path,
) -> None:
    with tinkex_serve(tmp_path, model="deterministic") as url:
        with ServiceClient(base_url=url) as service:
            trainer = service.create_lora_training_client("deterministic", rank=4)
            path = trainer.save_state("a").result().path
            command = [sys.executable, "-c", IN_USE, str(tmp_path)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
            assert "is in use by another tinkex server" in done.stdout
            assert "choose another folder" in done.stdout
            trainer.train_step(DATA, "cross_entropy", ADAM)
            service.create_training_client_from_state(path)
            trainer.save_state("b").result()
            assert listed(service) == ["weights/a", "weights/b"]


def test_a_second_server_of_the_process_is_refused_without_disturbing_the_first(
    server: LocalServer, service: ServiceClient
) -> None:
    trainer = service.create_lora_training_client("deterministic", rank=4)
    path = trainer.save_state("a").result().path
    with pytest.raises(LocalServerError, match="another server of this process"):
        LocalServer(DeterministicEngine(), data_dir=server.data_dir).start()
    trainer.train_step(DATA, "cross_entropy", ADAM)
    service.create_training_client_from_state(path)
