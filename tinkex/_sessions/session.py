"""Session: one live server session and what all clients made from it share.

A ServiceClient opens one; its training, sampling and REST clients hold on to it.  It owns the
transport and the poller; the session manager beats for it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import threading
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Tuple, TypeVar

from tinkex._api.encoding_choice import Dialect
from tinkex._api.sessions import session_heartbeat
from tinkex._results.poller import Poller
from tinkex._runtime import lifecycle
from tinkex._runtime.single_flight import SingleFlight
from tinkex._runtime.worker_pool import WorkerPool
from tinkex._sessions.manager import SessionManager
from tinkex._transport.server_flags import flags_for
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.errors import (
    APIStatusError,
    ClientClosedError,
    RequestFailedError,
    SessionLostError,
    TinkexError,
)
from tinkex.futures import APIFuture
from tinkex.usage import Ledger

if TYPE_CHECKING:
    from tinkex._sessions.telemetry import Reporter

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The sessions of this process by (process id, session id).  Guarded by lifecycle.module_lock().
_open_here: weakref.WeakValueDictionary[Tuple[int, str], Session] = weakref.WeakValueDictionary()

STATUSES = ("success", "errored", "interrupted")

#: What close may take for the telemetry that waits, in seconds.
TELEMETRY_S = 1.0

#: What a server answers about a thing that it does not have, or not any more.
GONE = (404, 410)
#: So long work that failed may wait to hear whether its session lives, and then nobody asks again.
ASK_TIMEOUT_S, ASK_AGAIN_S = 2.0, 5.0


class Session:
    """A live session.  Thread-safe.

    Args:
        config: settings of the client.
        manager: beats for the session.
        session_id: a session that another process opened, to be kept alive but not ended here.

    Constructing it blocks until the server has created the session, unless *session_id* is given.

    Raises:
        APIError: the session could not be created; nothing is left behind.
    """

    def __init__(
        self, config: Config, manager: SessionManager, session_id: Optional[str] = None
    ) -> None:
        self.config = config
        self.manager = manager
        self.opened_at = _callers_line()
        self._pid = os.getpid()
        self._closing = threading.Event()
        self._closed = threading.Event()
        # Guards _closer (the thread that closes, so that only one does) and _lanes.
        self._lock = threading.Lock()
        self._closer: Optional[threading.Thread] = None
        self._lanes: weakref.WeakSet[WorkerPool] = weakref.WeakSet()
        #: Path of the checkpoint saved last, to resume from.
        self.last_checkpoint: Optional[str] = None
        # next() on a count is atomic; a number is used up even if its request fails.
        self._model_numbers = itertools.count()
        self._sampler_numbers = itertools.count()
        self.dialect = Dialect(config)
        #: What this client has used, and its budget.
        self.ledger = Ledger(config.budget, config.prices)
        self._borrowed = session_id is not None
        if session_id is None:
            session_id = manager.start_session(config, owner=self)
        else:
            manager.adopt_session(config, session_id, owner=self)
        self.session_id = session_id
        # Whether the session lives: asked by one thread at a time, and not again before then.
        self._asking: SingleFlight[None] = SingleFlight()
        self._ask_again_at = 0.0
        try:
            self.transport = Transport(config, closing=self._closing)
            self.transport.billing.find_limit_s = _billing_limit(self.transport)
            #: Reports on the session, if that is wanted.
            self.telemetry: Optional[Reporter] = None
            if config.telemetry:
                from tinkex._sessions.telemetry import open_reporter  # most programs want none

                self.telemetry = open_reporter(config, session_id)
            report = None if self.telemetry is None else self.telemetry.operation_failed
            self.poller = Poller(self.transport, self.explain, report)
            self._background = WorkerPool("tinkex-create", 8, idle_s=1.0)
            stoppers = [*self.poller.stoppers, self._background.stopper]
            if self.telemetry is not None:
                stoppers.append(self.telemetry.stopper)
                if not self._borrowed:
                    self.telemetry.session_started()
            self._finalizer = weakref.finalize(self, _stop_all, stoppers)
            self._finalizer.atexit = False
            lifecycle.track(self)
            with lifecycle.module_lock():
                _open_here[os.getpid(), session_id] = self
        except BaseException:
            manager.stop_session(session_id, "interrupted", timeout_s=2.0)
            raise

    @classmethod
    def attach(cls, config: Config, manager: SessionManager, session_id: str) -> Session:
        """Return this process's Session of that id, or one that keeps alive another process's."""
        with lifecycle.module_lock():
            found = _open_here.get((os.getpid(), session_id))
        if found is not None and not found.closed:
            return found
        return cls(config, manager, session_id)

    def next_model_number(self) -> int:
        """Reserve the next ``model_seq_id`` of the session: 0, 1, ..."""
        return next(self._model_numbers)

    def next_sampler_number(self) -> int:
        """Reserve the next ``sampling_session_seq_id`` of the session: 0, 1, ..."""
        return next(self._sampler_numbers)

    @property
    def closed(self) -> bool:
        """True once close has begun."""
        return self._closing.is_set()

    def ensure_open(self, what: str) -> None:
        """Raise ClientClosedError, naming *what* was asked, unless the session is usable here."""
        self.ensure_not_forked(what)
        if self._closing.is_set():
            raise ClientClosedError(
                f"{what}: the ServiceClient of session {self.session_id} was closed",
                session_id=self.session_id,
                hint="Create a new ServiceClient, or do the work inside its `with` block.",
            )

    def ensure_not_forked(self, what: str) -> None:
        """Raise ClientClosedError, naming *what* was asked, in the child of a fork."""
        if self.forked:
            raise ClientClosedError(
                f"{what}: this client belongs to the parent process of a fork",
                session_id=self.session_id,
                hint="Create a ServiceClient in the child process.",
            )

    @property
    def forked(self) -> bool:
        """True in the child of a fork, where the session is not ours.

        Locks may be dead there, and sockets are the parent's too: touch neither.
        """
        return self._pid != os.getpid()

    def run(self, kind: str, work: Callable[[], T]) -> APIFuture[T]:
        """Run *work* on a background thread; return its future at once."""
        self.ensure_open(kind)
        future: APIFuture[T] = self.poller.new_future(kind)

        def task() -> None:
            if future.done():  # cancelled while it waited for a thread
                return
            try:
                future.settle(work())
            except Exception as error:
                self.poller.fail(future, error)

        future.enter("submitting")
        self._background.submit(task)
        return future

    def explain(self, error: TinkexError) -> TinkexError:
        """Return the error to show for failed work: SessionLostError if the session was lost.

        Blocks for two seconds at most, to ask the server, if the work failed because something
        that it needs is not there: the next heartbeat may be seconds away.
        """
        if error.session_id is None:
            error.session_id = self.session_id
        if not isinstance(error, (APIStatusError, RequestFailedError)):
            return error
        if error.status in GONE and self.manager.lost_reason(self.session_id) is None:
            self._ask_whether_gone()
        reason = self.manager.lost_reason(self.session_id)
        if reason is None:
            return error
        return SessionLostError(
            f"session {self.session_id} was lost ({reason}); then: {error.message}",
            status=error.status,
            request_id=error.request_id,
            session_id=self.session_id,
            hint=self._how_to_replace(),
        )

    def _how_to_replace(self) -> str:
        if self._borrowed:  # what it saved, and where to go on, is known there only
            return (
                "Another process opened this session and has ended or lost it: have that process "
                "make a new sampler, and keep its ServiceClient open while the sampler is used."
            )
        return f"Create a new ServiceClient. {self.how_to_resume()}"

    def _ask_whether_gone(self) -> None:
        """Send a heartbeat, unless one said a moment ago that the session lives."""
        if time.monotonic() < self._ask_again_at:
            return

        def ask() -> None:
            try:
                reply = session_heartbeat(self.transport, self.session_id, timeout_s=ASK_TIMEOUT_S)
            except TinkexError as error:
                logger.debug("whether session %s lives: %s", self.session_id, error)
                return
            if reply.status in GONE:
                self.manager.note_gone(self.session_id, reply.status)
            self._ask_again_at = time.monotonic() + ASK_AGAIN_S

        with contextlib.suppress(ClientClosedError):
            self._asking.run(ask, self._closing)

    def how_to_resume(self) -> str:
        """In words: how to continue a run that cannot go on."""
        last = self.last_checkpoint
        if last:
            return f"Resume with create_training_client_from_state_with_optimizer({last!r})."
        return "No checkpoint was saved by this client: start again, and save_state now and then."

    def new_lane(self, name: str) -> WorkerPool:
        """Make a serial lane with a thread of that *name*; it is stopped with the session."""
        lane = WorkerPool(name, 1)
        with self._lock:
            self._lanes.add(lane)
        return lane

    def close(
        self, status: str = "success", detail: Optional[str] = None, *, timeout_s: float = 5.0
    ) -> None:
        """End the session; at most about *timeout_s*.  Idempotent, safe from several threads.

        The order: refuse new work, so that nothing is added; settle outstanding futures, so that
        every waiter wakes; stop the threads; stop the heartbeats and finish the session; send the
        telemetry that waits, within a second; close connections last, since these need some.
        """
        if self.forked:
            return
        deadline = time.monotonic() + timeout_s
        with self._lock:
            mine = self._closer is None
            if mine:
                self._closer = threading.current_thread()
        if not mine:
            # A callback of ours must not wait for the close that waits for its thread.
            if not threading.current_thread().name.startswith("tinkex-"):
                self._closed.wait(max(0.0, deadline - time.monotonic()))
            return
        try:
            pools = self._stop_work()
            self.poller.say_goodbye(deadline)
            left_s = max(0.2, (deadline - time.monotonic()) / 2)
            self.manager.stop_session(self.session_id, status, detail, timeout_s=left_s)
            if self.telemetry is not None:
                left_s = max(0.2, (deadline - time.monotonic()) / 2)
                self.telemetry.close(min(left_s, TELEMETRY_S), ended=not self._borrowed)
            self._join(pools, deadline)
        except BaseException:
            with self._lock:
                self._closer = None  # Ctrl-C: the next close, at exit at the latest, goes on
            raise
        self._finalizer.detach()
        lifecycle.untrack(self)
        self._closed.set()

    def close_at_exit(self, status: str, timeout_s: float) -> None:
        """See lifecycle.Tracked.  The manager, which is closed after us, tells the server."""
        pools = self._stop_work()
        self.poller.say_goodbye(time.monotonic() + min(timeout_s / 2, 0.25))
        self._join(pools, time.monotonic() + min(timeout_s / 2, 0.5))
        if self.telemetry is not None:
            self.telemetry.close(min(timeout_s / 2, 0.5), ended=not self._borrowed)
        self._finalizer.detach()
        self._closed.set()

    def _stop_work(self) -> List[WorkerPool]:
        """Refuse new work, wake every waiter, and have the threads end."""
        self._closing.set()
        self.poller.close(
            ClientClosedError(
                "the client was closed before this was done", session_id=self.session_id
            )
        )
        with self._lock:
            pools = [*self._lanes, self._background]
        for pool in pools:
            pool.close()
        self.transport.abort()
        return pools

    def _join(self, pools: List[WorkerPool], deadline: float) -> None:
        stayed = self.poller.join(deadline)
        stayed += [name for pool in pools for name in pool.join(deadline)]
        if stayed:
            logger.info("closed, but these threads are still busy: %s", ", ".join(stayed))

    def forget_after_fork(self) -> None:
        """See lifecycle.Tracked: the child must neither use nor end the parent's session."""
        self._finalizer.detach()

    def __del__(self) -> None:
        # The finalizer tells nothing here: the garbage collector calls it before this.
        opened = getattr(self, "poller", None) is not None and not self._borrowed
        if opened and self._closer is None and not self._closed.is_set() and not self.forked:
            warnings.warn(
                f"unclosed ServiceClient of session {self.session_id}, opened at {self.opened_at}; "
                "use `with ServiceClient(...)` or close()",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )


def _billing_limit(transport: Transport) -> Callable[[], float]:
    return lambda: flags_for(transport).billing_exception_max_pause_duration_sec


def _stop_all(stoppers: List[Callable[[], None]]) -> None:
    """Runs in a finalizer, at any time in any thread: nothing here may lock or wait."""
    for stop in stoppers:
        stop()


def _callers_line() -> str:
    """``file:line`` of the first caller outside this package."""
    frame: Any = sys._getframe(1)
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
