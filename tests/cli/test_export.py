"""``tinkex export``: the errors when there is nothing to export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.programs import Server, tinkex

import tinkex as library
from tinkex.export import export_model


@pytest.fixture
def saved(server: Server) -> str:
    with library.ServiceClient(base_url=server.url) as service:
        trainer = service.create_lora_training_client(server.model, rank=4)
        return trainer.save_weights_for_sampler("first").result().path


def test_a_missing_checkpoint_is_reported_with_the_command_that_lists_the_others(
    server: Server, saved: str, tmp_path: Path
) -> None:
    gone = saved.replace("first", "second")
    command = ["export", gone, "--to", str(tmp_path / "out"), "--base-url", server.url]
    code, out, err = tinkex(*command)
    assert (code, out) == (1, "")
    assert f"there is no checkpoint {gone}" in err
    assert "`tinkex checkpoint list`" in err
    assert list(tmp_path.glob("*out*")) == []


def test_an_unreachable_server_is_named(tmp_path: Path) -> None:
    path = "tinker://00000000-0000-0000-0000-000000000000:train:0/weights/first"
    command = ["export", path, "--to", str(tmp_path / "out"), "--base-url", "http://127.0.0.1:9"]
    code, out, err = tinkex(*command)
    assert (code, out) == (1, "")
    assert err.startswith("Error: cannot reach 127.0.0.1:9 ")
    assert "Is the server running at http://127.0.0.1:9, and --base-url right?" in err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    command = ["export", "tinker://a:train:0/weights/b", "--to", str(tmp_path)]
    code, _, err = tinkex(*command, "--base-url", "http://127.0.0.1:9")
    assert code == 1
    assert err == (
        f"Error: {tmp_path} exists already, and is not empty\n  Choose another folder.\n"
    )


def test_a_base_url_is_refused_if_it_would_not_be_used(tmp_path: Path) -> None:
    command = ["export", str(tmp_path), "--to", str(tmp_path / "out")]
    code, _, err = tinkex(*command, "--base-url", "http://127.0.0.1:9")
    assert code == 2
    assert "--base-url is for a tinker:// path" in err


def test_a_folder_that_is_neither_a_run_nor_an_adapter_is_refused(tmp_path: Path) -> None:
    code, _, err = tinkex("export", str(tmp_path), "--to", str(tmp_path / "out"))
    assert code == 1
    assert err == (
        f"Error: {tmp_path} holds neither a run (journal.jsonl) nor an adapter "
        "(adapter_config.json)\n"
        "  Give the folder of `tinkex train --out`, once a step is saved in it.\n"
    )
    code, _, err = tinkex("export", "nofolder", "--to", str(tmp_path / "out"))
    assert code == 1
    assert "; there is no such file or folder\n" in err


def test_a_run_whose_server_is_down_is_an_error_with_advice(tmp_path: Path) -> None:
    spec = {"base_model": "deterministic"}
    config = {"kind": "config", "spec": spec, "config": {"server": "http://127.0.0.1:9"}}
    (tmp_path / "journal.jsonl").write_text(json.dumps(config) + "\n")
    code, _, err = tinkex("export", str(tmp_path), "--to", str(tmp_path / "out"))
    assert code == 1
    assert err.startswith("Error: cannot reach 127.0.0.1:9 ")
    assert err.endswith("\n  The run was trained on this server. Is it running?\n")


def test_an_interrupted_export_leaves_nothing_behind(
    server: Server, saved: str, tmp_path: Path
) -> None:
    def interrupt(done: int, total: object) -> None:
        raise KeyboardInterrupt

    with library.RestClient(base_url=server.url) as rest:
        with pytest.raises(KeyboardInterrupt):
            export_model(saved, tmp_path / "runs" / "out", rest=rest, progress=interrupt)
    assert list((tmp_path / "runs").iterdir()) == []
