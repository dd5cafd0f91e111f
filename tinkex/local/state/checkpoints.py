"""Checkpoints: the saved checkpoints, each a row in the database and a folder.

A checkpoint is written into a temporary sibling, renamed, and exists once its row is committed.  A
folder that a crash leaves without a row is removed at the next start.  Starts no thread;
thread-safe.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from tinkex.local.errors import HTTPError, StorageError, storage_errors
from tinkex.local.state.database import Database, Statement, is_without_room
from tinkex.local.state.rows import CheckpointRow, audit_statement, dumps, timestamp
from tinkex.types.checkpoint_path import KINDS

#: Checkpoint type -> path segment.
KIND_OF = {checkpoint_type: kind for kind, checkpoint_type in KINDS.items()}

_KEY = "run_id = ? AND kind = ? AND name = ?"
# Queries skip expired checkpoints, which stay until housekeeping deletes them.
_UNEXPIRED = "(checkpoints.expires_at IS NULL OR checkpoints.expires_at > ?)"
_ONE = f"SELECT * FROM checkpoints WHERE {_KEY}"
_NEWEST_FIRST = "ORDER BY checkpoints.created_at DESC, checkpoints.rowid DESC"


class Checkpoints:
    """The checkpoints of a store.

    Args:
        data_dir: holds their folders.
        database: holds their rows, and the audit log of their changes.
        wall: returns seconds since the epoch.
    """

    def __init__(self, data_dir: Path, database: Database, wall: Callable[[], float]) -> None:
        self._data_dir = data_dir
        self._db = database
        self._wall = wall

    # Rows

    def find(self, run_id: str, kind: str, name: str) -> Optional[CheckpointRow]:
        """Return a checkpoint, or None."""
        sql = f"{_ONE} AND {_UNEXPIRED}"
        return self._db.first(CheckpointRow, sql, run_id, kind, name, self._wall())

    def of_run(self, run_id: str) -> List[CheckpointRow]:
        """Return a run's checkpoints, newest first."""
        sql = f"SELECT * FROM checkpoints WHERE run_id = ? AND {_UNEXPIRED} {_NEWEST_FIRST}"
        return self._db.find(CheckpointRow, sql, run_id, self._wall())

    def newest(self, run_id: str, kind: str) -> Optional[CheckpointRow]:
        """Return a run's newest checkpoint of *kind*, or None."""
        sql = (
            f"SELECT * FROM checkpoints WHERE run_id = ? AND kind = ? AND {_UNEXPIRED} "
            f"{_NEWEST_FIRST} LIMIT 1"
        )
        return self._db.first(CheckpointRow, sql, run_id, kind, self._wall())

    def page(self, limit: int, offset: int) -> Tuple[List[CheckpointRow], int]:
        """Return a page of all checkpoints, newest first, and the total."""
        now = self._wall()
        total = self._db.rows(f"SELECT COUNT(*) FROM checkpoints WHERE {_UNEXPIRED}", now)[0][0]
        # The inner query reads the index alone: the rows that *offset* skips are not read.
        page = f"SELECT rowid FROM checkpoints WHERE {_UNEXPIRED} {_NEWEST_FIRST} LIMIT ? OFFSET ?"
        sql = f"SELECT * FROM checkpoints WHERE rowid IN ({page}) {_NEWEST_FIRST}"
        return self._db.find(CheckpointRow, sql, now, limit, offset), total

    def totals(self, session_id: str) -> Tuple[int, int]:
        """Return the number of checkpoints of a session's runs, and their bytes."""
        sql = (
            "SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM checkpoints JOIN runs "
            f"USING (run_id) WHERE session_id = ? AND {_UNEXPIRED}"
        )
        count, size = self._db.rows(sql, session_id, self._wall())[0]
        return int(count), int(size)

    def check_name_free(self, run_id: str, kind: str, name: str, overwrite: bool) -> None:
        """Raise HTTPError (409) if the checkpoint exists and must not be overwritten."""
        if not overwrite and self.find(run_id, kind, name) is not None:
            raise HTTPError(
                409,
                f"checkpoint {kind}/{name} of {run_id} exists; choose another name, delete it, "
                "or save with overwrite=true",
            )

    def set_public(self, checkpoint: CheckpointRow, public: bool) -> None:
        """Mark a checkpoint as published or not."""
        self._db.change(
            (f"UPDATE checkpoints SET public = ? WHERE {_KEY}", int(public), *checkpoint.key),
            self._audited(checkpoint, "published" if public else "unpublished"),
        )

    def set_ttl(self, checkpoint: CheckpointRow, ttl_s: Optional[float]) -> None:
        """Let a checkpoint expire *ttl_s* seconds from now; never, if None."""
        expires_at = None if ttl_s is None else self._wall() + ttl_s
        self._db.change(
            (f"UPDATE checkpoints SET expires_at = ? WHERE {_KEY}", expires_at, *checkpoint.key),
            self._audited(checkpoint, "ttl_changed", expires_at=_timestamp(expires_at)),
        )

    # Files

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
        """Yield an empty folder; what the body writes there becomes the checkpoint.

        Nothing is left behind if the body raises.  Raises HTTPError (409) if the name is taken and
        *overwrite* is not set.
        """
        # Checked at submission, and again now: an earlier request of the run, which was queued
        # then, may have taken the name.
        self.check_name_free(run_id, kind, name, overwrite)
        with storage_errors(self._data_dir):
            parent = _run_folder(self._data_dir, run_id) / kind
            parent.mkdir(parents=True, exist_ok=True)
            # In the same folder, for an atomic rename; no checkpoint's name begins with a dot.
            written = parent / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
            written.mkdir()
            try:
                yield written
                size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
                # Renamed before there is a row, so that no row ever names a half-written folder;
                # and not onto an older version, which stays valid if the row cannot be written.
                written = written.rename(_free_sibling(parent, name))
                # After the body: the lifetime of a checkpoint begins once it is complete.
                now = self._wall()
                row = CheckpointRow(
                    run_id, kind, name, now, str(written.relative_to(self._data_dir)), size, False,
                    None if ttl_s is None else now + ttl_s, user_metadata,
                )  # fmt: skip
                replaced = self._add(row)
            except BaseException:  # `written` is the folder, renamed or not
                shutil.rmtree(written, ignore_errors=True)
                raise
        # Only now: until the new row was committed, the old checkpoint was the valid one.
        if replaced is not None:
            shutil.rmtree(self.folder_of(replaced), ignore_errors=True)

    def _add(self, row: CheckpointRow) -> Optional[CheckpointRow]:
        """Add the row of a checkpoint; return the row that it replaced, which may have expired."""
        # Without `_UNEXPIRED`: an expired checkpoint still has its row, and files to remove.
        replaced = self._db.first(CheckpointRow, _ONE, *row.key)
        self._db.change(
            ("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?)",
             *row.key, row.created_at, row.folder, row.size_bytes, row.expires_at,
             dumps(row.user_metadata)),
            self._audited(
                row, "overwritten" if replaced else "created",
                size_bytes=row.size_bytes, expires_at=_timestamp(row.expires_at),
            ),
        )  # fmt: skip
        return replaced

    def folder_of(self, checkpoint: CheckpointRow) -> Path:
        """Return the folder that holds a checkpoint's files."""
        return self._data_dir / checkpoint.folder

    def copy_files(self, checkpoint: CheckpointRow, target: Path) -> None:
        """Put the files of a checkpoint into the folder *target*.

        HTTPError 404 if the checkpoint is deleted at the same time.
        """
        source = self.folder_of(checkpoint)
        with storage_errors(self._data_dir):
            try:
                shutil.copytree(source, target, copy_function=_link_or_copy, dirs_exist_ok=True)
            except OSError as error:
                # If the folder still exists, there is another reason, such as a full disk.
                if source.exists():
                    raise
                raise self.missing_files(checkpoint) from error

    def missing_files(self, checkpoint: CheckpointRow) -> HTTPError:
        """Return the error for a checkpoint whose folder is missing."""
        current = self.find(*checkpoint.key)
        # If the name has another folder now, the checkpoint was saved again, and its old files were
        # removed.
        if current is None or current.folder != checkpoint.folder:
            return HTTPError(404, f"{checkpoint.tinker_path} was deleted just now")
        return HTTPError(
            404,
            f"the files of {checkpoint.tinker_path} are missing: there is no folder "
            f"{self.folder_of(checkpoint)}",
        )

    def delete(self, checkpoint: CheckpointRow, event: str = "deleted") -> None:
        """Delete a checkpoint; the audit log records it as ``checkpoint.<event>``.

        Works on a full disk, too.
        """
        forget = (
            # The folder is compared, too: since *checkpoint* was read, another one may have been
            # saved under its name, and must stay.
            (f"DELETE FROM checkpoints WHERE {_KEY} AND folder = ?",
             *checkpoint.key, checkpoint.folder),
            self._audited(checkpoint, event),
        )  # fmt: skip
        try:
            self._db.change(*forget)
        except StorageError as error:
            if not is_without_room(error.__cause__):
                raise
            # The reserve is used up: the files go first, to make room.  Otherwise they go last,
            # since a folder that is left without its row is removed at the next start.
            shutil.rmtree(self.folder_of(checkpoint), ignore_errors=True)
            self._db.change(*forget)
        shutil.rmtree(self.folder_of(checkpoint), ignore_errors=True)

    def delete_expired(self) -> None:
        """Delete the checkpoints whose lifetime has passed."""
        sql = "SELECT * FROM checkpoints WHERE expires_at <= ?"
        for row in self._db.find(CheckpointRow, sql, self._wall()):
            self.delete(row, "expired")

    def remove_orphans(self) -> None:
        """Remove the folders that a crash left without a row.

        Call it while nothing is being saved.  Removes only folders that a store has named: the user
        may keep a folder "checkpoints" of their own in the data directory.
        """
        known = {row["folder"] for row in self._db.rows("SELECT folder FROM checkpoints")}
        for run in self._db.rows("SELECT run_id FROM runs"):
            for folder in _run_folder(self._data_dir, run["run_id"]).glob("*/*"):
                if str(folder.relative_to(self._data_dir)) not in known:
                    shutil.rmtree(folder, ignore_errors=True)

    def _audited(self, checkpoint: CheckpointRow, event: str, **details: Any) -> Statement:
        return audit_statement(
            self._wall(),
            "checkpoints",
            f"checkpoint.{event}",
            {"checkpoint_type": KINDS[checkpoint.kind], **details},
            checkpoint.run_id,
            checkpoint.tinker_path,
        )


def _run_folder(data_dir: Path, run_id: str) -> Path:
    """Return the folder of a run's checkpoints."""
    return data_dir / "checkpoints" / run_id.replace(":", "_")  # Windows takes no colons


def _timestamp(seconds: Optional[float]) -> Optional[str]:
    return None if seconds is None else timestamp(seconds)


def _link_or_copy(source: str, target: str) -> None:
    # A hard link takes no time and no space, and is safe: no saved file is ever changed.
    try:
        os.link(source, target)
    except OSError:  # across file systems, or on one without links
        shutil.copy2(source, target)


def _free_sibling(parent: Path, name: str) -> Path:
    """Return *name*, or *name~2* and so on while the folder of an older version is there."""
    candidate, version = parent / name, 1
    while candidate.exists():
        version += 1
        candidate = parent / f"{name}~{version}"
    return candidate
