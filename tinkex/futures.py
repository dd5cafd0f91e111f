"""APIFuture: a concurrent.futures.Future for work that a server does.

It stays PENDING until it is settled, so `cancel` works at any time.  Whoever settles one uses
`settle` or `settle_error`, which tell whether they were first: a result that arrives after a
cancel is normal, not an error.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import queue
import sys
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
    Tuple,
    TypeVar,
)

from tinkex._runtime.awaiting import outcome_of
from tinkex._runtime.numeric import as_seconds
from tinkex.errors import ClientClosedError

logger = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")

#: On Windows a wait for a lock cannot be interrupted before Python 3.14; wait in slices there.
_SLICE_S = 0.25 if sys.platform == "win32" else float("inf")

_CALL = "future.result()"

#: The longest pause between two notices about one wait, in seconds.
LONGEST_NOTICE_S = 300.0
#: A wait for this long while polls fail is worth a warning, in seconds.
_TROUBLE_S = 30.0

# The failures that nobody asked for, of futures that were collected.  A finalizer may run anywhere,
# even inside a lock of logging, so it only puts them here; see `report_lost`.
_lost: queue.SimpleQueue[Tuple[str, Optional[str], BaseException]] = queue.SimpleQueue()
_reports_at_exit = False

# Futures that a finalizer gave up, likewise; see `abandon`.
_abandoned: queue.SimpleQueue[Sequence[APIFuture[Any]]] = queue.SimpleQueue()


@dataclasses.dataclass(frozen=True)
class FutureStatus:
    """A snapshot of what an operation is doing.

    Attributes:
        kind: the operation, e.g. ``"forward_backward"``.
        state: ``"queued"`` here, ``"submitting"``, ``"waiting"`` for the server, or ``"done"``.
        since_s: seconds in this state; of what is done, in the one before and since.
        request_id: the server's id, once it has accepted the work.
        queue_state, queue_state_reason: what the server reports about a pause, or about what the
            work waits for, if anything.
        attempts: polls sent so far.
        last_error: the last passing trouble, in words, or None.
        held_back: why it is not submitted yet, in words: what it waits for, and how much is left.
    """

    kind: str
    state: str
    since_s: float
    request_id: Optional[str] = None
    queue_state: Optional[str] = None
    queue_state_reason: Optional[str] = None
    attempts: int = 0
    last_error: Optional[str] = None
    held_back: Optional[str] = None

    def __str__(self) -> str:
        parts = [f"{self.kind}: {self.state} for {self.since_s:.0f} s"]
        if self.request_id:
            parts.append(f"request {self.request_id}")
        if self.queue_state and self.queue_state != "active":
            parts.append(f"{self.queue_state} ({self.queue_state_reason or 'no reason given'})")
        elif self.queue_state_reason:
            parts.append(f"the server reports: {self.queue_state_reason}")
        if self.held_back:
            parts.append(self.held_back)
        if self.last_error:
            parts.append(f"last error: {self.last_error}")
        return ", ".join(parts)


class APIFuture(Future[T], Generic[T]):
    """The result of a long operation, later.

    Works with `concurrent.futures.wait`, `as_completed` and `add_done_callback`.  `result(timeout)`
    bounds only the caller's wait: the operation goes on.  `cancel` settles the future and stops
    asking for the result; the server may still do the work.  Thread-safe.

    An error is never lost: if the future of failed work is dropped although nobody asked for its
    `result` or `exception` and it has no callback, the error is logged, once.  That is done by the
    next call of any client, by the heartbeats or at exit, whatever comes first.

    Args:
        kind: the operation's name, for messages.
        notice_after_s: a wait is explained in the log after this long: at INFO, or at WARNING once
            there has been trouble and it has taken half a minute.
        run_callback: how user callbacks are run; None runs them in the settling thread.
        why_held_back: tells, in words, why nothing is submitted just now, or None.
    """

    _heard = _read = True  # so of one that was never made whole
    _cancel_was_seen = False
    _begun = _withdrawn = False  # at most one of them; see `begin`

    def __init__(
        self,
        kind: str,
        *,
        notice_after_s: float = 10.0,
        run_callback: Optional[Callable[[Callable[[], object]], None]] = None,
        why_held_back: Optional[Callable[[], Optional[str]]] = None,
    ) -> None:
        super().__init__()
        # There may be thousands, few of them waited for: the deque in its place takes 600 bytes.
        self._condition._waiters = []  # type: ignore[attr-defined]
        self.kind = kind
        self._notice_after_s = notice_after_s
        self._run_callback = run_callback
        self._why_held_back = why_held_back
        self._pid = os.getpid()
        # Has somebody asked for the outcome, or will be told; has somebody got it.
        self._heard = self._read = False
        # Called once, when it is read or collected; may be called by a finalizer.
        self._on_read: Optional[Callable[[], None]] = None
        self._children: Sequence[APIFuture[Any]] = ()
        self._cancels_children = True
        # Written by one thread at a time (lane, then poller); read anywhere as plain values.
        self._request_id: Optional[str] = None
        self._state_name = "queued"
        self._state_since = time.monotonic()
        self.queue_state: Optional[str] = None
        self.queue_state_reason: Optional[str] = None
        self.attempts = 0
        self.last_error: Optional[str] = None
        #: Set while it waits for something: tells for what, in words.
        self.waiting_for: Optional[Callable[[], str]] = None

    def result(self, timeout: Optional[float] = None) -> T:
        """Wait for the result and return it.

        Args:
            timeout: seconds to wait; None waits as long as it takes.

        Raises:
            InvalidInputError: *timeout* is no number.
            concurrent.futures.TimeoutError: *timeout* passed; the operation goes on.
            concurrent.futures.CancelledError: it was cancelled.
            TinkexError: the operation failed.
        """
        self._await(timeout)
        self._note_read()
        value: T = super().result(0)
        return value

    def exception(self, timeout: Optional[float] = None) -> Optional[BaseException]:
        """Wait like `result`, and return the error instead of raising it; None on success."""
        self._await(timeout)
        self._note_read()
        return super().exception(0)

    def failed(self) -> bool:
        """Whether it is settled, and not with a result.  Does not block, nor count as reading."""
        return self.done() and (self.cancelled() or self._exception is not None)

    @property
    def entered(self) -> float:
        """When it reached its state (monotonic)."""
        return self._state_since

    @property
    def request_id(self) -> Optional[str]:
        """The server's id of the work, once it was accepted (of the first part, if in parts)."""
        return self._children[0].request_id if self._children else self._request_id

    @property
    def in_parts(self) -> bool:
        """True if it stands for other futures, which are counted themselves."""
        return bool(self._children)

    @property
    def was_sent(self) -> bool:
        """True once it, or a part of it, has left the queue here to be submitted."""
        return self._state_name != "queued" or any(child.was_sent for child in self._children)

    @property
    def was_accepted(self) -> bool:
        """True once the server has accepted it, unless it is to be sent again since."""
        return self._state_name == "waiting"

    def future(self) -> Future[T]:
        """Return this future itself (the official SDK's accessor)."""
        return self

    def __await__(self) -> Generator[Any, None, T]:
        """In a coroutine, ``await future`` is its result.  See `result_async`."""
        return outcome_of(self).__await__()

    def result_async(self, timeout: Optional[float] = None) -> Coroutine[Any, Any, T]:
        """Like `result`, in a running event loop, which goes on meanwhile.

        Cancelling the task that awaits it, and the end of *timeout* seconds, cancel the future;
        `result` does not do that.  Raises asyncio's TimeoutError and CancelledError.
        """
        return outcome_of(self, as_seconds("timeout", timeout))

    def coroutine(self) -> Coroutine[Any, Any, T]:
        """What awaits the future, for ``asyncio.create_task`` and the like."""
        return outcome_of(self)

    if not TYPE_CHECKING:  # a checker would take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            told = f"{type(self).__name__!r} object has no attribute {name!r}"
            if not name.startswith("_"):
                kind = vars(self).get("kind", "an operation")  # not there if it was never made
                told += f"; it is the future of {kind}: call .result(), as in {_CALL}.{name}"
            raise AttributeError(told)

        def __getitem__(self, key: object) -> Any:  # iterating it comes here, too
            raise TypeError(
                f"the future of {self.kind} holds no items: call .result(), as in {_CALL}[...]"
            )

    def __repr__(self) -> str:
        # Plain values only: in the child of a fork the lock may be dead.
        state = self._state_name if self._state == "PENDING" else self._state.lower()
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
            held_back=self._held_back(),
        )

    def _held_back(self) -> Optional[str]:
        waiting_for, why = self.waiting_for, self._why_held_back
        if self.done():
            return None
        if waiting_for is not None:
            return waiting_for()
        unsent = self._state_name in ("queued", "submitting")
        return why() if unsent and why is not None else None

    def cancel(self) -> bool:
        """Settle the future as cancelled; False if it was settled already.

        A sample's place is free at once, and the server is told where it takes that; other work
        that it has accepted runs to its end.  What was not sent yet is not sent.  Waiters get
        CancelledError, callbacks are called; a result that still comes is thrown away.  Cancelling
        a batch in several requests cancels these, but not those that add to a gradient once one of
        them was sent.  In the child of a fork it does nothing, and returns False.
        """
        if self._pid != os.getpid():
            return False  # what waits for it, and its connection, are the parent's
        # super().cancel() is True for every caller of a cancelled future, and wait() and
        # as_completed() notice a cancel only once it is notified, which must happen just once.
        if not super().cancel():
            return False
        with self._condition:
            first, self._cancel_was_seen = not self._cancel_was_seen, True
        if not first:
            return False
        self.set_running_or_notify_cancel()
        if self._cancels_children:
            for child in self._children:
                child.cancel()
        return True

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call ``fn(self)`` once settled: on the client's callback thread, or, if the future is
        settled already, at once in this thread.  Its exceptions are logged.
        """
        self._heard = True
        run = self._run_callback
        if run is None or self.done():
            super().add_done_callback(lambda future: _read_by(fn, future))
        else:
            super().add_done_callback(lambda future: _hand_over(run, fn, future))

    def on_settled(self, fn: Callable[[Future[T]], object]) -> None:
        """Like `add_done_callback`, in the settling thread; for our own quick bookkeeping."""
        super().add_done_callback(fn)

    def settle(self, value: T) -> bool:
        """Set the result; False if the future was settled already."""
        try:
            self.set_result(value)
        except InvalidStateError:
            return False
        return True

    def settle_error(self, error: BaseException) -> bool:
        """Set the error; False if the future was settled already."""
        try:
            self.set_exception(error)
        except InvalidStateError:
            return False
        _report_at_exit()
        return True

    def _invoke_callbacks(self) -> None:
        super()._invoke_callbacks()  # type: ignore[misc]
        # A caller who keeps the future must not keep everything that they refer to.
        self._done_callbacks.clear()  # type: ignore[attr-defined]

    def begin(self) -> bool:
        """Note that its work is about to be done; False if it was settled or cancelled before.

        From here on `cancel_if_queued` leaves it alone.
        """
        with self._condition:
            self._begun = not (self._withdrawn or self.done())
            return self._begun

    def cancel_if_queued(self) -> bool:
        """Cancel it, unless `begin` has succeeded; return whether it was cancelled."""
        with self._condition:
            if self._begun or self.was_sent:
                return False
            self._withdrawn = True  # decided under the lock; callbacks are called outside of it
        return self.cancel()

    def enter(self, state: str, request_id: Optional[str] = None) -> None:
        """Note that the operation has reached *state*."""
        self._state_name = state
        self._state_since = time.monotonic()
        if request_id is not None:
            self._request_id = request_id

    def on_read(self, fn: Callable[[], None]) -> None:
        """Have *fn* called once: by whoever reads the outcome first, or by the finalizer.

        It must be safe in finalizers: no lock, no logging.  For whoever makes the future.
        """
        self._on_read = fn

    def stand_for(self, children: Sequence[APIFuture[Any]], *, cancel: bool = True) -> None:
        """Report the state of *children*; with *cancel*, cancelling this one cancels them."""
        self._children, self._cancels_children = children, cancel
        if cancel and self.cancelled():  # before it had children to cancel
            for child in children:
                child.cancel()

    def uncount(self) -> None:
        """Free its place among ``max_unread``: whoever asks for it keeps few, and reads them."""
        self._call_on_read()

    def _note_read(self) -> None:
        if not self._read:
            self._read = self._heard = True
            self._call_on_read()

    def _call_on_read(self) -> None:
        fn = self.__dict__.pop("_on_read", None)  # atomic: one of several readers gets it
        if fn is not None:
            fn()

    def __del__(self) -> None:
        # Anywhere, at any time, even inside a lock of ours or of logging: nothing here may lock.
        if self._read:
            return
        self._call_on_read()
        error = self._exception
        if self._heard or error is None or isinstance(error, ClientClosedError):
            return
        if self._pid == os.getpid():
            _lost.put((self.kind, self._request_id, error))

    def _await(self, timeout: Optional[float]) -> None:
        """Wait until settled, saying now and then in the log what is waited for."""
        timeout = as_seconds("timeout", timeout)
        began = now = time.monotonic()
        deadline = float("inf") if timeout is None else now + timeout
        pause = self._notice_after_s
        notice_at = now + pause
        # In the child of a fork the future's own lock may be dead: do not touch it.
        if self._pid != os.getpid() and self._state == "PENDING":
            raise ClientClosedError(
                f"{self.kind} was started before a fork; this process cannot wait for it",
                hint="Create the client in the child process.",
            )
        while not self.done():
            try:
                super().exception(min(deadline - now, notice_at - now, _SLICE_S))
            except FutureTimeoutError:
                now = time.monotonic()
                if now >= deadline:
                    raise FutureTimeoutError(
                        f"no result within {timeout:g} s: {self.status()}"
                    ) from None
                if now >= notice_at:
                    trouble = self.last_error is not None and now - began >= _TROUBLE_S
                    level = logging.WARNING if trouble else logging.INFO
                    logger.log(level, "still waiting: %s", self.status())
                    pause = min(pause * 2, LONGEST_NOTICE_S)
                    notice_at = now + pause


def give_up(futures: Sequence[APIFuture[Any]]) -> None:
    """Cancel *futures*, which nobody wants any more; what they failed with counts as read."""
    for future in futures:
        if not future.cancel() and future.done() and not future.cancelled():
            future.exception()


def abandon(futures: Sequence[APIFuture[Any]]) -> None:
    """Like `give_up`, from a finalizer.

    It may run at any time, and so while the thread holds a lock of ours: then they are only put
    aside, for the next call of any client, the heartbeats or the exit.
    """
    if _inside_tinkex():
        _abandoned.put(futures)
        _report_at_exit()
    else:
        give_up(futures)


def _inside_tinkex() -> bool:
    """Whether whoever called our caller's caller, or any before, is code of ours."""
    frame = sys._getframe(2).f_back
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("tinkex."):
            return True
        frame = frame.f_back
    return False


def report_lost() -> None:
    """Log the errors that nobody asked for, of futures that were collected.  Thread-safe.

    Cancel those that were abandoned, too.
    """
    while not _abandoned.empty():
        try:
            give_up(_abandoned.get_nowait())
        except queue.Empty:  # another thread was faster
            break
    while not _lost.empty():
        try:
            kind, request_id, error = _lost.get_nowait()
        except queue.Empty:  # another thread was faster
            return
        known = request_id is None or request_id in str(error)
        logger.error(
            "%s%s failed, and nobody asked for its outcome: %s: %s",
            kind,
            "" if known else f" (request {request_id})",
            type(error).__name__,
            error,
        )


def _report_at_exit() -> None:
    global _reports_at_exit
    if not _reports_at_exit:  # twice, if two threads race, does no harm
        _reports_at_exit = True
        atexit.register(report_lost)


def _hand_over(
    run: Callable[[Callable[[], object]], None], fn: Callable[[Any], object], future: Any
) -> None:
    try:
        run(lambda: _call(fn, future))
    except ClientClosedError:  # no callback thread any more, e.g. while the interpreter exits
        _call(fn, future)


def _read_by(fn: Callable[[Any], object], future: Any) -> None:
    future._note_read()
    fn(future)


def _call(fn: Callable[[Any], object], future: Any) -> None:
    try:
        _read_by(fn, future)
    except BaseException:  # SystemExit too would end the callback thread
        logger.exception("a callback of %s failed", future.kind)


def gather(
    parent: APIFuture[U], children: Sequence[APIFuture[T]], join: Callable[[List[T]], U]
) -> APIFuture[U]:
    """Settle *parent* with ``join(results)`` once all *children* are settled, in their order.

    The first failure settles the parent and cancels the other children; so does cancelling the
    parent.  *join* runs in the thread that settles the last child.
    """
    parent.stand_for(children)

    def child_settled(child: Future[T]) -> None:
        if child.cancelled():
            parent.cancel()
            return
        error = child.exception()
        if error is not None:
            if parent.settle_error(error):
                for other in children:
                    other.cancel()
            return
        if all(other.done() for other in children) and not parent.done():
            try:
                parent.settle(join([other.result() for other in children]))
            except Exception as failure:
                parent.settle_error(failure)

    for child in children:
        child.on_settled(child_settled)
    return parent
