"""Poller: settles the futures of one client, with few threads.

Work of one training run finishes in the order it was submitted, so each run has a lane and only
the head of a lane is polled.  Samples finish in any order: if the server can report which are done,
one poll per sampler waits for all of its samples (see BatchPoller); if not, there is one poll per
sample (see SamplePoller).

Threads: ``tinkex-poll-i`` (one per lane that has work), ``tinkex-flags`` (before the first sample,
if the server's flags are not known), ``tinkex-callbacks`` (for user callbacks), and those of the
two pollers of samples.  All are lazy and end when idle, or at close.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, List, Optional

from tinkex._results.batch_poller import BatchPoller
from tinkex._results.pending import Lease, PendingRequest
from tinkex._results.sample_poller import SamplePoller
from tinkex._runtime.descriptors import connection_cap
from tinkex._runtime.lifecycle import run_deferred
from tinkex._runtime.worker_pool import WorkerPool
from tinkex._transport.server_flags import ServerFlags, flags_for
from tinkex.errors import ClientClosedError, TinkexError
from tinkex.futures import APIFuture

if TYPE_CHECKING:
    from tinkex._transport.resources import ClientResources

logger = logging.getLogger(__name__)

#: The most lanes polled at a time; further lanes wait until another is empty.
POLL_CAP = 256


class Poller:
    """Owns the futures of one client until they are settled.  Thread-safe.

    Args:
        resources: polls go through its transport, whose ``closing`` event ends every wait.
        explain, on_failure: as for SamplePoller.
        keeps: an object that every future keeps alive until it is settled.  The poller itself
            refers to it only weakly, so that it can be collected once no future waits.
    """

    def __init__(
        self,
        resources: ClientResources,
        explain: Optional[Callable[[TinkexError], TinkexError]] = None,
        on_failure: Optional[Callable[[APIFuture[Any], BaseException], None]] = None,
        keeps: Optional[object] = None,
    ) -> None:
        self._resources = resources
        self._transport = transport = resources.transport
        self._config = transport.config
        self._keeps = None if keeps is None else weakref.ref(keeps)
        self._polls = resources.pools.make("tinkex-poll", POLL_CAP)
        # One thread, so that requests that wait for the flags are passed on in order.
        self._asking = resources.pools.make("tinkex-flags", 1, idle_s=1.0)
        # Not a polling thread, which would be blocked by a callback that is slow or waits for
        # another future; and not one of the pools that close first, since settling a future queues
        # its callbacks.
        self._callbacks = WorkerPool("tinkex-callbacks", 1)
        self._samples = SamplePoller(resources, explain, on_failure)
        self._batches = BatchPoller(resources, self._samples)
        self.fail = self._samples.fail
        # Bound methods, made once and shared by all futures.
        self._run_callback = self._callbacks.submit
        self._throttle_reason = transport.server.limiter.describe
        # Guards _outstanding (which maps each future to the object that it keeps alive), _lanes,
        # _undecided and _closed.  Never held during I/O or while a future is settled.
        self._lock = threading.Lock()
        self._outstanding: Dict[APIFuture[Any], Optional[object]] = {}
        self._lanes: Dict[str, Deque[PendingRequest[Any]]] = {}
        self._undecided = 0  # requests that wait for the server's flags
        self._closed: Optional[TinkexError] = None

    def new_future(self, kind: str, *, counted: bool = False) -> APIFuture[Any]:
        """Make a future that will be settled at close at the latest.

        A *counted* future is for the user: it takes one of the ``max_unread`` places until it is
        read or dropped.  If no place is free, this blocks.

        Raises:
            BackpressureError: no place is free, and on_backpressure is ``"raise"``.
            ClientClosedError: the poller was closed.
        """
        run_deferred()  # what finalizers could not do themselves, e.g. log errors
        unread = self._resources.unread
        counted = counted and unread.counts
        if counted:
            unread.acquire(kind)
        future: Optional[APIFuture[Any]] = None
        try:
            future = APIFuture(
                kind,
                notice_after_s=self._config.notice_after_s,
                run_callback=self._run_callback,
                throttle_reason=self._throttle_reason,
            )
            if counted:
                future.on_read(unread.release)
            future.on_settled(self._forget)
            with self._lock:
                # Atomic with `close`, which settles all outstanding futures: none is added later.
                if self._closed is not None:
                    raise self._closed
                self._outstanding[future] = None if self._keeps is None else self._keeps()
            if self._transport.tracer is not None:
                future.operation = self._transport.tracer.operation(kind)
                future.on_settled(future.operation.end)
        except BaseException:  # Ctrl-C: nothing else would settle or read the future
            if future is not None:
                self._forget(future)
                future.uncount()
            elif counted:
                unread.release()
            raise
        return future

    def inflight(self) -> List[APIFuture[Any]]:
        """Return the futures that are not settled yet, in no particular order."""
        with self._lock:
            outstanding = list(self._outstanding)
        # A thread that waits for a future may wake before the callback that removes it has run.
        return [future for future in outstanding if not future.done()]

    def watch(self, lane: str, request: PendingRequest[Any]) -> None:
        """Poll for *request*, which is already accepted, after all earlier ones of *lane*."""
        with self._lock:
            queue = self._lanes.get(lane)
            if queue is not None:  # the thread that drains the lane will reach it
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
        """Have a sampler's *request* sent and its result fetched.  Returns immediately."""
        flags = self._transport.server.flags.static
        if request.sampler_id() is None:
            self._samples.submit(request)
        elif flags is not None and not self._undecided:
            self._choose(request, flags)
        else:  # even with known flags: it must not overtake requests that waited for them
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
            self._samples.limit(cap)
            self._samples.submit(request)

    def close(self, error: TinkexError) -> None:
        """Settle everything outstanding with *error* and stop the client's threads.

        Does not block.  Set the transport's ``closing`` first and abort the resources afterwards,
        so that polls end immediately.
        """
        with self._lock:
            self._closed = self._closed or error
            outstanding = list(self._outstanding)
        # The pools first: a callback of a settled future could submit more work.
        self._resources.pools.close()
        self._batches.close()
        for future in outstanding:
            future.try_set_exception(error)
        self._callbacks.drain()  # after the callbacks that settling has just queued

    def join(self, deadline: float) -> List[str]:
        """Wait until *deadline* (monotonic) for the threads; return the names of those left."""
        return [*self._resources.pools.join(deadline), *self._callbacks.join(deadline)]

    def flush_acknowledgements(self, deadline: float) -> None:
        """Acknowledge the results that have arrived, as far as time allows; call it after `close`.

        Blocks for half a second at most, until *deadline* (monotonic) at the latest.
        """
        self._batches.flush_acknowledgements(deadline)

    def _forget(self, future: Any) -> None:
        with self._lock:
            kept = self._outstanding.pop(future, None)
        # Not with the lock held: if this is the last reference to the runtime, finalizers run here.
        del kept

    def _drain(self, lane: str) -> None:
        """Poll the head of *lane* until the lane is empty."""
        while True:
            with self._lock:
                head = self._lanes[lane][0]
            try:
                if not head.future.done():
                    with Lease(head.future, self._samples.channel()) as lease:
                        self._samples.poll(head, lease.channel)
            # A TinkexError, or a bug: either way the future is settled, and the lane goes on.
            except Exception as error:
                self._samples.fail_request(head, error)
            # Atomic with `watch`, which starts another thread if the lane does not exist.
            with self._lock:
                queue = self._lanes[lane]
                queue.popleft()
                if not queue:
                    del self._lanes[lane]
                    return
