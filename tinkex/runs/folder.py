"""RunFolder: the files of a run, which one process holds."""

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
    """Holds the folder *path* until `close`; creates it if it is missing.  For one thread.

    Attributes:
        record: the contents of the journal, kept up to date.

    Raises:
        RunFolderError: the folder is in use, damaged or not writable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with contextlib.ExitStack() as opened:
            try:
                path.mkdir(parents=True, exist_ok=True)
                # Lock before opening the journal, which cuts off a torn last line: another process
                # might be writing that line.
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
            # In reverse order: the journal is closed before the lock is released.
            self.close = opened.pop_all().close

    def check(self, spec: Mapping[str, Any], config: Mapping[str, Any], accept: bool) -> None:
        """Compare *spec* and *config* with those in the journal; write them if they differ.

        Args:
            accept: accept a different *config*.

        Raises:
            RunFolderError: the folder holds a run with a different *spec* or *config*.
        """
        check_same(self._path, self.record, spec, config, accept)
        # Only if they differ: a config line also marks the run as unfinished (`RunRecord.add`).
        if (spec, config) != (self.record.spec, self.record.config):
            self.note("config", format=1, spec=spec, config=config)

    def note(self, kind: str, **facts: Any) -> None:
        """Add a line to the journal and apply it to the record; see `Journal.append`."""
        self.record.add(self._journal.append(kind, **facts))


def check_same(
    path: Path,
    record: RunRecord,
    spec: Mapping[str, Any],
    config: Mapping[str, Any],
    accept: bool,
) -> None:
    """Raise RunFolderError if *spec* or *config* differ from those of *record*, read from *path*.

    If *accept* is true, a different *config* is accepted.  A run that never began, for example
    because the server rejected its settings, may be replaced.
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
    """Locks *folder* until `release`, or until the process ends for whatever reason.

    A forked child does not hold the lock.  On Windows, nothing is locked: concurrent use of a
    folder is not detected.

    Raises:
        RunFolderError: another process, or another run in this process, holds the folder.
        OSError: the lock file cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        # Don't truncate the file before it is locked: its text may name another holder.
        self._file: Optional[int] = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(self._file, folder)
            # The text is for other processes' error messages; the kernel holds the lock itself.
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
            # Not LOCK_UN: in a forked child it would release the parent's lock, too.
            os.close(file)

    def close_at_exit(self, status: str, timeout_s: float) -> None:
        """Release the lock when the interpreter exits."""
        self.release()

    def forget_after_fork(self) -> None:
        """Release the lock in a forked child, which would otherwise share it with its parent."""
        self.release()


def _lock(file: int, folder: Path) -> None:
    if sys.platform == "win32":  # where a lock would also keep others from reading the text
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
