"""RunFolder: the files of a run, held by one process."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import Any, List, Mapping, Optional, Union

from tinkex._runtime import lifecycle
from tinkex._runtime.error_text import ErrorText, Setting
from tinkex._runtime.file_lock import lock_file
from tinkex.errors import RunFolderError
from tinkex.runs.journal import JOURNAL_NAME, WRITABLE, Journal
from tinkex.runs.records import RunRecord, replay

LOCK_NAME = "run.lock"


class RunFolder:
    """Holds the folder *path*, which is made if it is missing, until `close`.  For one thread.

    Attributes:
        record: the contents of the journal, up to date.

    Raises:
        RunFolderError: the folder is in use, damaged or not writable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with contextlib.ExitStack() as opened:
            try:
                path.mkdir(parents=True, exist_ok=True)
                # Before the journal is opened, which cuts off a torn line: that may be one which
                # another process is writing.
                opened.callback(FolderLock(path).release)
            except OSError as error:
                is_file = isinstance(error, FileExistsError)
                raise RunFolderError(
                    f"cannot use the run folder {path}: "
                    f"{'it is not a folder' if is_file else error.strerror or error}",
                    hint="Choose another folder." if is_file else WRITABLE,
                ) from error
            self._journal = Journal(path)
            opened.callback(self._journal.close)
            self.record: RunRecord = replay(self._journal.entries, path / JOURNAL_NAME)
            # In reverse order: the journal is closed before the lock lets another process in.
            self.close = opened.pop_all().close

    def check(self, spec: Mapping[str, Any], config: Mapping[str, Any], accept: bool) -> None:
        """Compare *spec* and *config* with the journal's; note them if they are new.

        Args:
            accept: another *config* is no error.

        Raises:
            RunFolderError: they are of another run.
        """
        check_same(self._path, self.record, spec, config, accept)
        # Not each time: a line of this kind also marks the run as unfinished (`RunRecord.add`).
        if (spec, config) != (self.record.spec, self.record.config):
            self.note("config", format=1, spec=spec, config=config)

    def note(self, kind: str, **facts: Any) -> None:
        """Add a line to the journal, and to the record; see `Journal.append`."""
        self.record.add(self._journal.append(kind, **facts))


def check_same(
    path: Path,
    record: RunRecord,
    spec: Mapping[str, Any],
    config: Mapping[str, Any],
    accept: bool,
) -> None:
    """Raise RunFolderError if *spec* or *config* are not those of *record*, read from *path*.

    A run that never began, as its settings were rejected, may be replaced.  *accept*: another
    *config* is no error.
    """
    if not record.has_begun:
        return
    _compare(path, record.spec, spec, "Give the same settings, or another folder.")
    if not accept:
        accepted = Setting("accept_changes", True)
        hint = ErrorText("Give the same settings, another folder, or ", accepted, ".")
        _compare(path, record.config, config, hint)


def _shown(value: Any) -> str:
    return "not given" if value is None else repr(value)


def _compare(path: Path, was: Mapping[str, Any], now: Mapping[str, Any], hint: str) -> None:
    changes: List[Union[str, Setting]] = []
    for name in sorted({*was, *now}):
        if was.get(name) != now.get(name):
            values = f" was {_shown(was.get(name))}, now {_shown(now.get(name))}"
            changes += ["; " if changes else ": ", Setting(name), values]
    if changes:
        raise RunFolderError(
            ErrorText(f"{path} holds a run with other settings", *changes), hint=hint
        )


class FolderLock:
    """Holds *folder* until `release`, or the end of the process by whatever cause.

    The child of a fork does not hold it.  On Windows, two processes on one folder go
    unnoticed.

    Raises:
        RunFolderError: another process, or another run of this one, holds the folder.
        OSError: the lock file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        # Not truncated before it is locked: until then the text is that of the holder.
        self._file: Optional[int] = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(self._file, folder)
            # For the error of another process; the lock itself is in the kernel, not in the text.
            os.ftruncate(self._file, 0)
            os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode())
            lifecycle.track(self)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let other processes open the folder; idempotent."""
        file, self._file = self._file, None
        if file is not None:
            # Not LOCK_UN, which in the child of a fork would take the lock away from the parent,
            # too.
            os.close(file)

    def close_at_exit(self, status: str, timeout_s: float) -> None:
        """Called at the end of the interpreter."""
        self.release()

    def forget_after_fork(self) -> None:
        """Called in the child of a fork, which would hold the lock together with its parent."""
        self.release()


def _lock(file: int, folder: Path) -> None:
    if sys.platform == "win32":  # it would lock the text against reading, too
        return
    try:
        lock_file(file)
    except BlockingIOError as error:
        holder = os.pread(file, 200, 0).decode(errors="replace") or "another process"
        raise RunFolderError(
            f"the run folder {folder} is in use by {holder}",
            hint="Wait until it has ended, or stop it; a run in a notebook is closed by "
            "run.close(). Two runs need two folders.",
        ) from error
