"""File locks between processes; the system releases them when their holder ends."""

from __future__ import annotations

import sys


def lock_file(descriptor: int) -> None:
    """Lock an open, writable file without waiting; closing the file releases the lock.

    Raises:
        BlockingIOError: another process, or another open file of this one, has the lock.
        OSError: the file system does not support locks.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
    else:
        import fcntl

        # Not lockf: its locks belong to the process, so that two open files of one process would
        # share one.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
