"""Store: what the embedded server keeps on disk.  SQLite for the facts, folders for the weights.

::

    <data_dir>/tinkex.sqlite3                        sessions, runs, checkpoints, samplers, audit
    <data_dir>/checkpoints/<run>/<kind>/<name>/      one saved adapter
    <data_dir>/samplers/<n>/                         frozen weights of open samplers
    <data_dir>/reserve                               disk space for changes on a full disk

No thread of its own; thread-safe.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from tinkex.local.errors import storage_errors
from tinkex.local.state.checkpoints import Checkpoints
from tinkex.local.state.database import Database
from tinkex.local.state.folder_lock import FolderLock, folder_errors
from tinkex.local.state.rows import (
    AuditRow,
    CheckpointRow,
    RunRow,
    SamplerRow,
    SessionRow,
    audit_statement,
    dumps,
)
from tinkex.types import LoraConfig

_SAMPLER_FOLDER = re.compile("[0-9a-f]{32}")  # uuid4().hex


class Store:
    """The server's data under *data_dir*, which is created if it is missing.

    Its methods raise StorageError if something cannot be written.

    Args:
        data_dir: folder of the database and the weights.
        wall: returns seconds since the epoch.

    Attributes:
        checkpoints: the saved checkpoints.

    Raises:
        LocalServerError: the folder cannot be written, or another server uses it.
    """

    def __init__(self, data_dir: Path, *, wall: Callable[[], float] = time.time) -> None:
        self.data_dir = data_dir
        self.wall = wall
        # Guards _touched: run id -> when its last use was noted.
        self._lock = threading.Lock()
        self._touched: Dict[str, float] = {}
        self.folder_lock = FolderLock(data_dir)
        with folder_errors(data_dir), contextlib.ExitStack() as opened:
            opened.callback(self.folder_lock.release)
            data_dir.mkdir(parents=True, exist_ok=True)
            # Before anything is read: `_tidy` would end the sessions of a server that still runs.
            self.folder_lock.acquire()
            self._db = Database(data_dir)
            opened.callback(self._db.close)
            self.checkpoints = Checkpoints(data_dir, self._db, wall)
            self._tidy()
            # Everything succeeded: from here on, `close` cleans up.
            opened.pop_all()

    def close(self) -> None:
        """Close the database and release the folder."""
        # The folder last: another server may open the database as soon as it is free.
        self._db.close()
        self.folder_lock.release()

    # Sessions

    def add_session(self, session_id: str, facts: Dict[str, Any]) -> None:
        """Remember a new session; *facts* describe it."""
        self._db.change((
            "INSERT INTO sessions (session_id, created_at, state, facts, project_id) "
            "VALUES (?, ?, 'live', ?, ?)",
            session_id, self.wall(), json.dumps(facts), facts.get("project_id"),
        ))  # fmt: skip

    def end_session(
        self,
        session_id: str,
        state: str,
        reason: str,
        end_reason: Optional[str] = None,
        end_detail: Optional[str] = None,
    ) -> None:
        """Record the end of a session; only the first end counts."""
        self._db.change((
            "UPDATE sessions SET state = ?, ended_at = ?, reason = ?, end_reason = ?, "
            "end_detail = ? WHERE session_id = ? AND state = 'live'",
            state, self.wall(), reason, end_reason, end_detail, session_id,
        ))  # fmt: skip

    def set_project(self, session_id: str, project_id: str) -> None:
        """Move a session, and the runs in it, to another project."""
        sql = "UPDATE sessions SET project_id = ? WHERE session_id = ?"
        moved = {"session_id": session_id, "project_id": project_id}
        self._db.change(
            (sql, project_id, session_id),
            audit_statement(self.wall(), "projects", "session.moved", moved),
        )

    def session(self, session_id: str) -> Optional[SessionRow]:
        """Return a session, or None."""
        return self._db.first(SessionRow, "SELECT * FROM sessions WHERE session_id = ?", session_id)

    def sessions(self, limit: int, offset: int) -> List[SessionRow]:
        """Return sessions, newest first."""
        sql = "SELECT * FROM sessions ORDER BY created_at DESC, rowid DESC LIMIT ? OFFSET ?"
        return self._db.find(SessionRow, sql, limit, offset)

    def all_sessions(self) -> List[SessionRow]:
        """Return every session."""
        return self._db.find(SessionRow, "SELECT * FROM sessions")

    # Runs

    def add_run(
        self,
        run_id: str,
        session_id: str,
        base_model: str,
        lora: LoraConfig,
        optimizer: Dict[str, Any],
        user_metadata: Optional[Dict[str, Any]],
        project_id: Optional[str] = None,
    ) -> None:
        """Remember a new training run; without *project_id*, its session's project applies."""
        now = self.wall()
        self._db.change((
            "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            run_id, session_id, now, now, base_model, json.dumps(lora.to_wire()),
            json.dumps(optimizer), dumps(user_metadata), project_id,
        ))  # fmt: skip

    def drop_run(self, run_id: str) -> None:
        """Forget a run that could not be created."""
        self._db.change(("DELETE FROM runs WHERE run_id = ?", run_id))

    def run(self, run_id: str) -> Optional[RunRow]:
        """Return a run, or None."""
        return self._db.first(RunRow, "SELECT * FROM runs WHERE run_id = ?", run_id)

    def runs(
        self, limit: int, offset: int, project_id: Optional[str] = None
    ) -> Tuple[List[RunRow], int]:
        """Return a page of runs (of one project), last used first, and how many there are."""
        found = (
            # LEFT: the run of a copied checkpoint belongs to no session.
            "FROM runs LEFT JOIN sessions USING (session_id) "
            "WHERE ? IS NULL OR COALESCE(runs.project_id, sessions.project_id) = ?"
        )
        total = self._db.rows(f"SELECT COUNT(*) {found}", project_id, project_id)[0][0]
        sql = (
            f"SELECT runs.* {found} ORDER BY last_request_at DESC, runs.rowid DESC LIMIT ? OFFSET ?"
        )
        return self._db.find(RunRow, sql, project_id, project_id, limit, offset), total

    def runs_of(self, session_id: str) -> List[str]:
        """Return the ids of a session's runs, oldest first."""
        sql = "SELECT run_id FROM runs WHERE session_id = ? ORDER BY rowid"
        return [row[0] for row in self._db.rows(sql, session_id)]

    def touch_run(self, run_id: str) -> None:
        """Note that a run is in use; written at most once a second."""
        now = self.wall()
        # Every request of a run is a use: a write for each would slow down small requests.
        with self._lock:
            if now - self._touched.get(run_id, 0.0) < 1.0:
                return
            self._touched[run_id] = now
        # Outside the lock, so that callers with nothing to write do not wait for the disk.
        sql = "UPDATE runs SET last_request_at = ? WHERE run_id = ?"
        self._db.execute_if_possible(sql, now, run_id)

    # Samplers

    def add_sampler(
        self, sampler_id: str, session_id: str, base_model: str, model_path: Optional[str]
    ) -> None:
        """Remember a new sampling session."""
        self._db.change((
            "INSERT INTO samplers VALUES (?, ?, ?, ?, ?)",
            sampler_id, session_id, self.wall(), base_model, model_path,
        ))  # fmt: skip

    def sampler(self, sampler_id: str) -> Optional[SamplerRow]:
        """Return a sampling session, or None."""
        return self._db.first(SamplerRow, "SELECT * FROM samplers WHERE sampler_id = ?", sampler_id)

    def samplers_of(self, session_id: str) -> List[str]:
        """Return the ids of a session's samplers, oldest first."""
        sql = "SELECT sampler_id FROM samplers WHERE session_id = ? ORDER BY rowid"
        return [row[0] for row in self._db.rows(sql, session_id)]

    def freeze(self, checkpoint: CheckpointRow) -> Path:
        """Give a sampler its own copy of a checkpoint, which outlives the checkpoint.

        HTTPError 404 if the checkpoint is deleted at the same time.
        """
        with self.new_sampler_folder() as target:
            self.checkpoints.copy_files(checkpoint, target)
        return target

    @contextlib.contextmanager
    def new_sampler_folder(self) -> Iterator[Path]:
        """Yield an empty folder for the weights of a sampler; it is removed if the body raises."""
        folder = self.data_dir / "samplers" / uuid.uuid4().hex
        with storage_errors(self.data_dir):
            folder.mkdir(parents=True)
            try:
                yield folder
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def restore_reserve(self) -> None:
        """Create the reserve again, if it was used on a full disk and there is room for it."""
        self._db.restore_reserve()

    # The audit log

    def audit_log(self, start: float, stop: float, event_type: Optional[str]) -> List[AuditRow]:
        """Return the entries from *start* until just before *stop*, oldest first.

        *event_type* is ``"checkpoints"`` or ``"projects"``, or None for both.
        """
        sql = (
            "SELECT * FROM audit WHERE at >= ? AND at < ? AND (? IS NULL OR event_type = ?) "
            "ORDER BY at, rowid"
        )
        return self._db.find(AuditRow, sql, start, stop, event_type, event_type)

    def _tidy(self) -> None:
        """Clean up after the last server: end its sessions, remove files without a checkpoint."""
        # Only folders that a store has named: the user may keep a folder "samplers" of their own.
        for folder in (self.data_dir / "samplers").glob("*"):
            if _SAMPLER_FOLDER.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
        self.checkpoints.remove_orphans()
        sql = (
            "UPDATE sessions SET state = 'lost', ended_at = ?, "
            "reason = 'the server was restarted' WHERE state = 'live'"
        )
        # Not `change`: its StorageError is for HTTP, and `__init__` raises LocalServerErrors.
        self._db.execute((sql, self.wall()))
