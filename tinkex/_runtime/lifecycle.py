"""What happens when the process exits or forks, and the work that finalizers defer.

There is one ``atexit`` hook and one fork hook per process, installed at the first `track`; both
walk weak references, so tracking keeps nothing alive.  Nothing starts at import, and the exit hook
starts no thread (Thread.start fails there on Python 3.12).

A finalizer may run at any time in any thread, even while that thread holds a lock of this package
or of logging.  So it only defers its work, which is run by the next call of any client, by the
heartbeats or at the exit of the process, whichever comes first.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from typing import Any, Callable, Deque, List, Protocol, Tuple

logger = logging.getLogger(__name__)

#: The time for closing all clients at interpreter exit, in seconds.
EXIT_BUDGET_S = 2.0


class Tracked(Protocol):
    """An open object that must be notified of exit and fork."""

    def close_at_exit(self, status: str, timeout_s: float) -> None:
        """Close within *timeout_s*; *status* is success, errored or interrupted."""

    def forget_after_fork(self) -> None:
        """Called in the child of a fork: become unusable, without I/O and without locks."""


# Guards _tracked, _installed and the state of other modules.  Held for a few statements only.
_lock = threading.Lock()
# Used as an ordered set: the last object opened is closed first.
_tracked: weakref.WeakKeyDictionary[Tracked, None] = weakref.WeakKeyDictionary()
_installed = False
_hooked_pid = 0  # the process whose _hook_multiprocessing has run

# What finalizers deferred.  Appending to a deque is atomic and takes no lock.
_deferred: Deque[Tuple[Callable[..., object], Tuple[Any, ...]]] = collections.deque()
_runs_at_exit = False


def module_lock() -> threading.Lock:
    """Return the one lock for module-level state.  Don't keep it: a fork replaces it.

    Hold it for a few statements only, without I/O or calls that might take it.
    """
    return _lock


def track(thing: Tracked) -> None:
    """Have *thing* closed at exit and notified of forks, as long as it lives."""
    global _installed, _hooked_pid
    with _lock:
        _tracked[thing] = None
        install, _installed = not _installed, True
        hook, _hooked_pid = _hooked_pid != os.getpid(), os.getpid()
    if hook:
        _hook_multiprocessing()
    if install:
        # urllib3 closes its pools when weakref's own exit hook runs.  Exit hooks run in reverse
        # order, so this has weakref register its hook before ours: ending a session takes a
        # connection.
        weakref.finalize(thing, int).detach()
        atexit.register(_at_exit)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_after_fork_in_child)


def untrack(thing: Tracked) -> None:
    """Stop tracking *thing*; a no-op if it is not tracked."""
    with _lock:
        _tracked.pop(thing, None)


def exit_status() -> str:
    """Return how the process is ending: success, errored or interrupted.

    The interpreter leaves an uncaught exception's type in ``sys.last_type``; in a child of
    multiprocessing, it is still being handled.
    """
    last = getattr(sys, "last_type", None) or sys.exc_info()[0]
    if last is None:
        return "success"
    return "errored" if issubclass(last, Exception) else "interrupted"


def _hook_multiprocessing() -> None:
    """Have multiprocessing call our exit hook: before Python 3.13 most children skip ``atexit``."""
    process, util = (sys.modules.get(f"multiprocessing.{name}") for name in ("process", "util"))
    if process is not None and util is not None and process.parent_process() is not None:
        util.Finalize(None, _at_exit, exitpriority=1)


def _at_exit() -> None:
    with _lock:
        # Newest first: a ServiceClient is closed before the manager that finishes its session.
        things: List[Tracked] = list(_tracked)[::-1]
    status = exit_status()
    deadline = time.monotonic() + EXIT_BUDGET_S
    for count, thing in enumerate(things, 1):
        # Each gets half of the time left, and the last one the rest: one that hangs must not use up
        # all the time, and with many objects an equal share would be too short on a busy machine.
        left_s = deadline - time.monotonic()
        share_s = max(0.05, left_s if count == len(things) else left_s / 2)
        try:
            thing.close_at_exit(status, share_s)
        except Exception:
            logger.debug("closing %r at exit failed", thing, exc_info=True)
    if getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1"):
        _restore_interrupt()


def _restore_interrupt() -> None:
    """Make the interpreter exit as interrupted (SIGINT) even if code was compiled in the meantime.

    The interpreter forgets the KeyboardInterrupt that ended the program, and would exit with 1, as
    soon as any thread executes source text, as the import of a module with a dataclass does.
    Executing source text that ends with a KeyboardInterrupt makes it remember.
    """
    with contextlib.suppress(KeyboardInterrupt):
        exec("raise KeyboardInterrupt")


def _after_fork_in_child() -> None:
    global _lock, _hooked_pid
    _lock = threading.Lock()  # a thread that does not exist here may hold the parent's
    things = list(_tracked)
    _tracked.clear()
    for thing in things:
        thing.forget_after_fork()
    _hooked_pid = 0  # multiprocessing drops its hooks only after this


def defer(function: Callable[..., object], *args: Any) -> None:
    """Have ``function(*args)`` called later.  Safe in finalizers."""
    global _runs_at_exit
    _deferred.append((function, args))
    if not _runs_at_exit:  # if two threads race, registering it twice does no harm
        _runs_at_exit = True
        atexit.register(run_deferred)


def call_from_finalizer(function: Callable[..., object], *args: Any) -> None:
    """Call ``function(*args)`` now, or later if the finalizer has interrupted this package."""
    # The first frame is the finalizer itself.  Any frame of ours below it may hold one of our
    # locks.
    frame = sys._getframe(1).f_back
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("tinkex."):
            defer(function, *args)
            return
        frame = frame.f_back
    function(*args)


def run_deferred() -> None:
    """Run the work that finalizers deferred.  Thread-safe."""
    while _deferred:
        try:
            function, args = _deferred.popleft()
        except IndexError:  # another thread was faster
            return
        try:
            function(*args)
        except Exception:
            logger.exception("deferred work failed")
