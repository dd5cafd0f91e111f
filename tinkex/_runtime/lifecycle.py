"""What happens when the process exits or forks, and the work that finalizers leave for later.

One ``atexit`` hook and one fork hook per process, installed with the first `track`; both walk
weak references, so tracking keeps nothing alive.  Nothing starts at import, and the exit hook
starts no thread (Thread.start fails there on Python 3.12).

A finalizer may run at any time in any thread, even while that thread holds a lock of this package
or of logging.  So it only defers its work: the next call of any client, the heartbeats or the exit
of the process runs it, whichever comes first.
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

#: All clients together get this long at interpreter exit, in seconds.
EXIT_BUDGET_S = 2.0


class Tracked(Protocol):
    """Something open that has to know of exit and fork."""

    def close_at_exit(self, status: str, timeout_s: float) -> None:
        """Close within *timeout_s*; *status* is success, errored or interrupted."""

    def forget_after_fork(self) -> None:
        """Called in the child of a fork: become unusable, without I/O and without locks."""


# Guards _tracked and _installed, and the module state of others.  Held for a few statements.
_lock = threading.Lock()
# Used as a set that keeps its order: what was opened last is closed first.
_tracked: weakref.WeakKeyDictionary[Tracked, None] = weakref.WeakKeyDictionary()
_installed = False
_hooked_pid = 0  # the multiprocessing child that _hook_multiprocessing has prepared

# What finalizers deferred.  Appending to a deque is atomic and takes no lock.
_deferred: Deque[Tuple[Callable[..., object], Tuple[Any, ...]]] = collections.deque()
_runs_at_exit = False


def module_lock() -> threading.Lock:
    """The one lock for module-level state; call this each time, since a fork replaces it.

    Hold it for a few statements, without I/O or calls that might take it.
    """
    return _lock


def track(thing: Tracked) -> None:
    """Have *thing* closed at exit, and notified of forks, for as long as it lives."""
    global _installed, _hooked_pid
    with _lock:
        _tracked[thing] = None
        install, _installed = not _installed, True
        hook, _hooked_pid = _hooked_pid != os.getpid(), os.getpid()
    if hook:
        _hook_multiprocessing()
    if install:
        # urllib3 closes its pools when weakref's own exit hook runs.  Hooks run in reverse: have
        # that one registered before ours, because ending a session takes a connection.
        weakref.finalize(thing, int).detach()
        atexit.register(_at_exit)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_after_fork_in_child)


def untrack(thing: Tracked) -> None:
    """Stop tracking *thing*; nothing happens if it is not tracked."""
    with _lock:
        _tracked.pop(thing, None)


def exit_status() -> str:
    """How the process is ending: success, errored or interrupted.

    The interpreter leaves an uncaught exception's type in ``sys.last_type``; a child of
    multiprocessing is still handling it.
    """
    last = getattr(sys, "last_type", None) or sys.exc_info()[0]
    if last is None:
        return "success"
    return "errored" if issubclass(last, Exception) else "interrupted"


def _hook_multiprocessing() -> None:
    """Have multiprocessing call us: before Python 3.13 most of its children skip ``atexit``."""
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
        # Half of what is left: one that hangs must not use up the time of all, and an equal share
        # would be too short for a busy machine when there are many.  The last one gets the rest.
        left_s = deadline - time.monotonic()
        share_s = max(0.05, left_s if count == len(things) else left_s / 2)
        try:
            thing.close_at_exit(status, share_s)
        except Exception:
            logger.debug("closing %r at exit failed", thing, exc_info=True)
    if getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1"):
        _restore_interrupt()


def _restore_interrupt() -> None:
    """Have the interpreter exit as interrupted (SIGINT) although code was compiled since.

    It forgets the KeyboardInterrupt that ended the program as soon as any thread executes source
    text, as the import of a module with a dataclass does, and would exit with 1.  Source text that
    ends with a KeyboardInterrupt makes it remember.
    """
    with contextlib.suppress(KeyboardInterrupt):
        exec("raise KeyboardInterrupt")


def _after_fork_in_child() -> None:
    global _lock, _hooked_pid
    _lock = threading.Lock()  # the parent's may be held by a thread that does not exist here
    things = list(_tracked)
    _tracked.clear()
    for thing in things:
        thing.forget_after_fork()
    _hooked_pid = 0  # multiprocessing forgets its hooks only after this


def defer(function: Callable[..., object], *args: Any) -> None:
    """Have ``function(*args)`` called later.  Safe in finalizers."""
    global _runs_at_exit
    _deferred.append((function, args))
    if not _runs_at_exit:  # registered twice, if two threads race, it does no harm
        _runs_at_exit = True
        atexit.register(run_deferred)


def call_from_finalizer(function: Callable[..., object], *args: Any) -> None:
    """Call ``function(*args)`` now, or later if the finalizer has interrupted this package."""
    # The finalizer itself is the first frame.  Any of ours below it may hold one of our locks.
    frame = sys._getframe(1).f_back
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("tinkex."):
            defer(function, *args)
            return
        frame = frame.f_back
    function(*args)


def run_deferred() -> None:
    """Do what finalizers left to be done.  Thread-safe."""
    while _deferred:
        try:
            function, args = _deferred.popleft()
        except IndexError:  # another thread was faster
            return
        try:
            function(*args)
        except Exception:
            logger.exception("deferred work failed")
