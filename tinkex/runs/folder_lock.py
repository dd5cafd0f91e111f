"""FolderLock: one process at a time writes to a run folder."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Optional

from tinkex._runtime import lifecycle
from tinkex.errors import RunFolderError

LOCK_NAME = "run.lock"


class FolderLock:
    """Holds *folder* until `release`, or the end of the process, however that comes.

    The child of a fork does not hold it.  Where there is no ``fcntl`` (Windows), two processes on
    one folder go unnoticed.

    Raises:
        RunFolderError: another process, or another run of this one, holds the folder.
        OSError: the lock file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._file: Optional[int] = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(self._file, folder)
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
            os.close(file)

    def close_at_exit(self, status: str, timeout_s: float) -> None:
        """Called at the end of the interpreter."""
        self.release()

    def forget_after_fork(self) -> None:
        """Called in the child of a fork, which would hold the lock together with its parent."""
        self.release()


def _lock(file: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(file, 200, 0).decode(errors="replace") or "another process"
        raise RunFolderError(
            f"the run folder {folder} is in use by {holder}",
            hint="Wait until it has ended, or stop it; a run in a notebook is closed by "
            "run.close(). Two runs need two folders.",
        ) from error
