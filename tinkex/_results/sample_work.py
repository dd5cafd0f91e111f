"""SampleWork: one sample on its way, whichever thread has it, and a worker's time with it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Iterator, NamedTuple, Optional, Type

from tinkex._results.poll_loop import Operation
from tinkex._transport.fast_connection import AnyChannel
from tinkex._transport.transport import Transport
from tinkex.errors import ResultExpiredError
from tinkex.futures import APIFuture

if TYPE_CHECKING:
    from tinkex.types import UntypedFuture

#: After how many seconds to submit a sample again whose result was lost, by the number of times
#: it was submitted again before; None is never.
Resubmit = Callable[[int], Optional[float]]


class Target(NamedTuple):
    """Whose samples they are, as ``retrieve_futures`` calls it."""

    sampling_session_id: str
    clone: int = 0


@dataclasses.dataclass
class SampleWork:
    """One sample.  Changed only by the thread that has it.

    Attributes:
        operation: its future, and how its result is read.
        send: submits it; each call must make a new request of it.
        resubmit: when to submit it again if its result was lost.
        target: whose it is, once it was sent; None if it must be polled for on its own.
        accepted: the server works on it, under the future's request id.
        lost: its result was lost.
        maybe_lost: a poll had no answer, which may have held the result.
        times: how often it was submitted again.
    """

    operation: Operation[Any]
    send: Callable[[AnyChannel], UntypedFuture]
    resubmit: Resubmit = lambda times: None
    target: Optional[Callable[[], Target]] = None
    accepted: bool = False
    lost: Optional[ResultExpiredError] = None
    maybe_lost: bool = False
    times: int = 0

    def submit(self, stint: Stint) -> None:
        """Send it.  Blocks; raises what *send* raises."""
        future = self.operation.future
        future.enter("submitting")
        with stint.unbroken():
            answer = self.send(stint.channel)
        future.enter("waiting", answer.request_id)
        self.accepted, self.lost, self.maybe_lost = True, None, False

    def note_lost(self, error: ResultExpiredError) -> None:
        """The server has no result for it any more."""
        self.accepted, self.lost = False, error


class Stint:
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

    def __enter__(self) -> Stint:
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


class OwnChannels:
    """A connection for each thread that asks for one."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._thread_local = threading.local()

    def get(self) -> AnyChannel:
        """The calling thread's own, made at its first use and when it was stopped."""
        channel: Optional[AnyChannel] = getattr(self._thread_local, "channel", None)
        if channel is not None and channel.stopped.is_set():
            channel.abort()
            channel = None
        if channel is None:
            channel = self._thread_local.channel = self._transport.open_connection()
        return channel
