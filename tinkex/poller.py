"""Poller: settles the futures of one client, with few threads.

Work of one training run finishes in the order it was submitted, so each run has a lane and only
the head of a lane is polled.  Samples finish in any order: each is submitted and polled by a
worker of its own, on its own connection, up to a cap; more wait their turn.  Measured
(design notes): with completions in order a few threads equal a thread per future, while
unordered long polls behind a small pool turn milliseconds into seconds.

A worker whose future is cancelled is free at once: its connection is broken off, and it gets a
new one.

Threads: ``tinkex-poll-i`` (one per lane that has work), ``tinkex-sample-i`` (one per sample in
flight), ``tinkex-cancel-i`` (see CancelQueue) and ``tinkex-callbacks`` (users' callbacks).  All
are lazy and end when idle, or at close.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import threading
from types import TracebackType
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Set, Type

from tinkex.cancel_queue import CancelQueue
from tinkex.errors import ClientClosedError, ResultExpiredError, TinkexError
from tinkex.futures import APIFuture
from tinkex.pause_notices import PauseNotices
from tinkex.poll_loop import Operation as Operation, PollLoop
from tinkex.private_channel import AnyChannel
from tinkex.scheduler import WorkerPool
from tinkex.transport import Transport
from tinkex.types import UntypedFuture

logger = logging.getLogger(__name__)

#: Most lanes polled at once; a lane beyond waits for another to run dry.
POLL_CAP = 256

#: After how many seconds to submit a sample again whose result was lost, by the number of times
#: it was submitted again before; None is never.
Resubmit = Callable[[int], Optional[float]]


class Poller:
    """Owns the futures of one client until they are settled.  Thread-safe.

    Args:
        transport: polls go through it; its ``closing`` event ends every wait.
        explain: turns the error of failed work into the one the user gets (e.g. because the
            session was lost); called in a poller thread without locks.
        on_failure: is told of each future that is about to fail, with its error; must be quick and
            not raise.
    """

    def __init__(
        self,
        transport: Transport,
        explain: Callable[[TinkexError], TinkexError] = lambda e: e,
        on_failure: Optional[Callable[[APIFuture[Any], BaseException], None]] = None,
    ) -> None:
        self._transport = transport
        self._config = transport.config
        self._explain = explain
        self._on_failure = on_failure
        self._pauses = PauseNotices()
        self._cancels = CancelQueue(transport)
        self._polls = WorkerPool("tinkex-poll", POLL_CAP)
        self._samples = WorkerPool("tinkex-sample", self._config.max_concurrent_samples)
        self._callbacks = WorkerPool("tinkex-callbacks", 1)
        self._thread_local = threading.local()
        # Guards _outstanding, _lanes and _closed.  Never held during I/O or while a
        # future is settled.
        self._lock = threading.Lock()
        self._outstanding: Set[APIFuture[Any]] = set()
        self._lanes: Dict[str, Deque[Operation[Any]]] = {}
        self._closed: Optional[TinkexError] = None

    def new_future(self, kind: str) -> APIFuture[Any]:
        """Make a future that will be settled at close at the latest.

        Raises:
            ClientClosedError: the poller was closed.
        """
        future: APIFuture[Any] = APIFuture(
            kind, notice_after_s=self._config.notice_after_s, run_callback=self._callbacks.submit
        )
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._outstanding.add(future)
        future.on_settled(self._forget)
        return future

    def inflight(self) -> List[APIFuture[Any]]:
        """The futures that are not settled yet, in no order."""
        with self._lock:
            return list(self._outstanding)

    def watch(self, lane: str, operation: Operation[Any]) -> None:
        """Poll for *operation*, already submitted, after all others of *lane*."""
        with self._lock:
            queue = self._lanes.get(lane)
            if queue is not None:
                queue.append(operation)
                return
            self._lanes[lane] = collections.deque([operation])
        try:
            self._polls.submit(lambda: self._drain(lane))
        except ClientClosedError as error:
            with self._lock:  # nobody will drain the lane
                stranded = self._lanes.pop(lane)
            for left in stranded:
                self.fail(left.future, error)

    def submit_sample(
        self,
        operation: Operation[Any],
        send: Callable[[AnyChannel], UntypedFuture],
        resubmit: Resubmit = lambda times: None,
    ) -> None:
        """Have a worker *send* a sampling request and poll for its result.  Returns at once.

        If the server has lost the result, *send* is called again, as *resubmit* says: each time it
        must make a new request of it.
        """

        def run() -> None:
            if operation.future.done():  # cancelled while it waited its turn
                return
            try:
                with _Stint(operation.future, self._own_channel()) as stint:
                    self._sample(operation, send, resubmit, stint)
            except Exception as error:
                self.fail(operation.future, error)

        try:
            self._samples.submit(run)
        except ClientClosedError as error:
            self.fail(operation.future, error)

    def _sample(
        self,
        operation: Operation[Any],
        send: Callable[[AnyChannel], UntypedFuture],
        resubmit: Resubmit,
        stint: _Stint,
    ) -> None:
        future = operation.future
        for times in itertools.count():
            if future.done():
                return
            future.enter("submitting")
            with stint.unbroken():
                accepted = send(stint.channel)
            future.enter("waiting", accepted.request_id)
            try:
                self._poll(operation, stint.channel)
                return
            except ResultExpiredError as lost:
                delay_s = resubmit(times)
                if delay_s is None:
                    raise
                logger.info("%s; submitting it again in %.1f s", lost, delay_s)
                stint.channel.stopped.wait(delay_s)
            finally:
                if future.cancelled():
                    self._cancels.put(accepted.request_id)

    def fail(self, future: APIFuture[Any], error: BaseException) -> None:
        """Settle *future* with *error*, explained."""
        if isinstance(error, TinkexError):
            error.request_id = error.request_id or future.request_id
            explained = self._explain(error)
            if explained is not error:
                explained.__cause__ = error
            error = explained
        # Before those who wait for it wake: they may close us at once.
        if self._on_failure is not None and not future.done():
            self._on_failure(future, error)
        future.settle_error(error)

    def close(self, error: TinkexError) -> None:
        """Settle everything outstanding with *error* and stop the threads.  Returns at once.

        Set the transport's ``closing`` first and abort it afterwards, so that polls end at once.
        """
        with self._lock:
            self._closed = self._closed or error
            outstanding = list(self._outstanding)
        self._cancels.close()
        for pool in (self._polls, self._samples):
            pool.close()
        for future in outstanding:
            future.settle_error(error)
        self._callbacks.drain()  # after the callbacks that settling has just queued

    def join(self, deadline: float) -> List[str]:
        """Wait until *deadline* (monotonic) for the threads; return the names of those left."""
        pools = (self._polls, self._samples, self._cancels, self._callbacks)
        return [name for pool in pools for name in pool.join(deadline)]

    @property
    def stoppers(self) -> List[Callable[[], None]]:
        """Functions that stop the threads from a finalizer."""
        pools = (self._polls, self._samples, self._cancels, self._callbacks)
        return [pool.stopper for pool in pools]

    def _forget(self, future: Any) -> None:
        with self._lock:
            self._outstanding.discard(future)

    def _own_channel(self) -> AnyChannel:
        """The calling worker's own connection, made at its first use and when it was stopped."""
        channel: Optional[AnyChannel] = getattr(self._thread_local, "channel", None)
        if channel is not None and channel.stopped.is_set():
            channel.abort()
            channel = None
        if channel is None:
            channel = self._thread_local.channel = self._transport.open_connection()
        return channel

    def _drain(self, lane: str) -> None:
        """Poll the head of *lane* until the lane is empty."""
        while True:
            with self._lock:
                head = self._lanes[lane][0]
            try:
                if not head.future.done():
                    with _Stint(head.future, self._own_channel()) as stint:
                        self._poll(head, stint.channel)
            except Exception as error:  # a TinkexError to report, or a bug that must not be lost
                left = error if head.appeal is None else head.appeal(error)
                if left is not None:
                    self.fail(head.future, left)
            with self._lock:
                queue = self._lanes[lane]
                queue.popleft()
                if not queue:
                    del self._lanes[lane]
                    return

    def _poll(self, operation: Operation[Any], channel: AnyChannel) -> None:
        """Poll until the operation's future is settled by somebody, or raise its error."""
        PollLoop(self._transport, operation, channel, self._pauses).run()


class _Stint:
    """A worker's time with one future; it is over as soon as the future is cancelled.

    A poll is broken off then.  A submission is let finish, but not retried: its answer holds the
    id by which the server can be told.
    """

    def __init__(self, future: APIFuture[Any], channel: AnyChannel) -> None:
        self.channel = channel
        # Guards _over and _submitting.
        self._lock = threading.Lock()
        self._over = False
        self._submitting = False
        future.on_settled(self._settled)

    def __enter__(self) -> _Stint:
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        with self._lock:
            self._over = True

    @contextlib.contextmanager
    def unbroken(self) -> Iterator[None]:
        """Let the request that is sent inside come to its end."""
        with self._lock:
            self._submitting = True
        try:
            yield
        finally:
            with self._lock:
                self._submitting = False

    def _settled(self, future: Any) -> None:
        """In the thread that settles the future: set the worker free."""
        with self._lock:
            if self._over or not future.cancelled():
                return
            self.channel.stopped.set()  # the worker's next one takes another channel
            submitting = self._submitting
        if not submitting:
            self.channel.abort()
