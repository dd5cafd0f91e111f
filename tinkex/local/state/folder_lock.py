"""FolderLock: one data directory, one server."""

from __future__ import annotations

import contextlib
import gc
import os
import sqlite3
import sys
import threading
from pathlib import Path
from typing import Dict, Iterator, Optional, Tuple

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex._runtime.file_lock import lock_file
from tinkex.errors import LocalServerError

#: How long a new server waits for a server that is closing, in seconds.
_ENDING_S = 5.0

# The locks that this process holds.  A key is the id of the process (a fork copies this dict), and
# the device and inode of the file.  Single operations on a dict are atomic.
_held_here: Dict[Tuple[int, int, int], FolderLock] = {}


class FolderLock:
    """Holds a data directory for one server: two servers would end each other's sessions.

    Used by one thread at a time.

    Attributes:
        ending: True once the server is about to close.
    """

    def __init__(self, data_dir: Path) -> None:
        self.ending = False
        self._data_dir = data_dir
        self._file: Optional[int] = None
        self._key: Optional[Tuple[int, int, int]] = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock.  Waits only for a server of this process that is about to close.

        Raises:
            LocalServerError: another server holds it.
            OSError: the folder cannot be used.
        """
        if sys.platform == "win32":  # two servers on one folder go unnoticed there
            return
        file = os.open(self._data_dir / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            status = os.fstat(file)
            key = (os.getpid(), status.st_dev, status.st_ino)
            # flock excludes a second server of this process, too, but only the dict knows whether
            # the first one is about to close.
            holder = _held_here.get(key)
            if holder is not None:
                gc.collect()  # the holder's client may be garbage already, in a reference cycle
                if holder.ending:
                    holder._released.wait(_ENDING_S)
            try:
                lock_file(file)
            except BlockingIOError as error:
                raise self._in_use(here=holder is not None) from error
        except BaseException:
            os.close(file)
            raise
        self._file, self._key = file, key
        _held_here[key] = self

    def release(self) -> None:
        """Release the lock; nothing happens if it is not held."""
        file, self._file = self._file, None
        if file is not None:
            # Before the file is closed: from then on, the key may belong to another server.
            if self._key is not None and _held_here.get(self._key) is self:
                del _held_here[self._key]
            # The file stays: if it were removed, two servers could lock two files of the same name.
            os.close(file)
        # Last: the waiting server locks the file as soon as this is set, and does not retry.
        self._released.set()

    def _in_use(self, *, here: bool) -> LocalServerError:
        if here:
            return _unusable(
                self._data_dir,
                f"the data directory {self._data_dir} is in use by another server of this process",
                "Close the ServiceClient or LocalServer that uses it first, e.g. with "
                "service.close() before a notebook cell is run again; or choose another folder",
            )
        return _unusable(
            self._data_dir,
            f"the data directory {self._data_dir} is in use by another tinkex server",
            "Stop that server, or choose another folder",
        )


def check_data_dir(data_dir: Path) -> None:
    """Raise LocalServerError unless a server could use *data_dir* now; make the folder if needed.

    Call it before loading a model, which takes long.  Waits like `FolderLock.acquire`.
    """
    lock = FolderLock(data_dir)
    with folder_errors(data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    lock.release()


@contextlib.contextmanager
def folder_errors(data_dir: Path) -> Iterator[None]:
    """Turn errors of the file system and of SQLite into a LocalServerError about *data_dir*."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileExistsError):  # from mkdir: the path is not a folder
            reason = "it is a file"
        raise _unusable(
            data_dir,
            f"cannot use the data directory {data_dir}: {reason}",
            "Choose a folder that can be written, on a disk with free space",
        ) from error


def _unusable(data_dir: Path, message: str, remedy: str) -> LocalServerError:
    hint = ErrorText(f"{remedy} (", Setting("data_dir", ..., option="--data-dir"), ").")
    error = LocalServerError(message, hint=hint)
    error.data_dir = str(data_dir)
    return error
