"""The access log: one line for each answered request.  Off unless LocalServer is given a writer.

Runs in the HTTP threads, after the request and outside of all locks.
"""

from __future__ import annotations

import time
from typing import Any, Callable

#: Gets one line, without its newline; called from several threads.
WriteLine = Callable[[str], None]


def log_request(write: WriteLine, request: Any, status: str, seconds: float) -> None:
    """Write the line of one request: when it was answered, method, path, status, milliseconds.

    Args:
        request: waitress's; one that could not be read lacks its method and path.
        status: the code, and the reason after it.
        seconds: how long the answer took.
    """
    # Without the query, which may hold a signature; escaped, since it may hold anything.
    path = ascii(getattr(request, "request_uri", "-").partition("?")[0])[1:-1]
    method = ascii(getattr(request, "command", None) or "-")[1:-1]
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    write(f"{stamp} {method} {path} {status[:3]} {seconds * 1000:.1f} ms")
