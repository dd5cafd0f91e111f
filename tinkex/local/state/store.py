"""What the embedded server remembers: SQLite for the facts, folders for the weights.

::

    <data_dir>/tinkex.sqlite3                        sessions, runs, checkpoints, samplers, audit
    <data_dir>/checkpoints/<run>/<kind>/<name>/      one saved adapter
    <data_dir>/samplers/<n>/                         frozen weights of living samplers
    <data_dir>/reserve                               disk space for changes on a full disk

A checkpoint is written into a temporary sibling, renamed, and exists once its row is committed;
what a crash leaves behind without a row is removed at the next start.  No thread of its own;
thread-safe.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Type, TypeVar

from tinkex.local.errors import HTTPError
from tinkex.local.state.database import Database, Statement, is_without_room
from tinkex.local.state.folder_lock import FolderLock, folder_errors
from tinkex.local.state.rows import (
    AuditRow,
    CheckpointRow,
    RunRow,
    SamplerRow,
    SessionRow,
    dumps,
    read_row,
    timestamp,
)
from tinkex.local.state.storage_error import storage_errors
from tinkex.types import LoraConfig
from tinkex.types.checkpoint_path import KINDS

R = TypeVar("R")

#: Checkpoint type -> path segment.
KIND_OF = {checkpoint_type: kind for kind, checkpoint_type in KINDS.items()}

_SAMPLER_FOLDER = re.compile("[0-9a-f]{32}")  # uuid4().hex

_KEY = "run_id = ? AND kind = ? AND name = ?"
_UNEXPIRED = "(checkpoints.expires_at IS NULL OR checkpoints.expires_at > ?)"
_ONE_CHECKPOINT = f"SELECT * FROM checkpoints WHERE {_KEY}"
_NEWEST_FIRST = "ORDER BY checkpoints.created_at DESC, checkpoints.rowid DESC"


class Store:
    """The server's memory under *data_dir*, which is created if it is missing.

    Args:
        data_dir: folder of the database and the weights.
        in_memory: keep the facts in memory; the weights still need the folder.
        wall: seconds since the epoch.

    Raises:
        LocalServerError: the folder cannot be written, or another server uses it.
    """

    def __init__(
        self, data_dir: Path, *, in_memory: bool = False, wall: Callable[[], float] = time.time
    ) -> None:
        self.data_dir = data_dir
        self.wall = wall
        self._touched: Dict[str, float] = {}
        # Guards _touched.
        self._lock = threading.Lock()
        self.folder_lock = FolderLock(data_dir)
        with folder_errors(data_dir), contextlib.ExitStack() as opened:
            opened.callback(self.folder_lock.release)
            data_dir.mkdir(parents=True, exist_ok=True)
            self.folder_lock.acquire()
            self._db = Database(data_dir, in_memory=in_memory)
            opened.callback(self._db.close)
            self._tidy(remove_orphans=not in_memory)
            opened.pop_all()

    def close(self) -> None:
        """Close the database and release the folder."""
        self._db.close()
        self.folder_lock.release()

    # Sessions

    def add_session(self, session_id: str, facts: Dict[str, Any]) -> None:
        """Remember a new session; *facts* describe it."""
        self._change(
            "INSERT INTO sessions (session_id, created_at, state, facts, project_id) "
            "VALUES (?, ?, 'live', ?, ?)",
            session_id, self.wall(), json.dumps(facts), facts.get("project_id"),
        )  # fmt: skip

    def end_session(
        self,
        session_id: str,
        state: str,
        reason: str,
        end_reason: Optional[str] = None,
        end_detail: Optional[str] = None,
    ) -> None:
        """Note that a session ended; only the first end counts."""
        self._change(
            "UPDATE sessions SET state = ?, ended_at = ?, reason = ?, end_reason = ?, "
            "end_detail = ? WHERE session_id = ? AND state = 'live'",
            state, self.wall(), reason, end_reason, end_detail, session_id,
        )  # fmt: skip

    def set_project(self, session_id: str, project_id: str) -> None:
        """Move a session, and the runs in it, to another project."""
        sql = "UPDATE sessions SET project_id = ? WHERE session_id = ?"
        moved = {"session_id": session_id, "project_id": project_id}
        self._change_all(
            (sql, project_id, session_id),
            self._audited("projects", "session.moved", None, None, moved),
        )

    def session(self, session_id: str) -> Optional[SessionRow]:
        """Return a session, or None."""
        return self._first(SessionRow, "SELECT * FROM sessions WHERE session_id = ?", session_id)

    def sessions(self, limit: int, offset: int) -> List[SessionRow]:
        """Return sessions, newest first."""
        sql = "SELECT * FROM sessions ORDER BY created_at DESC, rowid DESC LIMIT ? OFFSET ?"
        return self._find(SessionRow, sql, limit, offset)

    def all_sessions(self) -> List[SessionRow]:
        """Return every session."""
        return self._find(SessionRow, "SELECT * FROM sessions")

    def checkpoint_totals(self, session_id: str) -> Tuple[int, int]:
        """Return how many checkpoints the runs of a session have, and their bytes."""
        sql = (
            "SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM checkpoints JOIN runs "
            f"USING (run_id) WHERE session_id = ? AND {_UNEXPIRED}"
        )
        count, size = self._db.rows(sql, session_id, self.wall())[0]
        return int(count), int(size)

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
        """Remember a new training run; without a project of its own it is in its session's."""
        now = self.wall()
        self._change(
            "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            run_id, session_id, now, now, base_model, json.dumps(lora.to_wire()),
            json.dumps(optimizer), dumps(user_metadata), project_id,
        )  # fmt: skip

    def drop_run(self, run_id: str) -> None:
        """Forget a run that could not be created."""
        self._change("DELETE FROM runs WHERE run_id = ?", run_id)

    def run(self, run_id: str) -> Optional[RunRow]:
        """Return a run, or None."""
        return self._first(RunRow, "SELECT * FROM runs WHERE run_id = ?", run_id)

    def runs(
        self, limit: int, offset: int, project_id: Optional[str] = None
    ) -> Tuple[List[RunRow], int]:
        """Return a page of runs (of one project), last used first, and how many there are."""
        found = (
            "FROM runs LEFT JOIN sessions USING (session_id) "
            "WHERE ? IS NULL OR COALESCE(runs.project_id, sessions.project_id) = ?"
        )
        total = self._db.rows(f"SELECT COUNT(*) {found}", project_id, project_id)[0][0]
        sql = (
            f"SELECT runs.* {found} ORDER BY last_request_at DESC, runs.rowid DESC LIMIT ? OFFSET ?"
        )
        return self._find(RunRow, sql, project_id, project_id, limit, offset), total

    def runs_of(self, session_id: str) -> List[str]:
        """Return the ids of a session's runs, oldest first."""
        sql = "SELECT run_id FROM runs WHERE session_id = ? ORDER BY rowid"
        return [row[0] for row in self._db.rows(sql, session_id)]

    def touch_run(self, run_id: str) -> None:
        """Note that a run is in use, at most once a second."""
        now = self.wall()
        with self._lock:
            if now - self._touched.get(run_id, 0.0) < 1.0:
                return
            self._touched[run_id] = now
        sql = "UPDATE runs SET last_request_at = ? WHERE run_id = ?"
        self._db.execute_if_possible(sql, now, run_id)

    # Samplers

    def add_sampler(
        self, sampler_id: str, session_id: str, base_model: str, model_path: Optional[str]
    ) -> None:
        """Remember a new sampling session."""
        self._change(
            "INSERT INTO samplers VALUES (?, ?, ?, ?, ?)",
            sampler_id, session_id, self.wall(), base_model, model_path,
        )  # fmt: skip

    def sampler(self, sampler_id: str) -> Optional[SamplerRow]:
        """Return a sampling session, or None."""
        return self._first(SamplerRow, "SELECT * FROM samplers WHERE sampler_id = ?", sampler_id)

    def samplers_of(self, session_id: str) -> List[str]:
        """Return the ids of a session's samplers, oldest first."""
        sql = "SELECT sampler_id FROM samplers WHERE session_id = ? ORDER BY rowid"
        return [row[0] for row in self._db.rows(sql, session_id)]

    def freeze(self, checkpoint: CheckpointRow) -> Path:
        """Give a sampler its own copy of a checkpoint, which outlives the checkpoint.

        HTTPError 404 if the checkpoint is deleted at the same time.
        """
        with self.new_sampler_folder() as target:
            self.copy_files(checkpoint, target)
        return target

    def copy_files(self, checkpoint: CheckpointRow, target: Path) -> None:
        """Put the files of a checkpoint into the folder *target*.

        They are hard links where the file system has them: no saved file is ever changed.
        HTTPError 404 if the checkpoint is deleted at the same time.
        """
        source = self.folder_of(checkpoint)
        with storage_errors(self.data_dir):
            try:
                shutil.copytree(source, target, copy_function=_link_or_copy, dirs_exist_ok=True)
            except OSError as error:
                if source.exists():
                    raise
                raise self.missing_files(checkpoint) from error

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

    # Checkpoints

    @contextlib.contextmanager
    def saving(
        self,
        run_id: str,
        kind: str,
        name: str,
        *,
        overwrite: bool,
        ttl_s: Optional[float],
        user_metadata: Optional[Dict[str, Any]],
    ) -> Iterator[Path]:
        """Save a checkpoint: yield an empty folder; its content is the checkpoint afterwards.

        Nothing is left behind if the body raises.  Raises HTTPError (409) if the name is taken and
        *overwrite* is not set.
        """
        self.check_name_free(run_id, kind, name, overwrite)
        with storage_errors(self.data_dir):
            parent = self._run_folder(run_id) / kind
            parent.mkdir(parents=True, exist_ok=True)
            written = parent / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
            written.mkdir()
            try:
                yield written
                size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
                written = written.rename(_free_sibling(parent, name))
                now = self.wall()
                row = CheckpointRow(
                    run_id, kind, name, now, str(written.relative_to(self.data_dir)), size, False,
                    None if ttl_s is None else now + ttl_s, user_metadata,
                )  # fmt: skip
                replaced = self._add_checkpoint(row)
            except BaseException:
                shutil.rmtree(written, ignore_errors=True)
                raise
        if replaced is not None:
            shutil.rmtree(self.folder_of(replaced), ignore_errors=True)

    def _add_checkpoint(self, row: CheckpointRow) -> Optional[CheckpointRow]:
        """Add the row of a checkpoint; return the one that had its name."""
        replaced = self._first(CheckpointRow, _ONE_CHECKPOINT, *row.key)
        event = "checkpoint.overwritten" if replaced else "checkpoint.created"
        expires_at = _timestamp(row.expires_at)
        self._change_all(
            ("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?)",
             *row.key, row.created_at, row.folder, row.size_bytes, row.expires_at,
             dumps(row.user_metadata)),
            self._audited_checkpoint(
                row, event, size_bytes=row.size_bytes, expires_at=expires_at
            ),
        )  # fmt: skip
        return replaced

    def check_name_free(self, run_id: str, kind: str, name: str, overwrite: bool) -> None:
        """Raise HTTPError (409) if the checkpoint exists and must not be overwritten."""
        if not overwrite and self.checkpoint(run_id, kind, name) is not None:
            raise HTTPError(
                409,
                f"checkpoint {kind}/{name} of {run_id} exists; choose another name, delete it, "
                "or save with overwrite=true",
            )

    def checkpoint(self, run_id: str, kind: str, name: str) -> Optional[CheckpointRow]:
        """Return a checkpoint, or None; an expired one counts as gone."""
        sql = f"{_ONE_CHECKPOINT} AND {_UNEXPIRED}"
        return self._first(CheckpointRow, sql, run_id, kind, name, self.wall())

    def checkpoints_of(self, run_id: str) -> List[CheckpointRow]:
        """Return a run's checkpoints, newest first."""
        sql = f"SELECT * FROM checkpoints WHERE run_id = ? AND {_UNEXPIRED} {_NEWEST_FIRST}"
        return self._find(CheckpointRow, sql, run_id, self.wall())

    def last_checkpoint(self, run_id: str, kind: str) -> Optional[CheckpointRow]:
        """Return a run's newest checkpoint of *kind*, or None."""
        sql = (
            f"SELECT * FROM checkpoints WHERE run_id = ? AND kind = ? AND {_UNEXPIRED} "
            f"{_NEWEST_FIRST} LIMIT 1"
        )
        return self._first(CheckpointRow, sql, run_id, kind, self.wall())

    def checkpoints(self, limit: int, offset: int) -> Tuple[List[CheckpointRow], int]:
        """Return a page of all checkpoints, newest first, and how many there are."""
        now = self.wall()
        total = self._db.rows(f"SELECT COUNT(*) FROM checkpoints WHERE {_UNEXPIRED}", now)[0][0]
        # The inner query reads the index alone: rows that *offset* leaves out are not read.
        page = f"SELECT rowid FROM checkpoints WHERE {_UNEXPIRED} {_NEWEST_FIRST} LIMIT ? OFFSET ?"
        sql = f"SELECT * FROM checkpoints WHERE rowid IN ({page}) {_NEWEST_FIRST}"
        return self._find(CheckpointRow, sql, now, limit, offset), total

    def folder_of(self, checkpoint: CheckpointRow) -> Path:
        """Return the folder that holds a checkpoint's files."""
        return self.data_dir / checkpoint.folder

    def missing_files(self, checkpoint: CheckpointRow) -> HTTPError:
        """Make the error for a checkpoint whose folder is not there."""
        current = self.checkpoint(checkpoint.run_id, checkpoint.kind, checkpoint.name)
        if current is None or current.folder != checkpoint.folder:
            return HTTPError(404, f"{checkpoint.tinker_path} was deleted just now")
        return HTTPError(
            404,
            f"the files of {checkpoint.tinker_path} are missing: there is no folder "
            f"{self.folder_of(checkpoint)}",
        )

    def delete_checkpoint(
        self, checkpoint: CheckpointRow, event: str = "checkpoint.deleted"
    ) -> None:
        """Forget a checkpoint and remove its files; the audit log has it as *event*.

        Works on a full disk, too.
        """
        forget = (
            (f"DELETE FROM checkpoints WHERE {_KEY} AND folder = ?",
             *checkpoint.key, checkpoint.folder),
            self._audited_checkpoint(checkpoint, event),
        )  # fmt: skip
        with storage_errors(self.data_dir):
            try:
                self._db.change(*forget)
            except sqlite3.OperationalError as error:
                if not is_without_room(error):
                    raise
                # The reserve is used up: the files go first, to make room. Otherwise they go last,
                # since without its row a folder is removed at the next start.
                shutil.rmtree(self.folder_of(checkpoint), ignore_errors=True)
                self._db.change(*forget)
        shutil.rmtree(self.folder_of(checkpoint), ignore_errors=True)

    def set_public(self, checkpoint: CheckpointRow, public: bool) -> None:
        """Mark a checkpoint as published or not."""
        event = "checkpoint.published" if public else "checkpoint.unpublished"
        self._change_all(
            (f"UPDATE checkpoints SET public = ? WHERE {_KEY}", int(public), *checkpoint.key),
            self._audited_checkpoint(checkpoint, event),
        )

    def set_ttl(self, checkpoint: CheckpointRow, ttl_s: Optional[float]) -> None:
        """Have a checkpoint expire *ttl_s* from now; None keeps it."""
        expires_at = None if ttl_s is None else self.wall() + ttl_s
        changed = {"expires_at": _timestamp(expires_at)}
        self._change_all(
            (f"UPDATE checkpoints SET expires_at = ? WHERE {_KEY}", expires_at, *checkpoint.key),
            self._audited_checkpoint(checkpoint, "checkpoint.ttl_changed", **changed),
        )

    def drop_expired_checkpoints(self) -> None:
        """Delete the checkpoints whose time has come."""
        sql = "SELECT * FROM checkpoints WHERE expires_at <= ?"
        for row in self._find(CheckpointRow, sql, self.wall()):
            self.delete_checkpoint(row, "checkpoint.expired")

    def restore_reserve(self) -> None:
        """Keep room on the disk for changes again, after some was used on a full disk."""
        self._db.restore_reserve()

    # The audit log

    def audit_log(self, start: float, stop: float, event_type: Optional[str]) -> List[AuditRow]:
        """Return what was done from *start* until just before *stop*, oldest first.

        *event_type* is ``"checkpoints"`` or ``"projects"``, or None for both.
        """
        sql = (
            "SELECT * FROM audit WHERE at >= ? AND at < ? AND (? IS NULL OR event_type = ?) "
            "ORDER BY at, rowid"
        )
        return self._find(AuditRow, sql, start, stop, event_type, event_type)

    def _audited_checkpoint(
        self, checkpoint: CheckpointRow, event: str, **details: Any
    ) -> Statement:
        details = {"checkpoint_type": KINDS[checkpoint.kind], **details}
        run_id, path = checkpoint.run_id, checkpoint.tinker_path
        return self._audited("checkpoints", event, run_id, path, details)

    def _audited(
        self,
        event_type: str,
        event: str,
        run_id: Optional[str],
        tinker_path: Optional[str],
        details: Dict[str, Any],
    ) -> Statement:
        """Return what adds a line to the audit log: together with the change, or not at all."""
        return (
            "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?)",
            self.wall(), event_type, event, json.dumps(details), run_id, tinker_path,
        )  # fmt: skip

    # Below

    def _change(self, sql: str, *values: Any) -> None:
        self._change_all((sql, *values))

    def _change_all(self, *statements: Statement) -> None:
        with storage_errors(self.data_dir):
            self._db.change(*statements)

    def _find(self, kind: Type[R], sql: str, *values: Any) -> List[R]:
        return [read_row(kind, row) for row in self._db.rows(sql, *values)]

    def _first(self, kind: Type[R], sql: str, *values: Any) -> Optional[R]:
        found = self._find(kind, sql, *values)
        return found[0] if found else None

    def _tidy(self, *, remove_orphans: bool) -> None:
        """After a restart: no session lives, and no weights are kept without their row.

        Only folders that a store has named are removed: the data directory may be one in which the
        user keeps a folder "samplers" or "checkpoints", too.
        """
        for folder in (self.data_dir / "samplers").glob("*"):
            if _SAMPLER_FOLDER.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
        if remove_orphans:
            known = {row["folder"] for row in self._db.rows("SELECT folder FROM checkpoints")}
            for run in self._db.rows("SELECT run_id FROM runs"):
                for folder in self._run_folder(run["run_id"]).glob("*/*"):
                    if str(folder.relative_to(self.data_dir)) not in known:
                        shutil.rmtree(folder, ignore_errors=True)
        self._db.execute(
            "UPDATE sessions SET state = 'lost', ended_at = ?, "
            "reason = 'the server was restarted' WHERE state = 'live'",
            self.wall(),
        )

    def _run_folder(self, run_id: str) -> Path:
        return self.data_dir / "checkpoints" / _folder_name(run_id)


def _timestamp(seconds: Optional[float]) -> Optional[str]:
    return None if seconds is None else timestamp(seconds)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _folder_name(run_id: str) -> str:
    return run_id.replace(":", "_")  # Windows takes no colons


def _free_sibling(parent: Path, name: str) -> Path:
    """Return *name*, or *name~2* and so on while an older version stands there."""
    candidate, version = parent / name, 1
    while candidate.exists():
        version += 1
        candidate = parent / f"{name}~{version}"
    return candidate
