"""The SQLite database of the embedded server: its tables, and how it is opened, read and changed.

No thread of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple, Type, TypeVar

from tinkex.local.errors import storage_errors
from tinkex.local.state.rows import read_row

_log = logging.getLogger(__name__)

R = TypeVar("R")

#: SQL, and the values of its parameters.
Statement = Tuple[Any, ...]

# New columns go to the end of their table: inserts give values by position, and an older database
# gets them at the end, by _add_columns.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    session_id TEXT PRIMARY KEY, created_at REAL NOT NULL, state TEXT NOT NULL,
    facts TEXT NOT NULL, ended_at REAL, reason TEXT, project_id TEXT, end_reason TEXT,
    end_detail TEXT);
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, created_at REAL NOT NULL,
    last_request_at REAL NOT NULL, base_model TEXT NOT NULL, lora TEXT NOT NULL,
    optimizer TEXT NOT NULL, user_metadata TEXT, project_id TEXT);
CREATE TABLE IF NOT EXISTS checkpoints (
    run_id TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, created_at REAL NOT NULL,
    folder TEXT NOT NULL, size_bytes INTEGER NOT NULL, public INTEGER NOT NULL DEFAULT 0,
    expires_at REAL, user_metadata TEXT, PRIMARY KEY (run_id, kind, name));
CREATE TABLE IF NOT EXISTS samplers (
    sampler_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, created_at REAL NOT NULL,
    base_model TEXT NOT NULL, model_path TEXT);
CREATE TABLE IF NOT EXISTS audit (
    at REAL NOT NULL, event_type TEXT NOT NULL, event TEXT NOT NULL, details TEXT NOT NULL,
    run_id TEXT, tinker_path TEXT);
CREATE INDEX IF NOT EXISTS runs_by_session ON runs (session_id);
CREATE INDEX IF NOT EXISTS samplers_by_session ON samplers (session_id);
CREATE INDEX IF NOT EXISTS checkpoints_by_time ON checkpoints (created_at, expires_at);
CREATE INDEX IF NOT EXISTS checkpoints_of_run ON checkpoints (run_id, kind, created_at);
CREATE INDEX IF NOT EXISTS sessions_by_time ON sessions (created_at);
CREATE INDEX IF NOT EXISTS runs_by_use ON runs (last_request_at);
CREATE INDEX IF NOT EXISTS audit_by_time ON audit (at);
"""

#: Columns that the first version did not have.
_ADDED = (
    ("sessions", "project_id"),
    ("sessions", "end_reason"),
    ("sessions", "end_detail"),
    ("runs", "project_id"),
)


#: Size of the reserve: room for some hundred changes.
RESERVE_BYTES = 1 << 20


class Reserve:
    """A file at *path* that keeps disk space in reserve: deleting it makes room for changes."""

    def __init__(self, path: Path, size: int = RESERVE_BYTES) -> None:
        self._path = path
        self._size = size
        # Guards the file.
        self._lock = threading.Lock()

    def fill(self) -> None:
        """Create the file if it does not exist and there is room for it."""
        with self._lock:
            if self._path.exists():
                return
            try:
                # Random, since a file system may not store zeros.
                self._path.write_bytes(os.urandom(self._size))
            except OSError:
                with contextlib.suppress(OSError):
                    self._path.unlink()

    def release(self) -> bool:
        """Delete the file; return whether there was one."""
        with self._lock:
            try:
                self._path.unlink()
            except OSError:
                return False
            return True


class Database:
    """The database in *folder*, created or brought up to date as needed.  Thread-safe.

    Changes succeed even on a full disk, as long as the reserve lasts.

    Args:
        folder: must exist.

    Raises:
        sqlite3.Error: the database cannot be opened; from its methods, it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Guards the connection.
        self._lock = threading.Lock()
        self._reserve = Reserve(folder / "reserve")
        path = str(folder / "tinkex.sqlite3")
        try:
            self._connection = _connect(path)
        except sqlite3.OperationalError as error:
            # `close` deletes the reserve, so a reserve that exists now was left by a killed server.
            # Its room lets this server start.
            if not (is_without_room(error) and self._reserve.release()):
                raise
            self._connection = _connect(path)
        self._reserve.fill()

    def close(self) -> None:
        """Close the database, and delete the reserve."""
        with self._lock:
            self._connection.close()
        self._reserve.release()

    def change(self, *statements: Statement) -> None:
        """Execute all of *statements*, or none; StorageError if the database cannot be written."""
        with storage_errors(self._folder):
            self.execute(*statements)

    def execute(self, *statements: Statement) -> None:
        """Execute all of *statements*, or none of them; sqlite3.Error if that fails."""
        with self._lock:
            try:
                self._change_locked(statements)
                return
            except sqlite3.OperationalError as error:
                if not (is_without_room(error) and self._reserve.release()):
                    raise
            # Moving the write-ahead log into the database and truncating it makes more room still.
            with contextlib.suppress(sqlite3.OperationalError):
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._change_locked(statements)
        _log.warning("%s is on a full disk; the reserve for its database is in use", self._folder)

    def execute_if_possible(self, sql: str, *values: Any) -> None:
        """Make a change that is not worth using the reserve; on a full disk, nothing happens."""
        with self._lock, contextlib.suppress(sqlite3.OperationalError):
            self._change_locked([(sql, *values)])

    def find(self, kind: Type[R], sql: str, *values: Any) -> List[R]:
        """Return the rows that a query finds, as values of *kind*."""
        return [read_row(kind, row) for row in self.rows(sql, *values)]

    def first(self, kind: Type[R], sql: str, *values: Any) -> Optional[R]:
        """Return the first row that a query finds, or None."""
        found = self.find(kind, sql, *values)
        return found[0] if found else None

    def rows(self, sql: str, *values: Any) -> Sequence[sqlite3.Row]:
        """Return the rows that a query finds."""
        with self._lock:
            # All rows at once: other threads use the connection as soon as the lock is released.
            return self._connection.execute(sql, values).fetchall()

    def restore_reserve(self) -> None:
        """Create the reserve again, if it was used and there is room for it."""
        self._reserve.fill()

    def _change_locked(self, statements: Sequence[Statement]) -> None:
        if len(statements) == 1:
            sql, *values = statements[0]
            self._connection.execute(sql, values)
            return
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for sql, *values in statements:
                self._connection.execute(sql, values)
            self._connection.execute("COMMIT")
        # On Ctrl-C, too: all threads share the connection, and a transaction left open would take
        # in the changes of the others.
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back already
                self._connection.execute("ROLLBACK")
            raise


def is_without_room(error: Optional[BaseException]) -> bool:
    """Return whether SQLite's *error* is due to a full disk, a quota, or a limit of file sizes."""
    return any(reason in str(error) for reason in ("disk is full", "disk I/O error"))


def _connect(path: str) -> sqlite3.Connection:
    # All threads use this connection, one at a time.  Without an isolation level, it begins no
    # transactions: a single statement commits itself, and _change_locked begins one for several.
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        connection.row_factory = sqlite3.Row
        # NORMAL with WAL: no fsync per commit; a power cut may lose the last changes, never the
        # database.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(_SCHEMA)
        _add_columns(connection)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _add_columns(connection: sqlite3.Connection) -> None:
    """Bring a database of an older version up to date."""
    for table, column in _ADDED:
        known = {row["name"] for row in connection.execute(f"PRAGMA table_info({table})")}
        if column not in known:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} TEXT")
