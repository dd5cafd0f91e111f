"""The server of a run folder is found again through the run's journal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Optional

import pytest
from support.disks import no_room

from tinkex import AdamParams, ServiceClient, read_run
from tinkex.errors import LocalServerError, RunFolderError
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.recipes import find_sampler, open_service, server_of
from tinkex.recipes.serving import EMBEDDED, start_server
from tinkex.types import Datum, ModelInput

DATA = [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})]


def train(service: ServiceClient, folder: Path) -> str:
    with service.open_run(folder, "deterministic", rank=4) as run:
        for step in run.steps([DATA]):
            run.trainer.train_step(step.batch, "cross_entropy", AdamParams())
        return run.save_for_sampler()


def train_locally(folder: Path, data_dir: Optional[Path]) -> str:
    given = None if data_dir is None else str(data_dir)
    with ServiceClient.local("deterministic", data_dir=given) as service:
        return train(service, folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_an_embedded_server_is_started_again_with_its_model_and_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = train_locally(folder, Path("data"))
    monkeypatch.chdir("/")
    assert server_of(folder) == EMBEDDED
    service, record = open_service(folder)
    with service:
        assert find_sampler(service, record) == path
        service.create_sampling_client(model_path=path)
    assert record.server is not None
    assert (record.server.model, record.server.data_dir) == (
        "deterministic",
        str(tmp_path / "data"),
    )


def test_an_embedded_server_that_stored_nothing_is_an_error(folder: Path) -> None:
    train_locally(folder, None)
    with pytest.raises(RunFolderError, match="was started without a data_dir") as caught:
        open_service(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.hint is not None
    assert "data_dir=..." in caught.value.hint


def test_the_error_about_continuing_a_run_without_a_data_dir_gives_the_reason(folder: Path) -> None:
    train_locally(folder, None)
    with (
        ServiceClient.local("deterministic") as service,
        pytest.raises(RunFolderError, match="which had no data_dir") as error,
    ):
        service.open_run(folder, "deterministic", rank=4)
    assert "data_dir=...)" in str(error.value.hint)


def test_data_in_the_run_folder_are_found_after_the_folder_was_moved(folder: Path) -> None:
    path = train_locally(folder, folder / "server")
    moved = folder.rename(folder.with_name("moved"))
    server = read_run(moved).server
    assert server is not None
    assert server.data_dir == str(moved / "server")
    service, record = open_service(moved)
    with service:
        assert find_sampler(service, record) == path


@pytest.mark.parametrize(("named", "base_url"), [("embedded", None), ("http://h:1", "http://h:1")])
def test_an_older_folder_names_its_server_only_in_its_settings(
    folder: Path, named: str, base_url: Optional[str]
) -> None:
    folder.mkdir()
    lines = [
        {
            "kind": "config",
            "at": 1.0,
            "format": 1,
            "spec": {"base_model": "m"},
            "config": {"server": named},
        },
        {"kind": "start", "at": 1.0, "model_id": "a", "session_id": "s", "steps": 0, "path": None},
    ]
    (folder / "journal.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    server = read_run(folder).server
    assert server is not None
    assert server.base_url == base_url
    assert server.data_dir == (None if base_url else str(folder / "server"))
    assert server_of(folder) == named


def test_missing_data_are_an_error(folder: Path, tmp_path: Path) -> None:
    train_locally(folder, tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(RunFolderError, match=f"kept its data in {tmp_path / 'data'}, which is"):
        open_service(folder)
    assert not (tmp_path / "data").exists()


def test_another_server_is_found_by_its_url(folder: Path, tmp_path: Path) -> None:
    with LocalServer(DeterministicEngine(), data_dir=tmp_path / "data") as server:
        with ServiceClient(base_url=server.url) as service:
            path = train(service, folder)
        assert server_of(folder) == server.url
        service, record = open_service(folder)
        with service:
            assert find_sampler(service, record) == path


def test_a_run_that_was_continued_elsewhere_is_found_there(folder: Path, tmp_path: Path) -> None:
    train_locally(folder, tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "moved")
    train_locally(folder, tmp_path / "moved")
    server = read_run(folder).server
    assert server is not None
    assert server.data_dir == str(tmp_path / "moved")


def test_the_error_names_other_data_that_are_in_use(folder: Path, tmp_path: Path) -> None:
    data, other = tmp_path / "data", folder.with_name("other")
    for run in (folder, other):
        train_locally(run, data)
    service, _ = open_service(folder)
    with service, pytest.raises(LocalServerError) as error:
        open_service(other)
    assert str(data) in str(error.value)
    assert str(other) not in str(error.value), "that one is not in use"


def test_a_run_whose_server_is_running_is_in_use(folder: Path) -> None:
    train_locally(folder, folder / "server")
    service, _ = open_service(folder)
    with service:
        with pytest.raises(RunFolderError, match="in use: its embedded server is running") as error:
            open_service(folder)
        assert str(folder) in str(error.value)
        assert "data_dir" not in str(error.value)


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.write_text("")
    with pytest.raises(RunFolderError, match=f"cannot use the run folder {folder}"):
        start_server(folder, "deterministic")


def test_a_full_disk(folder: Path) -> None:
    folder.mkdir()
    (folder / "server").mkdir()
    with (
        no_room(),
        pytest.raises(RunFolderError, match=f"cannot use the run folder {folder}: ") as e,
    ):
        start_server(folder, "deterministic")
    assert "data_dir" not in str(e.value)


def test_an_unavailable_model_is_not_an_error_of_the_folder(folder: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(LocalServerError, match="nosuch"):
        start_server(folder, "nosuch")
