"""Journal: the append-only file of a run folder, one JSON object per line.

A line counts only if its line feed was written, and is on disk when `append` returns.  So a crash
can tear only the last line, which is cut off when the journal is opened again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

from tinkex.errors import ClientClosedError, RunFolderError

#: One decoded line; ``kind`` is its type.
Entry = Dict[str, Any]

JOURNAL_NAME = "journal.jsonl"

#: The remedy if a run folder cannot be written.
WRITABLE = (
    "Nothing in it is lost. Once it can be written, run the program again: it continues from the "
    "last checkpoint."
)


class Journal:
    """Appends to the journal of *folder*, which this process has locked.  For one thread.

    Attributes:
        entries: the lines that the file had when it was opened.

    Raises:
        RunFolderError: the file cannot be read or written, or one of its complete lines is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL_NAME
        self._closed = False
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
            try:
                self.entries, self._size = read_entries(self._path)
                # Cut off a torn last line: appended to it, the next line would be damaged, too.
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, 0, os.SEEK_END)
                _sync_folder(folder)
            except BaseException:
                os.close(self._file)
                raise
        except OSError as error:
            raise self._failed("open", error) from error

    def append(self, kind: str, **facts: Any) -> Entry:
        """Append a line and return it once it is on disk.

        Raises:
            RunFolderError: the line could not be written, e.g. because the disk is full; the file
                is as before.
            ClientClosedError: the journal was closed.
        """
        if self._closed:
            raise ClientClosedError(f"the run in {self._path.parent} was closed")
        entry: Entry = {"kind": kind, "at": round(time.time(), 3), **facts}
        line = memoryview(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        try:
            # Not a buffered file: after a failed write, closing it would write its buffer again.
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            # The caller relies on the line: older checkpoints are deleted once a newer one is in
            # the journal.
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):  # a partial line does not count: it has no line feed
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
            raise self._failed("write", error) from error
        self._size += len(line)  # a failed write is cut back to this size
        return entry

    def close(self) -> None:
        """Close the file; idempotent."""
        if not self._closed:
            self._closed = True
            os.close(self._file)

    def _failed(self, what: str, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"cannot {what} the journal {self._path}: {error.strerror or error}",
            hint=WRITABLE,
        )


def read_entries(path: Path) -> Tuple[List[Entry], int]:
    """Return the complete lines of the journal at *path*, and their total size in bytes.

    Raises:
        OSError: the file cannot be read.
        RunFolderError: a complete line is damaged.
    """
    content = path.read_bytes()
    # The rest was torn by a crash, or another process is writing it right now.
    size = content.rfind(b"\n") + 1
    entries = []
    for number, line in enumerate(content[:size].split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            entry["kind"] = str(entry["kind"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(
                f"line {number} of {path} is damaged",
                hint="Only the last line can be torn by a crash, so something else has changed the "
                "file. Remove that line if you know what it was, or start in a new folder.",
            ) from error
        entries.append(entry)
    return entries, size


def _sync_folder(folder: Path) -> None:
    """Make the name of a new file in *folder* survive a power failure."""
    with contextlib.suppress(OSError):  # not every system can open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


_BINARY = getattr(os, "O_BINARY", 0)  # Windows only
