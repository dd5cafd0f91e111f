"""What the embedded server remembers: SQLite for the facts, folders for the weights.

::

    <data_dir>/tinkex.sqlite3                        sessions, runs, checkpoints, samplers
    <data_dir>/checkpoints/<run>/<kind>/<name>/      one saved adapter
    <data_dir>/samplers/<n>/                         frozen weights of living samplers

A checkpoint is written into a temporary sibling, renamed, and exists once its row is committed;
what a crash leaves behind without a row is removed at the next start.  No thread of its own;
thread-safe: one connection behind one lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from tinkex.errors import LocalServerError
from tinkex.local.problems import Problem
from tinkex.types import LoraConfig
from tinkex.types.checkpoint_path import KINDS

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    session_id TEXT PRIMARY KEY, created_at REAL NOT NULL, state TEXT NOT NULL,
    facts TEXT NOT NULL, ended_at REAL, reason TEXT);
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, created_at REAL NOT NULL,
    last_request_at REAL NOT NULL, base_model TEXT NOT NULL, lora TEXT NOT NULL,
    optimizer TEXT NOT NULL, user_metadata TEXT);
CREATE TABLE IF NOT EXISTS checkpoints (
    run_id TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, created_at REAL NOT NULL,
    folder TEXT NOT NULL, size_bytes INTEGER NOT NULL, public INTEGER NOT NULL DEFAULT 0,
    expires_at REAL, user_metadata TEXT, PRIMARY KEY (run_id, kind, name));
CREATE TABLE IF NOT EXISTS samplers (
    sampler_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, created_at REAL NOT NULL,
    base_model TEXT NOT NULL, model_path TEXT);
CREATE INDEX IF NOT EXISTS runs_by_session ON runs (session_id);
CREATE INDEX IF NOT EXISTS samplers_by_session ON samplers (session_id);
"""

#: Checkpoint type -> path segment.
KIND_OF = {checkpoint_type: kind for kind, checkpoint_type in KINDS.items()}


@dataclasses.dataclass(frozen=True)
class SessionRow:
    """A session.  *state* is live, expired, finished or lost (the server ended before it)."""

    session_id: str
    created_at: float
    state: str
    facts: Dict[str, Any]
    ended_at: Optional[float]
    reason: Optional[str]


@dataclasses.dataclass(frozen=True)
class RunRow:
    """A training run, loaded or not."""

    run_id: str
    session_id: str
    created_at: float
    last_request_at: float
    base_model: str
    lora: LoraConfig
    optimizer: Dict[str, Any]
    user_metadata: Optional[Dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class CheckpointRow:
    """A saved checkpoint; *kind* is the path segment: weights or sampler_weights."""

    run_id: str
    kind: str
    name: str
    created_at: float
    folder: str
    size_bytes: int
    public: bool
    expires_at: Optional[float]
    user_metadata: Optional[Dict[str, Any]]

    @property
    def tinker_path(self) -> str:
        """The ``tinker://`` path."""
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"


@dataclasses.dataclass(frozen=True)
class SamplerRow:
    """A sampling session."""

    sampler_id: str
    session_id: str
    created_at: float
    base_model: str
    model_path: Optional[str]


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
        self._wall = wall
        self._touched: Dict[str, float] = {}
        # Guards the connection and _touched.  Weights are written without it.
        self._lock = threading.Lock()
        self._folder_lock: Optional[int] = None
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            self._folder_lock = _lock_folder(data_dir)
            self._db = _open_database(":memory:" if in_memory else data_dir / "tinkex.sqlite3")
        except (OSError, sqlite3.Error) as error:
            self._unlock_folder()
            raise LocalServerError(
                f"cannot use the data directory {data_dir}: {error}",
                hint="Name a folder that can be written, with --data-dir or data_dir=...",
            ) from error
        self._tidy(remove_orphans=not in_memory)

    def close(self) -> None:
        """Close the database and give the folder free."""
        with self._lock:
            self._db.close()
        self._unlock_folder()

    # Sessions

    def add_session(self, session_id: str, facts: Dict[str, Any]) -> None:
        """Remember a new session; *facts* is what the client said about it."""
        self._execute(
            "INSERT INTO sessions (session_id, created_at, state, facts) VALUES (?, ?, 'live', ?)",
            session_id, self._wall(), json.dumps(facts),
        )  # fmt: skip

    def end_session(self, session_id: str, state: str, reason: str) -> None:
        """Note that a session ended; only the first end counts."""
        self._execute(
            "UPDATE sessions SET state = ?, ended_at = ?, reason = ? "
            "WHERE session_id = ? AND state = 'live'",
            state, self._wall(), reason, session_id,
        )  # fmt: skip

    def session(self, session_id: str) -> Optional[SessionRow]:
        """Return a session, or None."""
        rows = self._rows("SELECT * FROM sessions WHERE session_id = ?", session_id)
        return _session(rows[0]) if rows else None

    def sessions(self, limit: int, offset: int) -> List[SessionRow]:
        """Return sessions, newest first."""
        sql = "SELECT * FROM sessions ORDER BY created_at DESC, rowid DESC LIMIT ? OFFSET ?"
        return [_session(row) for row in self._rows(sql, limit, offset)]

    # Runs

    def add_run(
        self,
        run_id: str,
        session_id: str,
        base_model: str,
        lora: LoraConfig,
        optimizer: Dict[str, Any],
        user_metadata: Optional[Dict[str, Any]],
    ) -> None:
        """Remember a new training run."""
        now = self._wall()
        self._execute(
            "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            run_id, session_id, now, now, base_model, json.dumps(lora.to_wire()),
            json.dumps(optimizer), _dumps(user_metadata),
        )  # fmt: skip

    def drop_run(self, run_id: str) -> None:
        """Forget a run that could not be created."""
        self._execute("DELETE FROM runs WHERE run_id = ?", run_id)

    def run(self, run_id: str) -> Optional[RunRow]:
        """Return a run, or None."""
        rows = self._rows("SELECT * FROM runs WHERE run_id = ?", run_id)
        return _run(rows[0]) if rows else None

    def runs(self, limit: int, offset: int) -> Tuple[List[RunRow], int]:
        """Return a page of runs, last used first, and how many there are."""
        total = self._rows("SELECT COUNT(*) FROM runs")[0][0]
        sql = "SELECT * FROM runs ORDER BY last_request_at DESC, rowid DESC LIMIT ? OFFSET ?"
        return [_run(row) for row in self._rows(sql, limit, offset)], total

    def runs_of(self, session_id: str) -> List[str]:
        """Return the ids of a session's runs, oldest first."""
        sql = "SELECT run_id FROM runs WHERE session_id = ? ORDER BY rowid"
        return [row[0] for row in self._rows(sql, session_id)]

    def touch_run(self, run_id: str) -> None:
        """Note that a run is in use, at most once a second."""
        now = self._wall()
        with self._lock:
            if now - self._touched.get(run_id, 0.0) < 1.0:
                return
            self._touched[run_id] = now
            self._db.execute("UPDATE runs SET last_request_at = ? WHERE run_id = ?", (now, run_id))

    # Samplers

    def add_sampler(
        self, sampler_id: str, session_id: str, base_model: str, model_path: Optional[str]
    ) -> None:
        """Remember a new sampling session."""
        self._execute(
            "INSERT INTO samplers VALUES (?, ?, ?, ?, ?)",
            sampler_id, session_id, self._wall(), base_model, model_path,
        )  # fmt: skip

    def sampler(self, sampler_id: str) -> Optional[SamplerRow]:
        """Return a sampling session, or None."""
        rows = self._rows("SELECT * FROM samplers WHERE sampler_id = ?", sampler_id)
        return SamplerRow(*rows[0]) if rows else None

    def samplers_of(self, session_id: str) -> List[str]:
        """Return the ids of a session's samplers, oldest first."""
        sql = "SELECT sampler_id FROM samplers WHERE session_id = ? ORDER BY rowid"
        return [row[0] for row in self._rows(sql, session_id)]

    def freeze(self, checkpoint: CheckpointRow) -> Path:
        """Give a sampler its own copy of a checkpoint, which outlives the checkpoint.

        Files are hard links where the file system has them: no saved file is ever changed.
        Problem 404 if the checkpoint is deleted at the same time.
        """
        source = self.folder_of(checkpoint)
        target = self.new_sampler_folder()
        try:
            shutil.copytree(source, target, copy_function=_link_or_copy, dirs_exist_ok=True)
        except OSError as error:
            shutil.rmtree(target, ignore_errors=True)
            if source.exists():
                raise
            raise Problem(404, f"{checkpoint.tinker_path} was deleted just now") from error
        return target

    def new_sampler_folder(self) -> Path:
        """Make an empty folder for the weights of a sampler."""
        folder = self.data_dir / "samplers" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

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

        Nothing is left behind if the body raises.  Raises Problem (409) if the name is taken and
        *overwrite* is not set.
        """
        self.check_name_free(run_id, kind, name, overwrite)
        parent = self.data_dir / "checkpoints" / _folder_name(run_id) / kind
        parent.mkdir(parents=True, exist_ok=True)
        temporary = parent / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
        temporary.mkdir()
        try:
            yield temporary
            size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
            final = _free_sibling(parent, name)
            os.replace(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        now = self._wall()
        sql = "SELECT * FROM checkpoints WHERE run_id = ? AND kind = ? AND name = ?"
        replaced = [_checkpoint(row) for row in self._rows(sql, run_id, kind, name)]
        self._execute(
            "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?)",
            run_id, kind, name, now, str(final.relative_to(self.data_dir)), size,
            None if ttl_s is None else now + ttl_s, _dumps(user_metadata),
        )  # fmt: skip
        for old in replaced:
            shutil.rmtree(self.folder_of(old), ignore_errors=True)

    def check_name_free(self, run_id: str, kind: str, name: str, overwrite: bool) -> None:
        """Raise Problem (409) if the checkpoint exists and must not be overwritten."""
        if not overwrite and self.checkpoint(run_id, kind, name) is not None:
            raise Problem(
                409,
                f"checkpoint {kind}/{name} of {run_id} exists; choose another name, delete it, "
                "or save with overwrite=true",
            )

    def checkpoint(self, run_id: str, kind: str, name: str) -> Optional[CheckpointRow]:
        """Return a checkpoint, or None; an expired one counts as gone."""
        sql = "SELECT * FROM checkpoints WHERE run_id = ? AND kind = ? AND name = ?"
        found = [_checkpoint(row) for row in self._rows(sql, run_id, kind, name)]
        if found and found[0].expires_at is not None and found[0].expires_at <= self._wall():
            return None
        return found[0] if found else None

    def checkpoints_of(self, run_id: str) -> List[CheckpointRow]:
        """Return a run's checkpoints, newest first."""
        sql = "SELECT * FROM checkpoints WHERE run_id = ? ORDER BY created_at DESC, rowid DESC"
        return [_checkpoint(row) for row in self._rows(sql, run_id)]

    def checkpoints(self, limit: int, offset: int) -> Tuple[List[CheckpointRow], int]:
        """Return a page of all checkpoints, newest first, and how many there are."""
        total = self._rows("SELECT COUNT(*) FROM checkpoints")[0][0]
        sql = "SELECT * FROM checkpoints ORDER BY created_at DESC, rowid DESC LIMIT ? OFFSET ?"
        return [_checkpoint(row) for row in self._rows(sql, limit, offset)], total

    def folder_of(self, checkpoint: CheckpointRow) -> Path:
        """Return the folder that holds a checkpoint's files."""
        return self.data_dir / checkpoint.folder

    def delete_checkpoint(self, checkpoint: CheckpointRow) -> None:
        """Forget a checkpoint and remove its files."""
        self._execute(
            "DELETE FROM checkpoints WHERE run_id = ? AND kind = ? AND name = ? AND folder = ?",
            checkpoint.run_id, checkpoint.kind, checkpoint.name, checkpoint.folder,
        )  # fmt: skip
        shutil.rmtree(self.folder_of(checkpoint), ignore_errors=True)

    def set_public(self, checkpoint: CheckpointRow, public: bool) -> None:
        """Mark a checkpoint as published or not."""
        self._execute(
            "UPDATE checkpoints SET public = ? WHERE run_id = ? AND kind = ? AND name = ?",
            int(public), checkpoint.run_id, checkpoint.kind, checkpoint.name,
        )  # fmt: skip

    def set_ttl(self, checkpoint: CheckpointRow, ttl_s: Optional[float]) -> None:
        """Have a checkpoint expire *ttl_s* from now; None keeps it."""
        self._execute(
            "UPDATE checkpoints SET expires_at = ? WHERE run_id = ? AND kind = ? AND name = ?",
            None if ttl_s is None else self._wall() + ttl_s,
            checkpoint.run_id, checkpoint.kind, checkpoint.name,
        )  # fmt: skip

    def drop_expired_checkpoints(self) -> None:
        """Delete the checkpoints whose time has come."""
        sql = "SELECT * FROM checkpoints WHERE expires_at <= ?"
        for row in self._rows(sql, self._wall()):
            self.delete_checkpoint(_checkpoint(row))

    # Below

    def _unlock_folder(self) -> None:
        if self._folder_lock is not None:
            os.close(self._folder_lock)
            self._folder_lock = None

    def _execute(self, sql: str, *values: Any) -> None:
        with self._lock:
            self._db.execute(sql, values)

    def _rows(self, sql: str, *values: Any) -> Sequence[sqlite3.Row]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _tidy(self, *, remove_orphans: bool) -> None:
        """After a restart: no session lives, and no weights are kept without their row."""
        with self._lock:
            self._db.execute(
                "UPDATE sessions SET state = 'lost', ended_at = ?, "
                "reason = 'the server was restarted' WHERE state = 'live'",
                (self._wall(),),
            )
        shutil.rmtree(self.data_dir / "samplers", ignore_errors=True)
        if not remove_orphans:
            return
        known = {row["folder"] for row in self._rows("SELECT folder FROM checkpoints")}
        for folder in (self.data_dir / "checkpoints").glob("*/*/*"):
            if str(folder.relative_to(self.data_dir)) not in known:
                shutil.rmtree(folder, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _open_database(path: Union[str, Path]) -> sqlite3.Connection:
    database = sqlite3.connect(str(path), check_same_thread=False, isolation_level=None)
    try:
        database.row_factory = sqlite3.Row
        # NORMAL with WAL: a power cut may lose the last facts, never the database; no fsync
        # per commit.
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        database.executescript(_SCHEMA)
    except sqlite3.Error:
        database.close()
        raise
    return database


def _lock_folder(data_dir: Path) -> Optional[int]:
    """Hold the folder for this process: two servers would end each other's sessions."""
    try:
        import fcntl
    except ImportError:  # Windows: there, two servers on one folder go unnoticed
        return None
    handle = os.open(data_dir / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise LocalServerError(
            f"the data directory {data_dir} is in use by another tinkex server",
            hint="Stop that server, or choose another folder with --data-dir or data_dir=...",
        ) from error
    return handle


def _folder_name(run_id: str) -> str:
    return run_id.replace(":", "_")  # Windows takes no colons


def _free_sibling(parent: Path, name: str) -> Path:
    """Return *name*, or *name~2* and so on while an older version stands there."""
    candidate, version = parent / name, 1
    while candidate.exists():
        version += 1
        candidate = parent / f"{name}~{version}"
    return candidate


def _dumps(value: Optional[Dict[str, Any]]) -> Optional[str]:
    return None if value is None else json.dumps(value)


def _loads(text: Optional[str]) -> Optional[Dict[str, Any]]:
    if text is None:
        return None
    value: Dict[str, Any] = json.loads(text)
    return value


def _session(row: sqlite3.Row) -> SessionRow:
    return SessionRow(**{**dict(row), "facts": json.loads(row["facts"])})


def _run(row: sqlite3.Row) -> RunRow:
    return RunRow(
        **{
            **dict(row),
            "lora": LoraConfig.from_wire(json.loads(row["lora"])),
            "optimizer": json.loads(row["optimizer"]),
            "user_metadata": _loads(row["user_metadata"]),
        }
    )


def _checkpoint(row: sqlite3.Row) -> CheckpointRow:
    facts = {**dict(row), "public": bool(row["public"])}
    return CheckpointRow(**{**facts, "user_metadata": _loads(row["user_metadata"])})
