"""The SQLite database of the embedded server: its tables, how it is opened, and for whom.

No threads.
"""

from __future__ import annotations

import gc
import os
import sqlite3
import threading
from pathlib import Path
from typing import Dict, Optional, Tuple, Union

from tinkex.errors import LocalServerError

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
CREATE INDEX IF NOT EXISTS runs_by_session ON runs (session_id);
CREATE INDEX IF NOT EXISTS samplers_by_session ON samplers (session_id);
"""

#: Columns that the first version did not have.
_ADDED = (
    ("sessions", "project_id"),
    ("sessions", "end_reason"),
    ("sessions", "end_detail"),
    ("runs", "project_id"),
)


def open_database(path: Union[str, Path]) -> sqlite3.Connection:
    """Open the database, made or brought up to date as needed."""
    database = sqlite3.connect(str(path), check_same_thread=False, isolation_level=None)
    try:
        database.row_factory = sqlite3.Row
        # NORMAL with WAL: a power cut may lose the last facts, never the database; no fsync
        # per commit.
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        database.executescript(_SCHEMA)
        _add_columns(database)
    except sqlite3.Error:
        database.close()
        raise
    return database


def _add_columns(database: sqlite3.Connection) -> None:
    """Bring a database of an older version up to date."""
    for table, column in _ADDED:
        known = {row["name"] for row in database.execute(f"PRAGMA table_info({table})")}
        if column not in known:
            database.execute(f"ALTER TABLE {table} ADD COLUMN {column} TEXT")


class FolderLock:
    """Holds a data directory for one server: two would end each other's sessions.

    Used by one thread at a time.

    Attributes:
        ending: its server is about to close.
    """

    def __init__(self, data_dir: Path) -> None:
        self.ending = False
        self._data_dir = data_dir
        self._file: Optional[int] = None
        self._key: Optional[Tuple[int, int, int]] = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock.  Waits for a server of this process that is closing; else not.

        Raises:
            LocalServerError: another server has it.
            OSError: the folder cannot be used.
        """
        try:
            import fcntl
        except ImportError:  # Windows: there, two servers on one folder go unnoticed
            return
        file = os.open(self._data_dir / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            status = os.fstat(file)
            key = (os.getpid(), status.st_dev, status.st_ino)
            holder = _held_here.get(key)
            if holder is not None:
                gc.collect()  # its client may be garbage already, in a cycle
                if holder.ending:
                    holder._released.wait(_ENDING_S)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise self._in_use(here=holder is not None) from error
        except BaseException:
            os.close(file)
            raise
        self._file, self._key = file, key
        _held_here[key] = self

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not held."""
        file, self._file = self._file, None
        if file is not None:
            if self._key is not None and _held_here.get(self._key) is self:
                del _held_here[self._key]
            os.close(file)
        self._released.set()

    def _in_use(self, *, here: bool) -> LocalServerError:
        if here:
            return LocalServerError(
                f"the data directory {self._data_dir} is in use by another server of this process",
                hint="Close the ServiceClient or LocalServer that uses it first, e.g. with "
                "service.close() before a notebook cell is run again; or choose another folder "
                "with --data-dir or data_dir=...",
            )
        return LocalServerError(
            f"the data directory {self._data_dir} is in use by another tinkex server",
            hint="Stop that server, or choose another folder with --data-dir or data_dir=...",
        )


#: How long a new server waits for one that is closing, in seconds.
_ENDING_S = 5.0

# The locks that a process holds, by its id (a fork copies this) and the device and inode of their
# files.  Single operations on a dict are atomic.
_held_here: Dict[Tuple[int, int, int], FolderLock] = {}
