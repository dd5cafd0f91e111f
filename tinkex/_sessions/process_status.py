"""The status file: what this process has in flight, for ``tinkex status`` to read.

A StatusFile belongs to the default SessionManager.  The file is first written a second after the
first session was opened, and then whenever sessions come or go, and every ten seconds.  It takes a
few hundred bytes in the user's runtime folder, never in the home folder, which may be slow or
read-only.  It is removed with the last session.  A killed process leaves its file behind; readers
recognize it by the process id and start time.  Failures to write are logged at DEBUG; if the
environment variable ``TINKEX_NO_STATUS_FILE`` is set, nothing is written.

A dedicated thread, ``tinkex-status-file``, writes and removes the file, because a disk may hang and
must delay neither heartbeats nor a close.  It runs from the first write to the last session's end.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from tinkex._runtime.clock import Clock
from tinkex._sessions.session_table import SessionSnapshot
from tinkex.futures import APIFuture

if TYPE_CHECKING:
    from tinkex._sessions.registry import SessionRegistry
    from tinkex._sessions.session_record import SessionRecord

logger = logging.getLogger(__name__)

#: Seconds from the first session to the first write.  Short scripts need no file; and if a thread
#: is busy while the main thread begins a wait, Python is more likely to delay a Ctrl-C: a signal
#: that arrives between the last check and the wait is handled only when the wait ends.
FIRST_S = 1.0

#: Seconds between two writes, unless sessions come or go.
INTERVAL_S = 10.0

OFF_VARIABLE = "TINKEX_NO_STATUS_FILE"

#: On Windows, where a process cannot be looked up by its id, a process counts as dead if it has not
#: written its file for this many seconds.
_SILENT_S = 120.0

#: Returns the unsettled futures of each session, by session id.
FindWork = Callable[[], Mapping[str, Sequence["APIFuture[Any]"]]]


@dataclasses.dataclass(frozen=True)
class SessionStatus:
    """A session and its work when the file was written; times are seconds since the epoch.

    Attributes:
        server: its host and port.
        last_success_at: when a heartbeat last succeeded, or else when the session was created.
        failures: number of heartbeats that have failed since then.
        last_error: why the last heartbeat failed, if it did.
        in_flight: number of operations that were sent and are not done, by kind.
        queued: number of operations that wait to be sent.
    """

    session_id: str
    server: str
    opened_at: float
    last_success_at: float
    failures: int
    last_error: Optional[str]
    in_flight: Dict[str, int]
    queued: int


@dataclasses.dataclass(frozen=True)
class ProcessStatus:
    """A process with open sessions.

    Attributes:
        pid: its process id.
        started: its start time, as the system reports it, to recognize a reused process id; None
            if the system does not report it.
        program: the file that it runs; its arguments are left out, as they may contain a key.
        updated_at: when the status was written, in seconds since the epoch.
        sessions: its sessions, the oldest first.
    """

    pid: int
    started: Optional[str]
    program: str
    updated_at: float
    sessions: Tuple[SessionStatus, ...]


class StatusFile:
    """Keeps the status of this process in a file.  Thread-safe; only `join` blocks.

    Args:
        registry: the sessions.
        clock: measures the intervals.
        find_work: returns the work in flight.
    """

    def __init__(self, registry: SessionRegistry, clock: Clock, find_work: FindWork) -> None:
        self._registry = registry
        self._clock = clock
        self._find_work = find_work
        self._is_off = bool(os.environ.get(OFF_VARIABLE))
        program = sys.argv[0] if sys.argv else ""
        with contextlib.suppress(OSError):  # the working folder was deleted
            program = os.path.abspath(program) if program else ""
        self._program = program or "python"
        # Set when the file must be updated.  Several updates requested during a write become one:
        # the thread reads the registry when it starts to write.
        self._outdated = threading.Event()
        # Guards the attributes below.  Never held during I/O.
        self._lock = threading.Lock()
        self._thread: Optional[threading.Thread] = None
        self._ids: List[str] = []  # the sessions at the latest update
        self._due = 0.0  # monotonic; used only while there are sessions

    def update(self) -> None:
        """Have the thread write the file if it is due, or if sessions have come or gone."""
        if self._is_off:
            return
        ids = [record.session_id for record in self._registry.records()]
        now = self._clock.monotonic()
        with self._lock:
            if ids != self._ids:
                # Without a thread, there is no file yet.
                if self._thread is not None:
                    self._due = now
                elif not self._ids:
                    self._due = now + FIRST_S
                self._ids = ids
            elif not ids:
                return
            if now < self._due or (not ids and self._thread is None):
                return
            self._due = now + INTERVAL_S
            # Under the lock, so that `_run` sees it before the thread ends.
            self._outdated.set()
            if self._thread is None:
                self._start_thread_locked()

    def next_due(self) -> Optional[float]:
        """Return when `update` should be called next (monotonic); None if there are no sessions."""
        with self._lock:
            return self._due if self._ids else None

    def join(self, deadline: float) -> None:
        """Wait until *deadline* (monotonic) for the thread, which ends when no session is left."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start_thread_locked(self) -> None:
        thread = threading.Thread(target=self._run, name="tinkex-status-file", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:  # interpreter shutdown, or too many threads: retried when next due
            self._thread = None

    def _run(self) -> None:
        """Keep the file up to date until there is no session left, then remove it."""
        while True:
            self._outdated.wait()
            self._outdated.clear()
            if self._write_or_remove():
                continue
            with self._lock:
                # A session may have been added since; its update found this thread running.
                if not self._outdated.is_set():
                    self._ids, self._thread = [], None
                    return

    def _write_or_remove(self) -> bool:
        """Write the file; if there is no session, remove it and return False.  Never raises."""
        # Decide by the records, as `update` does: the snapshots are taken later and may differ.
        records = self._registry.records()
        try:
            if records:
                self._write(self._status(records, self._registry.snapshots()))
            else:
                _file_of(os.getpid()).unlink(missing_ok=True)
        except Exception as error:
            with contextlib.suppress(Exception):  # a user's log handler may fail
                logger.debug("the status file could not be written or removed: %s", error)
        return bool(records)

    def _status(
        self, records: Sequence[SessionRecord], snapshots: Sequence[SessionSnapshot]
    ) -> ProcessStatus:
        work = self._find_work()
        servers = {record.session_id: record.host for record in records}
        # Added to a monotonic time, it gives the wall time, which other processes can compare.
        lead_s = self._clock.wall() - self._clock.monotonic()
        sessions = []
        for found in sorted(snapshots, key=lambda one: one.created):
            futures = [f for f in work.get(found.session_id, ()) if not f.in_parts]
            sent = collections.Counter(f.kind for f in futures if f.was_sent)
            session = SessionStatus(
                found.session_id,
                servers.get(found.session_id, "?"),
                found.created + lead_s,
                found.last_success + lead_s,
                found.consecutive_failures,
                found.last_error,
                dict(sent),
                len(futures) - sum(sent.values()),
            )
            sessions.append(session)
        return ProcessStatus(
            os.getpid(),
            _start_of(os.getpid()),
            self._program,
            self._clock.wall(),
            tuple(sessions),
        )

    def _write(self, status: ProcessStatus) -> None:
        folder = status_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # In a shared temporary folder, another user may have created it, e.g. as a link.
        if not _is_ours(folder):
            raise PermissionError(f"{folder} belongs to another user")
        # Replaced atomically, so that no reader finds half a file; no other thread uses this name.
        part = folder / f"{status.pid}.{threading.get_ident()}.part"
        try:
            part.write_text(json.dumps(dataclasses.asdict(status)), encoding="utf-8")
            part.replace(_file_of(status.pid))
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


def status_folder() -> Path:
    """Return the folder of the status files, in ``XDG_RUNTIME_DIR`` or the temporary folder."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "tinkex"
    user = os.getuid() if hasattr(os, "getuid") else "status"  # per-user already on Windows
    return Path(tempfile.gettempdir()) / f"tinkex-{user}"


def read_processes(now: float) -> List[ProcessStatus]:
    """Return this user's processes that have sessions; remove the files of dead processes.

    *now* is in seconds since the epoch.
    """
    folder = status_folder()
    try:
        files = sorted(folder.iterdir()) if _is_ours(folder) else []
    except OSError:
        return []
    found = []
    for file in files:
        status = _read(file) if file.suffix == ".json" else None
        pid = file.name.partition(".")[0]
        if pid.isdigit() and not _lives(int(pid), status, now):
            with contextlib.suppress(OSError):
                file.unlink()
        elif status is not None:
            found.append(status)
    return found


def _file_of(pid: int) -> Path:
    return status_folder() / f"{pid}.json"


def _is_ours(folder: Path) -> bool:
    """Return whether *folder* is a real folder of this user: anyone can create one in /tmp."""
    found = os.lstat(folder)
    is_folder = os.path.isdir(folder) and not os.path.islink(folder)
    return is_folder and (not hasattr(os, "getuid") or found.st_uid == os.getuid())


def _read(file: Path) -> Optional[ProcessStatus]:
    """Return the content of *file*; None if it cannot be read or has another version's format."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        sessions = tuple(SessionStatus(**session) for session in facts.pop("sessions"))
        return ProcessStatus(sessions=sessions, **facts)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _lives(pid: int, status: Optional[ProcessStatus], now: float) -> bool:
    """Return whether the process that wrote *status* is still running."""
    if os.name == "nt":  # os.kill would end the process
        return status is not None and now - status.updated_at < _SILENT_S
    try:
        os.kill(pid, 0)
    except OSError:  # no such process, or another user's
        return False
    # Process ids are reused: another start time means another process.
    return status is None or status.started is None or status.started == _start_of(pid)


def _start_of(pid: int) -> Optional[str]:
    """Return when a process was started, as Linux reports it; None on other systems."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # Field 22, counted from the end of field 2, the program's name, which may hold blanks
        # and ")".
        return stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
