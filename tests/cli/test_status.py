"""``tinkex status``: the work that clients have in flight, and run folders."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from support.programs import Server, run, started, tinkex
from support.scripted_server import Answer
from support.session_server import BEAT, SessionServer
from support.threads import wait_until

from tinkex import ServiceClient, types
from tinkex._sessions import process_status
from tinkex._sessions.process_status import read_processes, status_folder

PROMPT = types.ModelInput.from_ints([1])

HOLD_A_SESSION = """
import sys, time
import tinkex
from tinkex._sessions import process_status
process_status.FIRST_S = 0.0
service = tinkex.ServiceClient(base_url=sys.argv[1], heartbeat_interval_s=0.05)
print("open", flush=True)
if "stay" in sys.argv:
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A folder for the status files of the tests alone."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(process_status, "FIRST_S", 0.0)
    return tmp_path / "tinkex"


@pytest.fixture
def scripted() -> Iterator[SessionServer]:
    with SessionServer() as server:
        yield server


@pytest.fixture
def often(monkeypatch):
    """Have the status file written at each heartbeat."""
    monkeypatch.setattr(process_status, "INTERVAL_S", 0.0)


def open_service(server: SessionServer, **settings: Any) -> ServiceClient:
    return ServiceClient(base_url=server.url, heartbeat_interval_s=0.05, **settings)


def listed() -> List[Any]:
    done = tinkex("status", "-f", "json")
    assert (done.returncode, done.stderr) == (0, "")
    found: List[Any] = json.loads(done.stdout)["processes"]
    return found


def wait_for(condition: Any, what: str) -> Any:
    """Wait until *condition* holds for the only session listed; return that session."""
    found: List[Any] = []

    def holds() -> bool:
        found[:] = [session for process in listed() for session in process["sessions"]]
        return len(found) == 1 and condition(found[0])

    wait_until(holds, what)
    return found[0]


def test_without_clients_the_list_is_empty(folder):
    assert listed() == []
    assert tinkex("status").stdout.startswith("0 sessions of 0 processes\n")
    assert not folder.exists(), "looking creates nothing"


def test_a_session_and_its_work_are_shown_until_they_end(scripted, often, folder):
    hold = threading.Event()
    scripted.serve_work(hold)
    with open_service(scripted) as service:
        sampler = service.create_sampling_client(base_model="m")
        futures = [sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=1)) for _ in range(3)]
        session = wait_for(lambda found: found["in_flight"] == {"sample": 3}, "3 samples")
        assert session["session_id"] == service.session_id
        assert session["server"] == f"127.0.0.1:{scripted.port}"
        assert (session["failures"], session["queued"]) == (0, 0)
        assert 0 <= time.time() - session["opened_at"] < 600
        table = tinkex("status").stdout
        assert table.startswith("1 session of 1 process\n")
        assert service.session_id in table
        assert f"{os.getpid()}  " in table
        assert "3 sample" in table
        hold.set()
        for future in futures:
            future.result()
        wait_for(lambda found: found["in_flight"] == {}, "the samples are done")
    wait_until(lambda: listed() == [], "the session is gone")
    assert list(folder.iterdir()) == []


def test_failing_heartbeats_are_shown(scripted, often):
    with open_service(scripted) as service:
        scripted.on(BEAT, Answer(500, {"detail": "on fire"}))
        session = wait_for(lambda found: found["failures"] > 0, "a failed heartbeat")
        assert session["session_id"] == service.session_id
        assert "500" in session["last_error"]
        assert "failing for" in tinkex("status").stdout


def test_other_processes_are_shown_and_leave_no_files_behind(scripted, folder):
    script = ["-c", HOLD_A_SESSION, scripted.url]
    assert run(script).stdout == "open\n"
    assert list(folder.glob("*")) == []
    with started([*script, "stay"]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        wait_for(lambda found: found["session_id"] == "s1", "the other process's session")
        assert listed()[0]["pid"] == process.pid
        process.kill()
        process.wait()
        assert listed() == []
        assert list(folder.iterdir()) == [], "the file of the dead process was removed"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_reused_process_id_is_taken_for_another_process(scripted, folder):
    with open_service(scripted):
        wait_until(lambda: len(read_processes(0.0)) == 1, "the file was written")
        (file,) = folder.iterdir()
        facts = json.loads(file.read_text())
        facts["started"] = "1"
        other = folder / f"{os.getppid()}.json"
        other.write_text(json.dumps({**facts, "pid": os.getppid()}))
        assert [found.pid for found in read_processes(0.0)] == [os.getpid()]
        assert not other.exists()


def test_other_files_in_the_status_folder_do_no_harm(scripted, folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / f"{os.getpid()}.json").write_text('{"pid": 1')
    (folder / "999999999.123.part").write_text("{")
    assert listed() == []
    assert {file.name for file in folder.iterdir()} == {"notes.txt", f"{os.getpid()}.json"}


def test_the_variable_switches_the_file_off(scripted, folder, monkeypatch):
    monkeypatch.setenv("TINKEX_NO_STATUS_FILE", "1")
    assert run(["-c", HOLD_A_SESSION, scripted.url]).stdout == "open\n"
    assert not folder.exists()


@pytest.mark.parametrize("place", ["a file", "a link"])
def test_a_folder_that_cannot_be_used_is_no_error(scripted, folder, tmp_path, place):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if place == "a file":
        folder.write_text("")
    else:
        folder.symlink_to(elsewhere)
    done = run(["-c", HOLD_A_SESSION, scripted.url])
    assert (done.returncode, done.stdout, done.stderr) == (0, "open\n", "")
    assert list(elsewhere.iterdir()) == []
    assert listed() == []


def test_without_a_runtime_folder_the_folder_for_temporary_files_is_used(monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", "/somewhere")
    assert str(status_folder()).startswith("/somewhere/tinkex-")


def test_a_process_that_has_long_been_silent_gets_a_remark(scripted, folder):
    with open_service(scripted):
        wait_until(lambda: len(read_processes(0.0)) == 1, "the file was written")
        (file,) = folder.iterdir()
        (found,) = read_processes(0.0)
        stale = dataclasses.replace(found, updated_at=time.time() - 300)
        file.write_text(json.dumps(dataclasses.asdict(stale)))
        assert "5 min (suspended or busy?)" in tinkex("status").stdout


def test_run_folders_are_read_from_their_journals(server: Server, tmp_path):
    folder = str(tmp_path / "runs" / "first")
    datum = types.Datum(PROMPT, {"target_tokens": [2], "weights": [1.0]})
    with (
        ServiceClient(base_url=server.url) as service,
        service.open_run(folder, base_model=server.model, rank=4) as training,
    ):
        for step in training.pipeline([[datum]] * 2, "cross_entropy", types.AdamParams()):
            assert step.result is not None
    done = tinkex("status", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1 run\n")
    assert folder in done.stdout
    (facts,) = json.loads(tinkex("status", folder, "-f", "json").stdout)["runs"]
    assert (facts["folder"], facts["steps"], facts["checkpoint_steps"]) == (folder, 2, 2)
    assert facts["checkpoint"] in done.stdout
    assert facts["base_model"] == server.model


def test_a_folder_without_a_run_is_one_clear_error(tmp_path):
    done = tinkex("status", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
