"""Runtime: what all clients of one server share, with or without a live session.

A ServiceClient opens a runtime with a session, and so does a sampling client that was sent here by
another process.  A RestClient or AdminClient made on its own opens a runtime without a session, and
nothing is created on the server.  Every client refers to its runtime, which owns everything that
starts a thread.

Threads: those of the poller and of the session manager; ``tinkex-create-i`` (``tinkex-rest-i``
without a session) for calls that block; ``tinkex-submit-<run>`` for each training run with work;
and ``tinkex-telemetry``.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
import threading
import time
import uuid
import warnings
import weakref
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple, Type, TypeVar

from tinkex._results.poller import Poller
from tinkex._runtime import lifecycle
from tinkex._sessions.session import Session
from tinkex._transport.resources import ClientResources
from tinkex._transport.tracing import active
from tinkex.config import Config
from tinkex.errors import ClientClosedError
from tinkex.futures import APIFuture
from tinkex.usage import Ledger

if TYPE_CHECKING:
    from tinkex._sessions.manager import SessionManager
    from tinkex._sessions.telemetry import Reporter

logger = logging.getLogger(__name__)

T = TypeVar("T")

# This process's runtimes with a session, by (process id, session id), so that the child of a fork
# does not find its parent's.  Guarded by lifecycle.module_lock().
_by_session: weakref.WeakValueDictionary[Tuple[int, str], Runtime] = weakref.WeakValueDictionary()

#: How many calls run in the background at the same time; further calls wait.
_BACKGROUND_THREADS = 8

#: `close` spends at most this long, in seconds, on telemetry that was not sent yet.
TELEMETRY_S = 1.0


class Runtime:
    """The transport, threads and counters that the clients of one server share.  Thread-safe.

    Args:
        config: settings of the clients.
        manager: opens the session and keeps it alive; None for a runtime without a session.
        session_id: a session that another process opened, to be kept alive but not ended here.

    With a *manager*, the constructor blocks until the server has created the session, unless
    *session_id* is given.  Without a manager, it sends nothing; calls ride out an outage for only
    ``startup_timeout_s`` until the server has responded once, so that a wrong address is reported
    soon, and for ``max_outage_s`` from then on.

    Raises:
        APIError: the session could not be created; nothing is left behind.

    Attributes:
        config: as given.
        resources: the transport, and the limits and counters of the clients' work.
        transport: the transport of *resources*; sends every request except heartbeats and
            telemetry, which have their own.
        poller: owns all outstanding futures.
        ledger: what the clients have used, and their budget.
        recorder: counts requests, for `ServiceClient.metrics`.
        telemetry: reports failures to the server, or None.
    """

    def __init__(
        self,
        config: Config,
        manager: Optional[SessionManager] = None,
        session_id: Optional[str] = None,
    ) -> None:
        self.config = config
        self._opened_at = _callers_line()
        self._pid = os.getpid()
        self._closing = threading.Event()
        self._closed = threading.Event()
        # Guards _closer, the only thread that closes the runtime.  Not held while it closes.
        self._lock = threading.Lock()
        self._closer: Optional[threading.Thread] = None
        self.ledger = Ledger(config.budget, config.prices)
        if manager is None:
            outage_s = min(config.startup_timeout_s, config.max_outage_s)
            at_first = dataclasses.replace(config, max_outage_s=outage_s)
        else:  # creating the session shows that the server can be reached
            at_first = config
        self.resources = ClientResources.open(at_first, self._closing)
        self.transport = self.resources.transport
        self.recorder = self.resources.recorder
        self._session: Optional[Session] = None
        if manager is not None:
            self._session = Session(config, manager, self.transport, session_id)
        try:
            self._set_up(config)
        except BaseException:  # Ctrl-C too
            if self._session is not None:
                self._session.stop("interrupted", None, timeout_s=2.0)
            raise

    def _set_up(self, config: Config) -> None:
        session = self._session
        self.telemetry: Optional[Reporter] = None
        if config.telemetry:
            from tinkex._sessions.telemetry import open_reporter  # most programs never need it

            reported_id = f"sessionless-{uuid.uuid4()}" if session is None else session.session_id
            self.telemetry = open_reporter(config, reported_id)
        report = None if self.telemetry is None else self.telemetry.operation_failed
        pools = self.resources.pools
        if session is None:
            # Futures hold no reference to the runtime: a dropped runtime is collected right away.
            self.poller = Poller(self.resources, on_failure=report)
            self._background = pools.make("tinkex-rest", _BACKGROUND_THREADS)
        else:
            # An unsettled future keeps the runtime alive, so that a program may drop its clients
            # and keep their futures.  Otherwise there is no reference cycle: a dropped runtime is
            # collected, and ends its session, right away.
            self.poller = Poller(self.resources, session.explain, report, self)
            self._background = pools.make("tinkex-create", _BACKGROUND_THREADS, idle_s=1.0)
        if self.telemetry is not None:
            # The reporter's thread, unlike those of the pools, does not end by itself when the
            # runtime is collected.  At exit, close_at_exit ends it.
            weakref.finalize(self, self.telemetry.finalizer_hook).atexit = False
            if session is not None and session.owned:
                self.telemetry.session_started()
        lifecycle.track(self)
        if session is not None:
            with lifecycle.module_lock():
                _by_session[os.getpid(), session.session_id] = self

    @classmethod
    def attach(cls, config: Config, manager: SessionManager, session_id: str) -> Runtime:
        """Return this process's runtime of the session, or open one that keeps it alive."""
        with lifecycle.module_lock():
            found = _by_session.get((os.getpid(), session_id))
        # Share the runtime of the client that opened the session in this process, or was unpickled
        # here earlier.
        if found is not None and not found.closed:
            return found
        return cls(config, manager, session_id)

    @property
    def session(self) -> Session:
        """The live session.

        Raises:
            RuntimeError: there is no session; only a ServiceClient makes clients that need one.
        """
        if self._session is None:
            raise RuntimeError("this client has no session")
        return self._session

    @property
    def session_id(self) -> Optional[str]:
        """The server's id of the session, for errors; None if there is no session."""
        return None if self._session is None else self._session.session_id

    @property
    def closed(self) -> bool:
        """True once `close` has begun."""
        return self._closing.is_set()

    @property
    def forked(self) -> bool:
        """True in the child of a fork, where the runtime must not be used.

        Its locks may be held forever there, and its sockets are shared with the parent: touch
        neither.
        """
        return self._pid != os.getpid()

    def ensure_open(self, what: str) -> None:
        """Raise ClientClosedError, naming *what* was called, unless the runtime is usable here."""
        self.ensure_not_forked(what)
        if not self._closing.is_set():
            return
        if self._session is None:
            raise ClientClosedError(f"{what}: the client was closed", hint="Create a new one.")
        raise ClientClosedError(
            f"{what}: the ServiceClient of session {self.session_id} was closed",
            session_id=self.session_id,
            hint="Create a new ServiceClient, or do the work inside its `with` block.",
        )

    def ensure_not_forked(self, what: str) -> None:
        """Raise ClientClosedError, naming *what* was called, in the child of a fork."""
        if self.forked:
            kind = "client" if self._session is None else "ServiceClient"
            raise ClientClosedError(
                f"{what}: this client belongs to the parent process of a fork",
                session_id=self.session_id,
                hint=f"Create a {kind} in the child process.",
            )

    def run(self, kind: str, work: Callable[[], T]) -> APIFuture[T]:
        """Run *work* on a background thread; return its future without blocking."""
        self.ensure_open(kind)  # a closed runtime would also raise below, without naming the call
        future: APIFuture[T] = self.poller.new_future(kind)
        future.enter("submitting")
        self._background.submit(functools.partial(self._run_now, future, work))
        return future

    def _run_now(self, future: APIFuture[T], work: Callable[[], T]) -> None:
        if future.done():  # cancelled while it waited for a thread
            return
        try:  # on tinkex-create-i or tinkex-rest-i
            with active(future.operation):
                value = work()
            self.transport.config = self.config  # the server responded: from now on, max_outage_s
            future.try_set_result(value)
        except Exception as error:
            self.poller.fail(future, error)

    def close(
        self, status: str = "success", detail: Optional[str] = None, *, timeout_s: float = 5.0
    ) -> None:
        """End everything within about *timeout_s*.  Idempotent and thread-safe.

        The order: refuse new work, so that nothing is added; settle the outstanding futures, so
        that every waiter wakes; abort the requests in flight; acknowledge results; stop the
        heartbeats and finish the session; send the remaining telemetry, for at most a second; wait
        for the threads.
        """
        if self.forked:
            return
        deadline = time.monotonic() + timeout_s
        with self._lock:
            mine = self._closer is None
            if mine:
                self._closer = threading.current_thread()
        if not mine:
            # A callback on one of our threads must not wait for a close that joins its thread.
            if not threading.current_thread().name.startswith("tinkex-"):
                self._closed.wait(max(0.0, deadline - time.monotonic()))
            return
        try:
            self._stop_work()
            self.poller.flush_acknowledgements(deadline)
            if self._session is not None:
                self._session.stop(status, detail, timeout_s=_half_of_rest(deadline))
            if self.telemetry is not None:
                self._close_telemetry(min(_half_of_rest(deadline), TELEMETRY_S))
            self._join(deadline)
        except BaseException:
            with self._lock:
                self._closer = None  # Ctrl-C: the next close, at exit at the latest, continues
            raise
        lifecycle.untrack(self)
        self._closed.set()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, exc_type: Optional[Type[BaseException]], *exc: object) -> None:
        self.close(*outcome_of(exc_type))

    def close_at_exit(self, status: str, timeout_s: float) -> None:
        """See lifecycle.Tracked.  The manager, which is closed after us, finishes the session."""
        self._stop_work()
        self.poller.flush_acknowledgements(time.monotonic() + min(timeout_s / 2, 0.25))
        self._join(time.monotonic() + min(timeout_s / 2, 0.5))
        if self.telemetry is not None:
            self._close_telemetry(min(timeout_s / 2, 0.5))
        self._closed.set()

    def _stop_work(self) -> None:
        """Refuse new work, wake every waiter, and have the threads end."""
        # Set the event first: without it, an aborted request looks like an outage and is retried.
        self._closing.set()
        self.poller.close(
            ClientClosedError(
                "the client was closed before this was done", session_id=self.session_id
            )
        )
        self.resources.abort()

    def _close_telemetry(self, timeout_s: float) -> None:
        assert self.telemetry is not None
        session_ends = self._session is not None and self._session.owned
        self.telemetry.close(timeout_s, ended=session_ends)

    def _join(self, deadline: float) -> None:
        stayed = self.poller.join(deadline)
        if stayed:
            logger.info("closed, but these threads are still busy: %s", ", ".join(stayed))

    def forget_after_fork(self) -> None:
        """See lifecycle.Tracked: nothing to do, since every method checks `forked`."""

    def __del__(self) -> None:
        # If __init__ has failed, attributes may be missing, and the caller already has the error.
        session = getattr(self, "_session", None)
        if session is None or not session.owned or not hasattr(self, "_background"):
            return
        # No lock and no join: this may run in any thread, even inside one of our locks.
        if self._closer is None and not self._closed.is_set() and not self.forked:
            # Without source=self: whoever records the warning would keep the session alive.
            warnings.warn(
                f"unclosed ServiceClient of session {session.session_id}, opened at "
                f"{self._opened_at}; use `with ServiceClient(...)` or close()",
                ResourceWarning,
                stacklevel=2,
            )


def work_in_flight() -> Dict[str, List[APIFuture[Any]]]:
    """Return the unsettled futures of this process, by session id.  Does not block."""
    with lifecycle.module_lock():
        runtimes = [item for item in _by_session.items() if item[0][0] == os.getpid()]
    return {session_id: runtime.poller.inflight() for (_, session_id), runtime in runtimes}


def outcome_of(exc_type: Optional[Type[BaseException]]) -> Tuple[str, Optional[str]]:
    """Return the status and detail of a session whose ``with`` block ended with *exc_type*, if any.

    Without an exception, *exc_type* is None.
    """
    if exc_type is None:
        return "success", None
    failed = issubclass(exc_type, Exception)  # Ctrl-C and SystemExit are no failure
    return "errored" if failed else "interrupted", exc_type.__name__


def _half_of_rest(deadline: float) -> float:
    """Return half of the time that is left, so that later steps get some, too."""
    return max(0.2, (deadline - time.monotonic()) / 2)


def _callers_line() -> str:
    """Return ``file:line`` of the first caller outside this package."""
    frame: Any = sys._getframe(1)
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
