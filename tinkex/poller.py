"""Poller: settles the futures of one client, with few threads.

Work of one training run finishes in the order it was submitted, so each run has a lane and only
the head of a lane is polled.  Samples finish in any order: each is submitted and polled by a
worker of its own, on its own connection, up to a cap; more wait their turn.  Measured
(design notes): with completions in order a few threads equal a thread per future, while
unordered long polls behind a small pool turn milliseconds into seconds.

Threads: ``tinkex-poll-i`` (one per lane that has work), ``tinkex-sample-i`` (one per sample in
flight) and ``tinkex-callbacks`` (users' callbacks).  All are lazy and end when idle, or at close.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import threading
import time
from typing import Any, Callable, Deque, Dict, Generic, List, Optional, Set, TypeVar

from tinkex.api.futures import retrieve_future
from tinkex.channel import Channel
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    ClientClosedError,
    NoProgressError,
    OperationTimeoutError,
    TinkexError,
)
from tinkex.futures import APIFuture
from tinkex.poll_rules import Done, Failed, Pacing, Pending, Trouble, interpret
from tinkex.scheduler import WorkerPool
from tinkex.transport import Reply, Request, Transport
from tinkex.types import UntypedFuture

T = TypeVar("T")

#: Most lanes polled at once; a lane beyond waits for another to run dry.
POLL_CAP = 256

_POLL = Request("POST", "/api/v1/retrieve_future")


@dataclasses.dataclass(frozen=True)
class Operation(Generic[T]):
    """Work the server is asked to do: its future, and how to read the result.

    Attributes:
        future: to be settled.
        decode: turns the final answer into the result; may raise TinkexError.
        binary: the result may be protobuf.
    """

    future: APIFuture[T]
    decode: Callable[[Reply], T]
    binary: bool = False


class Poller:
    """Owns the futures of one client until they are settled.  Thread-safe.

    Args:
        transport: polls go through it; its ``closing`` event ends every wait.
        explain: turns the error of failed work into the one the user gets (e.g. because the
            session was lost); called in a poller thread without locks.
    """

    def __init__(
        self, transport: Transport, explain: Callable[[TinkexError], TinkexError] = lambda e: e
    ) -> None:
        self._transport = transport
        self._config = transport.config
        self._explain = explain
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
        self, operation: Operation[Any], send: Callable[[Channel], UntypedFuture]
    ) -> None:
        """Have a worker *send* a sampling request and poll for its result.  Returns at once."""

        def run() -> None:
            channel = self._own_channel()
            try:
                if operation.future.done():
                    return
                operation.future.enter("submitting")
                accepted = send(channel)
            except Exception as error:
                self.fail(operation.future, error)
                return
            operation.future.enter("waiting", accepted.request_id)
            self._poll(operation, channel)

        try:
            self._samples.submit(run)
        except ClientClosedError as error:
            self.fail(operation.future, error)

    def fail(self, future: APIFuture[Any], error: BaseException) -> None:
        """Settle *future* with *error*, explained."""
        if isinstance(error, TinkexError):
            explained = self._explain(error)
            if explained is not error:
                explained.__cause__ = error
            error = explained
        future.settle_error(error)

    def close(self, error: TinkexError) -> None:
        """Settle everything outstanding with *error* and stop the threads.  Returns at once.

        Set the transport's ``closing`` first and abort it afterwards, so that polls end at once.
        """
        with self._lock:
            self._closed = self._closed or error
            outstanding = list(self._outstanding)
        for pool in (self._polls, self._samples):
            pool.close()
        for future in outstanding:
            future.settle_error(error)
        self._callbacks.drain()  # after the callbacks that settling has just queued

    def join(self, deadline: float) -> List[str]:
        """Wait until *deadline* (monotonic) for the threads; return the names of those left."""
        pools = (self._polls, self._samples, self._callbacks)
        return [name for pool in pools for name in pool.join(deadline)]

    @property
    def stoppers(self) -> List[Callable[[], None]]:
        """Functions that stop the threads from a finalizer."""
        return [pool.stopper for pool in (self._polls, self._samples, self._callbacks)]

    def _forget(self, future: Any) -> None:
        with self._lock:
            self._outstanding.discard(future)

    def _own_channel(self) -> Channel:
        """The calling worker's own connection, made at its first use."""
        channel: Optional[Channel] = getattr(self._thread_local, "channel", None)
        if channel is None:
            channel = self._thread_local.channel = self._transport.open_channel()
        return channel

    def _drain(self, lane: str) -> None:
        """Poll the head of *lane* until the lane is empty."""
        channel = self._own_channel()
        while True:
            with self._lock:
                head = self._lanes[lane][0]
            self._poll(head, channel)
            with self._lock:
                queue = self._lanes[lane]
                queue.popleft()
                if not queue:
                    del self._lanes[lane]
                    return

    def _poll(self, operation: Operation[Any], channel: Channel) -> None:
        """Poll until the operation's future is settled, by us or by somebody else."""
        try:
            _Poll(self._transport, operation, channel).run()
        except Exception as error:  # a TinkexError to report, or a bug that must not be lost
            self.fail(operation.future, error)


class _Poll:
    """The polling of one request, from its acceptance to its end.  Used by one thread."""

    def __init__(self, transport: Transport, operation: Operation[Any], channel: Channel) -> None:
        self._transport = transport
        self._config = transport.config
        self._operation = operation
        self._future = operation.future
        self._channel = channel
        self._pacing = Pacing()
        self._maybe_lost = False
        self._last_contact = time.monotonic()
        # The server accepted it some time ago, if others of its lane had to be waited for.
        self._started = self._last_contact - operation.future.status().since_s
        self._polled = False
        self._trouble_since: Optional[float] = None

    def run(self) -> None:
        """Settle the future, or raise what it is to be settled with."""
        request_id = self._future.request_id or ""
        while not self._future.done():
            delay = self._step(request_id)
            if delay is None:
                return
            if self._transport.closing.is_set() or (
                delay > 0 and self._transport.closing.wait(delay)
            ):
                raise ClientClosedError(
                    f"the client was closed before {self._future.kind} was done"
                )

    def _step(self, request_id: str) -> Optional[float]:
        """Poll once; return the pause before the next poll, or None when settled."""
        began = time.monotonic()
        if self._polled:  # a result that is there is fetched, however late
            self._check_limits(began)
        self._polled = True
        self._future.attempts += 1
        try:
            reply = retrieve_future(
                self._transport,
                request_id,
                binary=self._operation.binary,
                read_timeout_s=self._read_timeout_s(began),
                channel=self._channel,
            )
        except APIConnectionError as silence:
            self._maybe_lost = True
            return self._after_silence(silence, began)
        self._last_contact = time.monotonic()
        error = None if reply.status < 300 else self._transport.status_error(_POLL, reply)
        outcome = interpret(
            reply,
            error,
            request_id=request_id,
            kind=self._future.kind,
            maybe_lost=self._maybe_lost,
        )
        return self._act_on(outcome, took_s=self._last_contact - began)

    def _act_on(self, outcome: Any, took_s: float) -> Optional[float]:
        if isinstance(outcome, Done):
            self._future.settle(self._operation.decode(outcome.reply))
            return None
        if isinstance(outcome, Failed):
            raise outcome.error
        if isinstance(outcome, Pending):
            self._future.queue_state = outcome.queue_state
            self._future.queue_state_reason = outcome.reason
            self._future.last_error = None
            self._trouble_since = None
            return self._pacing.after_pending(took_s, random.random())
        assert isinstance(outcome, Trouble)
        error = outcome.error
        self._future.last_error = error.message
        if self._is_final(error):
            error.attempts = self._future.attempts
            error.elapsed_s = self._last_contact - self._started
            raise error
        hint_s = getattr(error, "retry_after_s", None)
        return self._pacing.after_trouble(random.random(), hint_s)

    def _is_final(self, error: APIError) -> bool:
        """Decide whether trouble that may pass has lasted too long."""
        if error.status == 402:
            return self._config.on_billing == "raise"
        if error.status == 429:
            return False  # the server lives, and asks for patience
        if self._trouble_since is None:
            self._trouble_since = self._last_contact
        lasted_s = self._last_contact - self._trouble_since
        return self._pacing.is_final(error) or lasted_s > self._config.max_outage_s

    def _after_silence(self, error: APIError, began: float) -> float:
        """No answer: ride it out for max_outage_s, unless the poll just took its full time."""
        self._future.last_error = error.message
        now = time.monotonic()
        if isinstance(error, APITimeoutError) and now - began > self._config.connect_timeout_s + 1:
            return 0.0  # the server held the poll for longer than we wait: ask again
        if now - self._last_contact > self._config.max_outage_s:
            error.elapsed_s = now - self._last_contact
            error.request_id = self._future.request_id
            raise error
        return self._pacing.after_trouble(random.random())

    def _read_timeout_s(self, now: float) -> float:
        """Wait for an answer no longer than the limits of the operation allow."""
        limits = [self._config.poll_timeout_s]
        if self._config.operation_timeout_s is not None:
            limits.append(self._started + self._config.operation_timeout_s - now)
        if self._config.no_progress_timeout_s is not None:
            limits.append(self._last_contact + self._config.no_progress_timeout_s - now)
        return max(0.05, min(limits))

    def _check_limits(self, now: float) -> None:
        config, future = self._config, self._future
        if (
            config.operation_timeout_s is not None
            and now - self._started >= config.operation_timeout_s
        ):
            raise OperationTimeoutError(
                f"no result within operation_timeout_s = {config.operation_timeout_s:g} s: "
                f"{future.status()}",
                request_id=future.request_id,
                elapsed_s=now - self._started,
            )
        silent = now - self._last_contact
        if config.no_progress_timeout_s is not None and silent >= config.no_progress_timeout_s:
            raise NoProgressError(
                f"no contact with the server for {silent:.0f} s: {future.status()}",
                request_id=future.request_id,
                elapsed_s=now - self._started,
            )
