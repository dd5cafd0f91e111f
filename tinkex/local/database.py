"""The SQLite database of the embedded server: its tables, and how it is opened.

No state, no threads.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Optional, Union

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


def lock_folder(data_dir: Path) -> Optional[int]:
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
