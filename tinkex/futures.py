"""APIFuture: a concurrent.futures.Future for work that a server does."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
import time
from concurrent.futures import Future, InvalidStateError, TimeoutError as FutureTimeoutError
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Coroutine,
    Generator,
    Generic,
    List,
    Optional,
    Sequence,
    TypeVar,
)

from tinkex._runtime.awaiting import outcome_of
from tinkex._runtime.clock import LongWait
from tinkex._runtime.lifecycle import defer
from tinkex._runtime.numeric import as_seconds
from tinkex.errors import ClientClosedError

if TYPE_CHECKING:
    from tinkex._transport.tracing import Operation

logger = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")

#: Runs a function in another thread.
RunLater = Callable[[Callable[[], object]], None]

_CALL = "future.result()"

#: Waiting this long while requests fail is worth a warning, in seconds.
_TROUBLE_S = 10.0


@dataclasses.dataclass(frozen=True)
class FutureStatus:
    """A snapshot of what an operation is doing.

    Attributes:
        kind: the operation, e.g. ``"forward_backward"``.
        state: ``"queued"`` in the client, ``"submitting"``, ``"waiting"`` for the server, or
            ``"done"``.
        since_s: seconds since the operation entered this state; if it is done, since it entered
            its last state before that.
        request_id: the server's id, once it has accepted the work.
        queue_state, queue_state_reason: the server's report that the work is paused or waiting
            for something, and why, if it sent one.
        attempts: polls sent so far.
        last_error: the message of the last error that was retried, or None.
        blocked_on: why it has not been submitted yet: the limit it waits for, and how much of that
            limit is in use.
    """

    kind: str
    state: str
    since_s: float
    request_id: Optional[str] = None
    queue_state: Optional[str] = None
    queue_state_reason: Optional[str] = None
    attempts: int = 0
    last_error: Optional[str] = None
    blocked_on: Optional[str] = None

    @property
    def held_back(self) -> Optional[str]:
        """The earlier name of ``blocked_on``."""
        return self.blocked_on

    def __str__(self) -> str:
        parts = [f"{self.kind}: {self.state} for {self.since_s:.0f} s"]
        if self.request_id:
            parts.append(f"request {self.request_id}")
        if self.queue_state and self.queue_state != "active":
            parts.append(f"{self.queue_state} ({self.queue_state_reason or 'no reason given'})")
        elif self.queue_state_reason:
            parts.append(f"the server reports: {self.queue_state_reason}")
        if self.blocked_on:
            parts.append(self.blocked_on)
        if self.last_error:
            parts.append(f"last error: {self.last_error}")
        return ", ".join(parts)


class APIFuture(Future[T], Generic[T]):
    """The future result of a long-running operation.

    Works with `concurrent.futures.wait`, `as_completed` and `add_done_callback`.  `result(timeout)`
    bounds only the caller's wait: the operation continues.  `cancel` settles the future and stops
    polling for the result; the server may still do the work.  Thread-safe.

    An error is never lost: if a failed future is garbage-collected before `result` or `exception`
    was called, and it has no callback, its error is logged once: by the next call of any client,
    by the heartbeat thread or at exit, whichever comes first.

    Args:
        kind: the operation's name, for messages.
        notice_after_s: seconds until a wait is first explained in the log: at INFO, or at WARNING
            if requests have failed and the wait has taken 10 s.
        run_callback: runs user callbacks in another thread; None runs them in the settling thread.
        throttle_reason: returns why nothing is being submitted, in words, or None.
    """

    # Attributes that few futures ever set have their defaults on the class: with more than 30
    # attributes of its own, an instance takes four times the memory, and there may be thousands.
    _on_read: Optional[Callable[[], None]] = None
    _retrieved = True  # the finalizer also sees instances whose __init__ did not finish
    _begun = _withdrawn = _cancel_was_seen = False
    # Plain values for finalizers and for the child of a fork, where no lock may be taken.
    _has_callback = False
    _outcome: Optional[str] = None
    _failure: Optional[BaseException] = None
    _children: Sequence[APIFuture[Any]] = ()
    _cancels_children = True
    # Written by one thread at a time (the lane's, then the poller's); read without a lock.
    _request_id: Optional[str] = None
    queue_state: Optional[str] = None
    queue_state_reason: Optional[str] = None
    attempts = 0
    last_error: Optional[str] = None
    #: The tracing span of the operation, if tracing is on.
    operation: Optional[Operation] = None
    #: Set while the operation waits to be submitted: describes what it waits for.
    waiting_for: Optional[Callable[[], str]] = None

    def __init__(
        self,
        kind: str,
        *,
        notice_after_s: float = 10.0,
        run_callback: Optional[RunLater] = None,
        throttle_reason: Optional[Callable[[], Optional[str]]] = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self._notice_after_s = notice_after_s
        self._run_callback = run_callback
        self._throttle_reason = throttle_reason
        self._pid = os.getpid()
        # Guards the callbacks (None once they have been called), and everything that must happen
        # only once: the work begins or is cancelled first, waiters are notified of a cancel, and
        # `_on_read` is called.  Reentrant, because a finalizer may run while it is held.
        self._lock = threading.RLock()
        self._callbacks: Optional[List[Callable[[Any], object]]] = []
        self._retrieved = False
        self._state_name = "queued"
        self._state_since = time.monotonic()
        # Register one callback with the base class, and have it run all of ours: the base class
        # would keep its callbacks, and everything they refer to, as long as the future lives.
        super().add_done_callback(_run_callbacks)

    def result(self, timeout: Optional[float] = None) -> T:
        """Wait for the result and return it.

        Args:
            timeout: seconds to wait; None waits as long as it takes.

        Raises:
            InvalidInputError: *timeout* is not a number.
            concurrent.futures.TimeoutError: *timeout* passed; the operation continues.
            concurrent.futures.CancelledError: it was cancelled.
            TinkexError: the operation failed.
        """
        self._await(timeout)
        self._note_read()  # first, since the next call may raise
        value: T = super().result(0)
        return value

    def exception(self, timeout: Optional[float] = None) -> Optional[BaseException]:
        """Wait like `result`, and return the error instead of raising it; None on success."""
        self._await(timeout)
        self._note_read()
        return super().exception(0)

    def failed(self) -> bool:
        """Return whether it failed or was cancelled.  Does not block or count as reading."""
        return self.done() and (self.cancelled() or super().exception(0) is not None)

    @property
    def was_read(self) -> bool:
        """True once `result` or `exception` was called, or a user callback was run."""
        return self._retrieved

    @property
    def entered(self) -> float:
        """When the operation entered its current state (monotonic)."""
        return self._state_since

    @property
    def request_id(self) -> Optional[str]:
        """The server's id of the work, or of its first part; None until it is accepted."""
        return self._children[0].request_id if self._children else self._request_id

    @property
    def in_parts(self) -> bool:
        """True if this future stands for several others, which are counted instead of it."""
        return bool(self._children)

    @property
    def was_sent(self) -> bool:
        """True once the work, or a part of it, has left the client's queue to be submitted."""
        return self._state_name != "queued" or any(child.was_sent for child in self._children)

    @property
    def was_accepted(self) -> bool:
        """True once the server has accepted the work, unless it must be sent again."""
        return self._state_name == "waiting"

    def future(self) -> Future[T]:
        """Return this future itself (the official SDK's accessor)."""
        return self

    def __await__(self) -> Generator[Any, None, T]:
        """Let a coroutine ``await future`` to get its result.  See `result_async`."""
        return self.result_async().__await__()

    def result_async(self, timeout: Optional[float] = None) -> Coroutine[Any, Any, T]:
        """Like `result`, without blocking the running event loop.

        Unlike `result`, this cancels the future when *timeout* seconds have passed, or when the
        awaiting task is cancelled.  Raises asyncio's TimeoutError and CancelledError.
        """
        return outcome_of(self, self._long_wait(timeout), self._explain)

    def coroutine(self) -> Coroutine[Any, Any, T]:
        """Return a coroutine that awaits the future, e.g. for ``asyncio.create_task``."""
        return self.result_async()

    # Forgetting .result() is the most common mistake; a plain AttributeError would not point to it.
    if not TYPE_CHECKING:  # a type checker would accept every attribute name

        def __getattr__(self, name: str) -> Any:
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            if not name.startswith("_"):
                kind = vars(self).get("kind", "an operation")  # __init__ may not have run
                message += f"; it is the future of {kind}: call .result(), as in {_CALL}.{name}"
            raise AttributeError(message)

        def __getitem__(self, key: object) -> Any:  # iterating over a future calls this, too
            raise TypeError(
                f"the future of {self.kind} holds no items: call .result(), as in {_CALL}[...]"
            )

    def __repr__(self) -> str:
        # Plain values only: in the child of a fork the lock may be held forever.
        state = self._outcome or self._state_name
        request = f", request {self._request_id}" if self._request_id else ""
        return f"<APIFuture {self.kind}: {state}{request}>"

    def status(self) -> FutureStatus:
        """Return what the operation is doing now.  Does not block."""
        for child in self._children:
            if not child.done():
                return child.status()
        return FutureStatus(
            kind=self.kind,
            state="done" if self.done() else self._state_name,
            since_s=time.monotonic() - self._state_since,
            request_id=self.request_id,
            queue_state=self.queue_state,
            queue_state_reason=self.queue_state_reason,
            attempts=self.attempts,
            last_error=self.last_error,
            blocked_on=self._blocked_on(),
        )

    def _blocked_on(self) -> Optional[str]:
        waiting_for, throttle_reason = self.waiting_for, self._throttle_reason
        if self.done():
            return None
        if waiting_for is not None:
            return waiting_for()
        unsent = self._state_name in ("queued", "submitting")
        return throttle_reason() if unsent and throttle_reason is not None else None

    def cancel(self) -> bool:
        """Settle the future as cancelled; return False if it was settled already.

        Work that was not sent yet is never sent.  A sample frees its place immediately, and the
        server is asked to cancel it if it supports that; other accepted work runs to its end, and
        its result is discarded.  Waiters get CancelledError, and callbacks are called.  Cancelling
        a batch of several requests cancels all of them; but if they add to a gradient and one was
        sent, the rest are sent too.  In the child of a fork, it does nothing and returns False.
        """
        if self._pid != os.getpid():
            return False  # its waiters and its connection belong to the parent
        # super().cancel() returns True even if the future was cancelled before.  wait() and
        # as_completed() notice a cancel only when notified, which must happen exactly once.
        if not super().cancel():
            return False
        with self._lock:
            first, self._cancel_was_seen = not self._cancel_was_seen, True
        if not first:
            return False
        # Called only here, never at submission: a RUNNING future can no longer be cancelled.
        self.set_running_or_notify_cancel()
        if self._cancels_children:
            for child in self._children:
                child.cancel()
        return True

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call ``fn(self)`` on the client's callback thread when the future is settled; if it is
        settled already, call *fn* immediately in this thread.  Its exceptions are logged.
        """
        # Not on the settling thread, usually the poller's: a callback that blocks on another future
        # would hold up the very thread that may have to settle that future.
        self._has_callback = True
        if not self._add_callback(functools.partial(_deliver, fn, self._run_callback)):
            self._note_read()
            _call(fn, self)

    def on_settled(self, fn: Callable[[Any], object]) -> None:
        """Like `add_done_callback`, but in the settling thread; for quick internal bookkeeping."""
        if not self._add_callback(fn):
            _call(fn, self)

    def _add_callback(self, fn: Callable[[Any], object]) -> bool:
        with self._lock:
            if self._callbacks is None:
                return False
            self._callbacks.append(fn)
            return True

    def try_set_result(self, value: T) -> bool:
        """Set the result; return False if the future was settled already."""
        # Checking first would be a race, and a result that arrives after a cancel is not an error.
        try:
            self.set_result(value)
        except InvalidStateError:
            return False
        return True

    def try_set_exception(self, error: BaseException) -> bool:
        """Set the error; return False if the future was settled already."""
        try:
            self.set_exception(error)
        except InvalidStateError:
            return False
        self._failure = error  # the finalizer cannot call exception(), which takes a lock
        return True

    def begin(self) -> bool:
        """Mark the work as begun; return False if the future was settled or cancelled first.

        Once the work has begun, `cancel_if_queued` does nothing.
        """
        with self._lock:
            self._begun = not (self._withdrawn or self.done())
            return self._begun

    def cancel_if_queued(self) -> bool:
        """Cancel the future unless its work has begun; return whether it was cancelled."""
        with self._lock:
            if self._begun or self.was_sent:
                return False
            self._withdrawn = True  # decide under the lock, but call callbacks outside of it
        return self.cancel()

    def enter(self, state: str, request_id: Optional[str] = None) -> None:
        """Note that the operation has entered *state*."""
        self._state_name = state
        self._state_since = time.monotonic()
        if request_id is not None:
            self._request_id = request_id

    def on_read(self, fn: Callable[[], None]) -> None:
        """Have *fn* called once: by the first reader of the outcome, or by the finalizer.

        *fn* must be safe in a finalizer: no lock, no logging.  A later *fn* replaces it.
        """
        self._on_read = fn

    def stand_for(self, children: Sequence[APIFuture[Any]], *, cancel: bool = True) -> None:
        """Report the state of *children* as ours; with *cancel*, a cancel cancels them too."""
        self._children, self._cancels_children = children, cancel
        if cancel and self.cancelled():  # before this call, so `cancel` saw no children
            for child in children:
                child.cancel()

    def uncount(self) -> None:
        """Free its place among ``max_unread``; for callers that keep few futures and read them."""
        # Free the place exactly once, whichever of several readers comes first.
        with self._lock:
            on_read, self._on_read = self._on_read, None
        if on_read is not None:
            on_read()

    def _note_read(self) -> None:
        if not self._retrieved:
            self._retrieved = True
            self.uncount()

    def __del__(self) -> None:
        # A finalizer may run in any thread at any time, even one that holds a lock of ours or of
        # logging: nothing here may take a lock.
        if self._retrieved:
            return
        if self._on_read is not None:
            self._on_read()
        error = self._failure
        if self._has_callback or error is None or isinstance(error, ClientClosedError):
            return
        if self._pid == os.getpid():
            defer(_log_unretrieved, self.kind, self._request_id, error)

    def _await(self, timeout: Optional[float]) -> None:
        """Wait until the future is settled; explain a long wait in the log."""
        wait = self._long_wait(timeout)
        while not self.done():
            # In slices, to log notices, and because Ctrl-C cannot interrupt the wait on Windows.
            try:
                super().exception(wait.slice_s())
            except FutureTimeoutError:
                if wait.is_over:
                    message = f"no result within {wait.timeout_s:g} s: {self.status()}"
                    raise FutureTimeoutError(message) from None
                self._explain(wait)

    def _long_wait(self, timeout: Optional[float]) -> LongWait:
        """Begin a wait; raise ClientClosedError in the child of a fork, where it would not end."""
        timeout = as_seconds("timeout", timeout)
        # In the child, the future's own lock may be held forever: do not touch it.
        if self._pid != os.getpid() and self._outcome is None:
            raise ClientClosedError(
                f"{self.kind} was started before a fork; this process cannot wait for it",
                hint="Create the client in the child process.",
            )
        return LongWait(self._notice_after_s, timeout)

    def _explain(self, wait: LongWait) -> None:
        """Log what the operation is doing, if *wait* has lasted long enough for a notice."""
        if wait.notice_is_due():
            trouble = self.last_error is not None and wait.elapsed_s >= _TROUBLE_S
            level = logging.WARNING if trouble else logging.INFO
            logger.log(level, "still waiting: %s", self.status())


def _deliver(fn: Callable[[Any], object], run: Optional[RunLater], future: APIFuture[Any]) -> None:
    """Have *run* call a user callback.  Called in the thread that settles *future*."""
    if run is not None:
        try:
            run(functools.partial(_call_user, fn, future))
            return
        except ClientClosedError:  # there is no callback thread, e.g. at interpreter exit
            pass
    _call_user(fn, future)


def _call_user(fn: Callable[[Any], object], future: APIFuture[Any]) -> None:
    """Call a user callback, normally on the callback thread.  Counts as reading the outcome."""
    try:
        future._note_read()
        fn(future)
    except BaseException:  # even SystemExit must not end the callback thread
        logger.exception("a callback of %s failed", future.kind)


def _run_callbacks(future: Any) -> None:
    """Run and drop the callbacks of *future*.  Called in the thread that settles it."""
    future._outcome = "cancelled" if future.cancelled() else "finished"
    # Under the lock, so that each callback is called exactly once: here, or by the thread that
    # adds it.
    with future._lock:
        callbacks, future._callbacks = future._callbacks, None
    for fn in callbacks:
        _call(fn, future)


def _call(fn: Callable[[Any], object], future: APIFuture[Any]) -> None:
    try:
        fn(future)
    except Exception:
        logger.exception("a callback of %s failed", future.kind)


def _log_unretrieved(kind: str, request_id: Optional[str], error: BaseException) -> None:
    """Log the failure of a future that was garbage-collected unread."""
    known = request_id is None or request_id in str(error)
    request = "" if known else f" (request {request_id})"
    logger.error("unretrieved failure in %s%s: %s: %s", kind, request, type(error).__name__, error)


def discard(futures: Sequence[APIFuture[Any]]) -> None:
    """Cancel *futures*, whose results are no longer wanted, and mark failures as read."""
    for future in futures:
        if not future.cancel() and future.done() and not future.cancelled():
            future.exception()


def gather(
    parent: APIFuture[U], children: Sequence[APIFuture[T]], join: Callable[[List[T]], U]
) -> APIFuture[U]:
    """Settle *parent* with ``join(results)`` once all *children* have succeeded.

    The results are in the order of *children*.  The first failure settles the parent and cancels
    the other children; cancelling the parent cancels all children.  *join* runs in the thread that
    settles the last child.
    """
    parent.stand_for(children)
    for child in children:
        child.on_settled(functools.partial(_child_settled, parent, children, join))
    return parent


def _child_settled(
    parent: APIFuture[U],
    children: Sequence[APIFuture[T]],
    join: Callable[[List[T]], U],
    child: APIFuture[T],
) -> None:
    """Note in *parent* that *child* is settled.  Called in the thread that settles *child*."""
    if child.cancelled():
        parent.cancel()
        return
    error = child.exception()
    if error is not None:
        if parent.try_set_exception(error):
            for other in children:
                other.cancel()
    # Two threads that settle the last two children may both find all of them done; the second
    # result is then ignored.
    elif all(other.done() for other in children) and not parent.done():
        try:
            parent.try_set_result(join([other.result() for other in children]))
        except Exception as failure:
            parent.try_set_exception(failure)
