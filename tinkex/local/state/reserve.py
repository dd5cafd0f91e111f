"""Reserve: some disk space kept for the database, so that a full disk can be emptied again.

Even a deletion is first written to the log of the database, which takes room.  No thread of its
own; thread-safe.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

#: Room for some hundred changes.
RESERVE_BYTES = 1 << 20


class Reserve:
    """A file at *path* that is deleted when its room is needed."""

    def __init__(self, path: Path, size: int = RESERVE_BYTES) -> None:
        self._path = path
        self._size = size
        # Guards the file.
        self._lock = threading.Lock()

    def fill(self) -> None:
        """Make the file if it is not there and there is room for it."""
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
        """Delete the file; tell whether there was one."""
        with self._lock:
            try:
                self._path.unlink()
            except OSError:
                return False
            return True
