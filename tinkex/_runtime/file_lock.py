"""Locks of files between processes, which the system releases when their holder ends."""

from __future__ import annotations

import sys


def lock_file(descriptor: int) -> None:
    """Lock an open file, which must be writable.  Does not wait; closing the file releases it.

    Raises:
        BlockingIOError: another process, or another open file of this one, has the lock.
        OSError: the file system has no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
    else:
        import fcntl

        # Not lockf, whose locks belong to the process: two open files of one process would share
        # it.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
