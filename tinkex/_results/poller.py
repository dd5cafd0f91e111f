"""Poller: settles the futures of one client, with few threads.

Work of one training run finishes in the order it was submitted, so each run has a lane and only
the head of a lane is polled.  Samples finish in any order: each is submitted and polled by a
worker of its own, on its own connection, up to a cap; more are queued.  With completions in
order, a few threads were measured to be as fast as a thread per future, while unordered long polls
behind a small pool turned milliseconds into seconds.

Where the server can report which samples are done, the batch poller waits for them instead.

A worker whose future is cancelled is free immediately: its connection is aborted, and it gets a
new one.

Threads: ``tinkex-poll-i`` (one per lane that has work), ``tinkex-sample-i`` (one per sample in
flight), ``tinkex-flags`` (before the first sample, if the server's flags are not known),
``tinkex-cancel-i`` (see CancelQueue), those of the batch poller, and ``tinkex-callbacks`` (users'
callbacks).  All are lazy and end when idle, or at close.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
from typing import Any, Callable, Deque, Dict, List, Optional, Set

from tinkex._results.batch_poller import BatchPoller
from tinkex._results.cancel_queue import CancelQueue
from tinkex._results.pause_log import PauseNotices
from tinkex._results.pending import Lease, PendingRequest, ThreadLocalConnections
from tinkex._results.poll_loop import PollLoop
from tinkex._runtime.deferred import run_deferred
from tinkex._runtime.descriptors import connection_cap
from tinkex._runtime.worker_pool import WorkerPool
from tinkex._transport.connection_errors import forget_frames
from tinkex._transport.fast_connection import AnyChannel
from tinkex._transport.resources import ClientResources
from tinkex._transport.server_flags import ServerFlags, flags_for
from tinkex.errors import ClientClosedError, ResultExpiredError, TinkexError
from tinkex.futures import APIFuture

logger = logging.getLogger(__name__)

#: Most lanes polled at a time; a lane beyond waits until another is empty.
POLL_CAP = 256


class Poller:
    """Owns the futures of one client until they are settled.  Thread-safe.

    Args:
        resources: polls go through its transport, whose ``closing`` event ends every wait.
        explain: turns the error of failed work into the one the user gets (e.g. because the
            session was lost); called in a poller thread without locks.
        on_failure: called with each future that is about to fail, and its error; must be quick and
            not raise.
    """

    def __init__(
        self,
        resources: ClientResources,
        explain: Callable[[TinkexError], TinkexError] = lambda e: e,
        on_failure: Optional[Callable[[APIFuture[Any], BaseException], None]] = None,
    ) -> None:
        self._resources = resources
        self._transport = transport = resources.transport
        self._config = transport.config
        self._explain = explain
        self._on_failure = on_failure
        self._pauses = PauseNotices()
        self._cancels = CancelQueue(transport)
        self._polls = WorkerPool("tinkex-poll", POLL_CAP)
        self._samples = WorkerPool("tinkex-sample", self._config.max_concurrent_samples)
        self._callbacks = WorkerPool("tinkex-callbacks", 1)
        self._asking = WorkerPool("tinkex-flags", 1, idle_s=1.0)
        self._batches = BatchPoller(
            resources, self._poll_alone, self.fail, self._cancels, self._pauses
        )
        self._channels = ThreadLocalConnections(transport)
        # One bound method each for all futures.
        self._run_callback = self._callbacks.submit
        self._throttle_reason = transport.server.limiter.describe
        self._forget_it = self._forget
        # Guards _outstanding, _lanes, _undecided and _closed.  Never held during I/O or while a
        # future is settled.
        self._lock = threading.Lock()
        self._outstanding: Set[APIFuture[Any]] = set()
        self._lanes: Dict[str, Deque[PendingRequest[Any]]] = {}
        self._undecided = 0  # requests that wait for the server's flags
        self._closed: Optional[TinkexError] = None

    def new_future(self, kind: str, *, counted: bool = False) -> APIFuture[Any]:
        """Make a future that will be settled at close at the latest.

        One that is *counted* is for a user: it takes a place among ``max_unread`` until it is read
        or dropped.  If there is none, this blocks.

        Raises:
            BackpressureError: there is none, and on_backpressure is ``"raise"``.
            ClientClosedError: the poller was closed.
        """
        run_deferred()
        unread = self._resources.unread
        counted = counted and unread.counts
        if counted:
            unread.acquire(kind)
        future: APIFuture[Any] = APIFuture(
            kind,
            notice_after_s=self._config.notice_after_s,
            run_callback=self._run_callback,
            throttle_reason=self._throttle_reason,
        )
        if counted:
            future.on_read(unread.release)
        future.on_settled(self._forget_it)
        try:
            with self._lock:
                if self._closed is not None:
                    raise self._closed
                self._outstanding.add(future)
        except BaseException:  # Ctrl-C: nothing else would settle it
            self._forget(future)
            raise
        return future

    def inflight(self) -> List[APIFuture[Any]]:
        """The futures that are not settled yet, in no order."""
        with self._lock:
            return list(self._outstanding)

    def watch(self, lane: str, request: PendingRequest[Any]) -> None:
        """Poll for *request*, already accepted, after all others of *lane*."""
        with self._lock:
            queue = self._lanes.get(lane)
            if queue is not None:
                queue.append(request)
                return
            self._lanes[lane] = collections.deque([request])
        try:
            self._polls.submit(functools.partial(self._drain, lane))
        except ClientClosedError as error:
            with self._lock:  # no thread will drain the lane
                stranded = self._lanes.pop(lane)
            for left in stranded:
                self.fail(left.future, error)

    def submit(self, request: PendingRequest[Any]) -> None:
        """Have *request*, of a sampler, sent, and wait for its result.  Returns immediately."""
        flags = self._transport.server.flags.static
        if request.sampler_id() is None:
            self._poll_alone(request)
        elif flags is not None and not self._undecided:
            self._choose(request, flags)
        else:  # also with known flags: it must not overtake those that waited for them
            with self._lock:
                self._undecided += 1
            try:
                self._asking.submit(functools.partial(self._ask_and_choose, request))
            except ClientClosedError as error:
                self.fail(request.future, error)

    def _ask_and_choose(self, request: PendingRequest[Any]) -> None:
        try:
            try:
                flags = flags_for(self._transport, once=True)
            except TinkexError as error:
                logger.debug("could not get the server's flags: %s", error)
                flags = ServerFlags()
            self._choose(request, flags)
        finally:
            with self._lock:
                self._undecided -= 1

    def _choose(self, request: PendingRequest[Any], flags: ServerFlags) -> None:
        """Hand *request* to the batch poller, or have a worker poll for it individually."""
        if self._batches.usable(flags):
            self._batches.submit(request)
        else:
            cap = min(
                self._config.max_concurrent_samples,
                flags.sample_max_concurrent_requests,
                connection_cap(),
            )
            if self._samples.cap != cap:
                self._samples.resize(max(1, cap))
            self._poll_alone(request)

    def _poll_alone(self, request: PendingRequest[Any]) -> None:
        """Have a worker submit *request*, if need be, and poll for it."""
        try:
            self._samples.submit(functools.partial(self._run_sample, request))
        except ClientClosedError as error:
            self.fail(request.future, error)

    def _run_sample(self, request: PendingRequest[Any]) -> None:
        """On a worker, ``tinkex-sample-i``."""
        future = request.future
        if future.done():  # cancelled while it was queued
            if request.accepted and future.cancelled():
                self._cancels.put(future.request_id or "")
            return
        try:
            with Lease(future, self._channels.get()) as lease:
                self._sample(request, lease)
        except Exception as error:
            self._fail_request(request, error)

    def _sample(self, request: PendingRequest[Any], lease: Lease) -> None:
        future = request.future
        while not future.done():
            if request.lost is not None:
                self._wait_to_resubmit(request, request.lost, lease)
                if future.done():
                    return
            if not request.accepted:
                request.submit(lease)
            try:
                self._poll(request, lease.channel)
                return
            except ResultExpiredError as lost:
                request.note_lost(lost)
            finally:
                if future.cancelled():
                    self._cancels.put(future.request_id or "")

    def _wait_to_resubmit(
        self, request: PendingRequest[Any], lost: ResultExpiredError, lease: Lease
    ) -> None:
        delay_s = request.retry_after_loss()
        if delay_s is None:
            raise lost
        request.losses += 1
        logger.info("%s; submitting it again in %.1f s", lost, delay_s)
        lease.channel.stopped.wait(delay_s)

    def _fail_request(self, request: PendingRequest[Any], error: BaseException) -> None:
        """Settle the future of *request* with *error*, unless the request goes on."""
        unhandled = request.on_failure(error)
        if unhandled is not None:
            self.fail(request.future, unhandled)

    def fail(self, future: APIFuture[Any], error: BaseException) -> None:
        """Settle *future* with *error*, explained."""
        if isinstance(error, TinkexError):
            error.request_id = error.request_id or future.request_id
            explained = self._explain(error)
            if explained is not error:
                explained.__cause__ = error
            error = explained
        # Before its waiters wake: they may close the client immediately.
        if self._on_failure is not None and not future.done():
            self._on_failure(future, error)
        if isinstance(error, TinkexError):
            logger.debug("%s failed", future.kind, exc_info=error)
            forget_frames(error)
        future.try_set_exception(error)

    def close(self, error: TinkexError) -> None:
        """Settle everything outstanding with *error* and stop the threads.  Does not block.

        Set the transport's ``closing`` first and abort the resources afterwards, so that polls
        end immediately.
        """
        with self._lock:
            self._closed = self._closed or error
            outstanding = list(self._outstanding)
        self._cancels.close()
        self._batches.close()
        for pool in (self._polls, self._samples, self._asking):
            pool.close()
        for future in outstanding:
            future.try_set_exception(error)
        self._callbacks.drain()  # after the callbacks that settling has just queued

    def join(self, deadline: float) -> List[str]:
        """Wait until *deadline* (monotonic) for the threads; return the names of those left."""
        pools = (self._polls, self._samples, self._asking, self._batches, self._cancels)
        return [name for pool in (*pools, self._callbacks) for name in pool.join(deadline)]

    def flush_acknowledgements(self, deadline: float) -> None:
        """After `close`: acknowledge the results that have arrived, as far as time allows.

        Blocks for half a second at most, until *deadline* (monotonic) at the latest.
        """
        self._batches.flush_acknowledgements(deadline)

    @property
    def finalizer_hooks(self) -> List[Callable[[], None]]:
        """Functions that stop the threads from a finalizer."""
        pools = (self._polls, self._samples, self._asking, self._cancels, self._callbacks)
        return [*(pool.finalizer_hook for pool in pools), *self._batches.finalizer_hooks]

    def _forget(self, future: Any) -> None:
        with self._lock:
            self._outstanding.discard(future)

    def _drain(self, lane: str) -> None:
        """Poll the head of *lane* until the lane is empty."""
        while True:
            with self._lock:
                head = self._lanes[lane][0]
            try:
                if not head.future.done():
                    with Lease(head.future, self._channels.get()) as lease:
                        self._poll(head, lease.channel)
            except Exception as error:  # a TinkexError to report, or a bug that must not be lost
                self._fail_request(head, error)
            with self._lock:
                queue = self._lanes[lane]
                queue.popleft()
                if not queue:
                    del self._lanes[lane]
                    return

    def _poll(self, request: PendingRequest[Any], channel: AnyChannel) -> None:
        """Poll until its future is settled, by whichever thread, or raise its error."""
        PollLoop(self._resources, request, channel, self._pauses).run()
