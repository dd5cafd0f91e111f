"""Work that finalizers leave for later, when it is safe to take locks and to log.

A finalizer may run at any time in any thread, even while that thread holds a lock of this package
or of logging.  So it only puts its work into a queue here.  The next call of any client, the
heartbeats or the exit of the process runs it, whichever comes first.
"""

from __future__ import annotations

import atexit
import logging
import queue
import sys
from typing import Any, Callable, Tuple

logger = logging.getLogger(__name__)

# A SimpleQueue is safe to put into from finalizers (bpo-32576).
_deferred: queue.SimpleQueue[Tuple[Callable[..., object], Tuple[Any, ...]]] = queue.SimpleQueue()
_runs_at_exit = False


def defer(function: Callable[..., object], *args: Any) -> None:
    """Have ``function(*args)`` called later.  Safe in finalizers."""
    global _runs_at_exit
    _deferred.put((function, args))
    if not _runs_at_exit:  # registered twice, if two threads race, it does no harm
        _runs_at_exit = True
        atexit.register(run_deferred)


def call_from_finalizer(function: Callable[..., object], *args: Any) -> None:
    """Call ``function(*args)`` now, or later if the finalizer has interrupted this package."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("tinkex."):
            defer(function, *args)
            return
        frame = frame.f_back
    function(*args)


def run_deferred() -> None:
    """Do what finalizers left to be done.  Thread-safe."""
    while not _deferred.empty():
        try:
            function, args = _deferred.get_nowait()
        except queue.Empty:  # another thread was faster
            return
        try:
            function(*args)
        except Exception:
            logger.exception("deferred work failed")
