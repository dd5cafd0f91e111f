"""PendingRequest: one request on its way to a result.  Lease: a worker's connection for it."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Generic,
    Iterator,
    NamedTuple,
    Optional,
    Type,
    TypeVar,
)

from tinkex._transport.request import Reply
from tinkex.errors import ResultExpiredError
from tinkex.futures import APIFuture

if TYPE_CHECKING:
    from tinkex._transport.fast_connection import AnyChannel
    from tinkex._transport.transport import Transport
    from tinkex.types import UntypedFuture

T = TypeVar("T")


class SamplerId(NamedTuple):
    """A sampler as ``retrieve_futures`` names it: there is one batch poll for each."""

    sampling_session_id: str
    clone: int = 0


class PendingRequest(Generic[T]):
    """One request, from the call to its result: how to send it, and how to read its result.

    Subclasses override `send` and `decode`, and other methods as needed.  Used by one thread at a
    time: the one that sends it, then the one that polls for it.

    Attributes:
        future: settled with the result.
        owner: the run or sampler that it belongs to, for log lines: ``"run ..."`` or
            ``"sampler ..."``.
        binary: whether the result may be protobuf.
        large: whether the result may be so large that only a few like it should be fetched at a
            time.
        pause_grace_s: how long a pause of the owner must last to be logged, in seconds.
        no_progress_timeout_s: replaces the setting of that name; None keeps the setting.
        accepted: whether the server has accepted it, under the future's request id.
        lost: if the server accepted it but lost the result, so that it must be sent again: the
            error that says so.
        maybe_lost: whether a response to a poll was lost that may have been the result.
        losses: how often it was sent again because its result was lost.
    """

    # A batch job has thousands of these.
    __slots__ = (
        "accepted",
        "future",
        "large",
        "losses",
        "lost",
        "maybe_lost",
        "no_progress_timeout_s",
        "owner",
    )

    binary = False
    pause_grace_s = 60.0

    def __init__(
        self,
        future: APIFuture[T],
        owner: str = "",
        *,
        large: bool = False,
        no_progress_timeout_s: Optional[float] = None,
    ) -> None:
        self.future = future
        self.owner = owner
        self.large = large
        self.no_progress_timeout_s = no_progress_timeout_s
        self.accepted = False
        self.lost: Optional[ResultExpiredError] = None
        self.maybe_lost = False
        self.losses = 0

    def send(self, channel: Optional[AnyChannel] = None) -> UntypedFuture:
        """Send it, on *channel* if one is given; blocks.  Each call is a new request."""
        raise NotImplementedError

    def decode(self, reply: Reply) -> T:
        """Read the result from the final reply.  May raise TinkexError."""
        raise NotImplementedError

    def on_failure(self, error: BaseException) -> Optional[BaseException]:
        """Return the error to report for *error*, or None if the request continues regardless.

        Called in the thread that polls for it; must be quick and not raise.
        """
        return error

    def retry_after_loss(self) -> Optional[float]:
        """Return the pause before it is sent again after its result was lost; None if never."""
        return None

    def sampler_id(self) -> Optional[SamplerId]:
        """Return its sampler, known once it was sent; None means to poll for it individually."""
        return None

    def submit(self, lease: Lease) -> None:
        """Send it on the connection of *lease*; blocks, and raises what `send` raises."""
        self.future.enter("submitting")
        with lease.submitting():
            response = self.send(lease.channel)
        self.note_accepted(response.request_id)

    def note_accepted(self, request_id: str) -> None:
        """Note that the server has accepted it under *request_id*."""
        self.future.enter("waiting", request_id)
        self.accepted, self.lost, self.maybe_lost = True, None, False

    def note_lost(self, error: ResultExpiredError) -> None:
        """Note that the server has lost its result: it must be sent again."""
        self.accepted, self.lost = False, error


class AcceptedRequest(PendingRequest[T]):
    """A request that the server has already accepted; a function reads its result."""

    def __init__(
        self, future: APIFuture[T], decode: Callable[[Reply], T], owner: str, request_id: str
    ) -> None:
        super().__init__(future, owner)
        self._decode = decode
        self.note_accepted(request_id)

    def decode(self, reply: Reply) -> T:
        """Read the result."""
        return self._decode(reply)


class Lease:
    """A worker's use of its connection for one future; cancelling the future ends it.

    A poll is then aborted.  A submission is finished, but not retried: its response contains the id
    that is needed to have the server cancel the work.
    """

    def __init__(self, future: APIFuture[Any], channel: AnyChannel) -> None:
        self.channel = channel
        # Guards _over and _submitting.
        self._lock = threading.Lock()
        self._over = False
        self._submitting = False
        self._operation = future.operation
        self._span_token: Any = None
        # Calls `_settled` immediately, in this thread, if the future was cancelled already.
        future.on_settled(self._settled)

    def __enter__(self) -> Lease:
        if self._operation is not None:
            self._span_token = self._operation.attach()
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        with self._lock:  # from now on the channel may serve another future
            self._over = True
        if self._operation is not None:
            self._operation.detach(self._span_token)

    @contextlib.contextmanager
    def submitting(self) -> Iterator[None]:
        """Keep the request sent in this block from being aborted."""
        with self._lock:
            self._submitting = True
        try:
            yield
        finally:
            with self._lock:
                self._submitting = False

    def _settled(self, future: Any) -> None:
        """Release the worker if the future was cancelled.  Called in the thread that settles it."""
        with self._lock:
            if self._over or not future.cancelled():
                return
            self.channel.stopped.set()  # the worker's next lease takes another channel
            submitting = self._submitting
        # Not under the lock, since this closes a socket.
        if not submitting:
            self.channel.abort()


class ThreadLocalConnections:
    """A connection for each thread that asks for one."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._thread_local = threading.local()

    def get(self) -> AnyChannel:
        """Return the calling thread's connection; one that was stopped is replaced."""
        channel: Optional[AnyChannel] = getattr(self._thread_local, "channel", None)
        if channel is not None and channel.stopped.is_set():  # its last future was cancelled
            channel.abort()
            channel = None
        if channel is None:
            channel = self._thread_local.channel = self._transport.open_connection()
        return channel
