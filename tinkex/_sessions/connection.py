"""Connection: a way to one server without a session, for clients that only look things up.

It stands in for a Session in RestClient and AdminClient made on their own: nothing is created on
the server, and nothing there needs to be kept alive or ended.  Threads: ``tinkex-rest-i``, up to
eight while calls are under way.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import uuid
import weakref
from typing import TYPE_CHECKING, Callable, List, Optional, TypeVar

from tinkex._results.poller import Poller
from tinkex._runtime import lifecycle
from tinkex._runtime.worker_pool import WorkerPool
from tinkex._transport.server_flags import flags_for
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.errors import ClientClosedError
from tinkex.futures import APIFuture

if TYPE_CHECKING:
    from tinkex._sessions.telemetry import Reporter

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WORKERS = 8


class Connection:
    """A transport and the threads that use it.  Thread-safe; constructing it sends nothing.

    Until the server has answered once, calls ride out an outage for ``startup_timeout_s`` only:
    an address that is wrong is to be told soon.  From then on it is ``max_outage_s``.
    """

    #: There is none; sessions have one, and errors name it.
    session_id: Optional[str] = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self._pid = os.getpid()
        self._closing = threading.Event()
        patience_s = min(config.startup_timeout_s, config.max_outage_s)
        at_first = dataclasses.replace(config, max_outage_s=patience_s)
        self.transport = Transport(at_first, closing=self._closing)
        self.transport.billing.find_limit_s = _billing_limit(self.transport)
        #: Reports failures, if that is wanted.
        self.telemetry: Optional[Reporter] = None
        if config.telemetry:
            from tinkex._sessions.telemetry import open_reporter  # most programs want none

            self.telemetry = open_reporter(config, f"sessionless-{uuid.uuid4()}")
        report = None if self.telemetry is None else self.telemetry.operation_failed
        self._poller = Poller(self.transport, on_failure=report)
        self._background = WorkerPool("tinkex-rest", _WORKERS)
        stoppers = [*self._poller.stoppers, self._background.stopper]
        if self.telemetry is not None:
            stoppers.append(self.telemetry.stopper)
        self._finalizer = weakref.finalize(self, _stop_all, stoppers)
        self._finalizer.atexit = False
        lifecycle.track(self)

    @property
    def closed(self) -> bool:
        """True once close has begun."""
        return self._closing.is_set()

    def ensure_open(self, what: str) -> None:
        """Raise ClientClosedError, naming *what* was asked, after close or a fork."""
        if self._pid != os.getpid():
            raise ClientClosedError(
                f"{what}: this client belongs to the parent process of a fork",
                hint="Create a client in the child process.",
            )
        if self._closing.is_set():
            raise ClientClosedError(f"{what}: the client was closed", hint="Create a new one.")

    def run(self, kind: str, work: Callable[[], T]) -> APIFuture[T]:
        """Run *work* on a background thread; return its future at once."""
        self.ensure_open(kind)
        future: APIFuture[T] = self._poller.new_future(kind)

        def task() -> None:
            if future.done():  # cancelled while it waited for a thread
                return
            try:
                value = work()
                self.transport.config = self.config  # the server is there
                future.settle(value)
            except Exception as error:
                self._poller.fail(future, error)

        future.enter("submitting")
        self._background.submit(task)
        return future

    def close(self, timeout_s: float = 5.0) -> None:
        """Settle what is outstanding, and end the threads; at most *timeout_s*.  Idempotent."""
        if self._pid != os.getpid():
            return
        self._closing.set()
        self._poller.close(ClientClosedError("the client was closed before this was done"))
        self._background.close()
        self.transport.abort()
        deadline = time.monotonic() + timeout_s
        if self.telemetry is not None:
            self.telemetry.close(min(timeout_s / 2, 1.0), ended=False)
        stayed = [*self._poller.join(deadline), *self._background.join(deadline)]
        if stayed:
            logger.info("closed, but these threads are still busy: %s", ", ".join(stayed))
        self._finalizer.detach()
        lifecycle.untrack(self)

    def close_at_exit(self, status: str, timeout_s: float) -> None:
        """See lifecycle.Tracked; the server knows nothing of us."""
        self.close(min(timeout_s, 0.5))

    def forget_after_fork(self) -> None:
        """See lifecycle.Tracked."""
        self._finalizer.detach()


def _billing_limit(transport: Transport) -> Callable[[], float]:
    return lambda: flags_for(transport).billing_exception_max_pause_duration_sec


def _stop_all(stoppers: List[Callable[[], None]]) -> None:
    """Runs in a finalizer, at any time in any thread: nothing here may lock or wait."""
    for stop in stoppers:
        stop()
