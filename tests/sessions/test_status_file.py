"""The status file: a disk that hangs delays neither heartbeats nor a close."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from sessions.fakes import Oversleeping, hand_turned
from support.scripted_server import PATIENCE_S
from support.session_server import SessionServer
from support.threads import promptly, wait_until

from tinkex import ServiceClient
from tinkex._sessions import process_status
from tinkex._sessions.manager import SessionManager
from tinkex._sessions.process_status import read_processes


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the status file, which is written only when sessions come or go."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(process_status, "INTERVAL_S", 3600.0)
    monkeypatch.setattr(process_status, "FIRST_S", 0.0)
    return tmp_path / "tinkex"


class Disk:
    """A disk on which one operation hangs until `release`."""

    def __init__(self, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: List[str] = []
        self.entered = threading.Event()
        self.done = threading.Event()
        self._released = threading.Event()
        self.release = self._released.set
        real = getattr(Path, operation)

        def hang(path: Path, *args: Any, **kwargs: Any) -> Any:
            if path.suffix not in (".json", ".part"):
                return real(path, *args, **kwargs)
            self.threads.append(threading.current_thread().name)
            self.entered.set()
            self._released.wait(PATIENCE_S)
            try:
                return real(path, *args, **kwargs)
            finally:
                self.done.set()

        monkeypatch.setattr(Path, operation, hang)


@contextlib.contextmanager
def open_manager() -> Iterator[SessionManager]:
    manager = SessionManager(find_work=lambda: {})
    try:
        yield manager
    finally:
        manager.close()


def connect(server: SessionServer, manager: SessionManager) -> ServiceClient:
    return ServiceClient(base_url=server.url, heartbeat_interval_s=0.05, manager=manager)


def listed() -> List[str]:
    return [one.session_id for found in read_processes(time.time()) for one in found.sessions]


def test_heartbeats_and_close_are_not_delayed_while_writing_hangs(
    server: SessionServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk("write_text", monkeypatch)
    with open_manager() as manager:
        service = connect(server, manager)
        assert disk.entered.wait(PATIENCE_S)
        sent = len(server.beats())
        with promptly():
            wait_until(lambda: len(server.beats()) >= sent + 5, "five heartbeats")
        assert not disk.done.is_set()
        with promptly():
            service.close()
            manager.close(timeout_s=0.1)
        disk.release()
    assert disk.threads == ["tinkex-status-file"]
    wait_until(lambda: list(folder.iterdir()) == [], "what was written late is removed")


def test_close_is_not_delayed_while_removing_hangs(
    server: SessionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_manager() as manager, connect(server, manager):
        wait_until(lambda: listed() == ["s0"], "the file was written")
        disk = Disk("unlink", monkeypatch)
        with promptly():
            manager.close(timeout_s=0.1)
        assert disk.entered.wait(PATIENCE_S)
        assert not disk.done.is_set()
        disk.release()
    assert disk.threads == ["tinkex-status-file"]


def test_the_file_of_the_next_session_is_not_removed_with_the_last(
    server: SessionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_manager() as manager:
        service = connect(server, manager)
        wait_until(lambda: listed() == ["s0"], "the file was written")
        disk = Disk("unlink", monkeypatch)
        service.close()
        assert disk.entered.wait(PATIENCE_S)
        with connect(server, manager):
            wait_until(lambda: len(server.beats("s1")) > 2, "heartbeats of the next session")
            disk.release()
            assert disk.done.wait(PATIENCE_S)
            wait_until(lambda: listed() == ["s1"], "the file of the next session")


def status_threads() -> List[str]:
    return [t.name for t in threading.enumerate() if t.name == "tinkex-status-file"]


def test_a_session_shorter_than_a_second_writes_nothing_and_starts_no_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_status, "FIRST_S", 1.0)
    with hand_turned(find_work=dict) as bench:
        first = bench.start(heartbeat_interval_s=0.25)
        bench.iterate()
        bench.iterate(0.5)
        assert not status_threads()
        bench.manager.stop_session(first)
        bench.iterate()
        bench.take_over()
        bench.start(heartbeat_interval_s=0.25)
        bench.iterate()
        bench.iterate(0.75)
        assert not status_threads()
        assert not folder.exists()
        bench.iterate(0.25)
        wait_until(lambda: len(list(folder.glob("*.json"))) == 1, "the file was written")
        assert status_threads() == ["tinkex-status-file"]


def test_the_heartbeat_thread_wakes_for_the_first_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_status, "FIRST_S", 1.0)
    with hand_turned(find_work=dict) as bench:
        bench.start(heartbeat_interval_s=10.0)
        bench.iterate()
        began = bench.clock.monotonic()
        bench.heartbeat.inbox = Oversleeping(bench, 0.0)  # type: ignore[assignment] # a fake
        bench.heartbeat.run_once()
        assert bench.clock.monotonic() - began == 1.0
        wait_until(lambda: listed() == ["s0"], "the file was written")


def test_a_close_leaves_neither_file_nor_thread(server: SessionServer, folder: Path) -> None:
    with open_manager() as manager, connect(server, manager):
        wait_until(lambda: listed() == ["s0"], "the file was written")
        manager.close()
        assert list(folder.iterdir()) == []
        assert "tinkex-status-file" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_child_of_a_fork_leaves_its_parents_file_alone(
    server: SessionServer, folder: Path
) -> None:
    with open_manager() as manager, connect(server, manager):
        wait_until(lambda: listed() == ["s0"], "the file was written")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                manager.close()
                code = int(threading.active_count() != 1)
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert [file.name for file in folder.iterdir()] == [f"{os.getpid()}.json"]
