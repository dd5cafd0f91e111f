"""File descriptors: whether they have run out, and how many connections they allow."""

from __future__ import annotations

import errno
import sys
from typing import Optional

if sys.platform != "win32":
    import resource

#: Descriptors left for everything but connections: files, pipes, libraries, the program.
_RESERVED = 64


def are_exhausted(error: BaseException) -> bool:
    """Return whether *error*, or an error behind it, means that file descriptors have run out."""
    seen: Optional[BaseException] = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.EMFILE, errno.ENFILE):
            return True
        # requests and urllib3 keep a wrapped error in args[0] or `reason`, not always as the cause.
        inner = seen.args[0] if seen.args and isinstance(seen.args[0], BaseException) else None
        reason = getattr(seen, "reason", None)
        seen = reason if isinstance(reason, BaseException) else inner or seen.__cause__
    return False


def limit() -> Optional[int]:
    """Return how many descriptors this process may have open; None if unknown or unlimited."""
    if sys.platform == "win32":
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def connection_cap() -> int:
    """Return how many connections may be open at most.

    Half of the descriptors: with an embedded server in this process, a connection takes two.
    """
    allowed = limit()
    return sys.maxsize if allowed is None else max(8, (allowed - _RESERVED) // 2)


def advice() -> str:
    """Return what the user can do if descriptors run out."""
    allowed = limit()
    limit_is = (
        f"The limit of this process is {allowed}" if allowed is not None else "There is a limit"
    )
    return f"{limit_is}; raise it with `ulimit -n 4096` before the program starts."
