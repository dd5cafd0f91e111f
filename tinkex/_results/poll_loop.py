"""PollLoop: polls for one accepted request until its result arrives.

Used by one thread of a poller; `outcomes` decides what a response means (docs/protocol.md,
"Interpreting a poll").
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Optional

from tinkex._api.futures import retrieve_future
from tinkex._results.backoff import Backoff
from tinkex._results.notices import PauseNotices
from tinkex._results.outcomes import (
    Announced,
    Done,
    Failed,
    Outcome,
    Pending,
    Trouble,
    interpret,
)
from tinkex._results.pending import PendingRequest
from tinkex._transport.request import Reply, Request
from tinkex.config import Config
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    ClientClosedError,
    NoProgressError,
    OperationTimeoutError,
    ResponseDecodeError,
    TinkexError,
)

if TYPE_CHECKING:
    from tinkex._transport.fast_connection import AnyChannel
    from tinkex._transport.resources import ClientResources

_POLL = Request("POST", "/api/v1/retrieve_future")


class PollLoop:
    """Polls for one request, from its acceptance to its end.

    Stopping *channel* ends the loop: during a pause immediately, and during a poll if the channel
    is also aborted.  *announced* is the size of the result in bytes, if the server has reported it,
    or else 0.
    """

    def __init__(
        self,
        resources: ClientResources,
        request: PendingRequest[Any],
        channel: AnyChannel,
        pauses: PauseNotices,
        *,
        announced: int = 0,
    ) -> None:
        self._resources = resources
        self._transport = resources.transport
        self._config = resources.transport.config
        self._request = request
        self._future = request.future
        self._channel = channel
        self._pauses = pauses
        self._no_progress_s = request.no_progress_timeout_s or self._config.no_progress_timeout_s
        self._announced = announced
        self._payload = False  # request the result itself, not only its size
        self._held = 0  # bytes of the quota for large results
        self._backoff = Backoff(resources, _POLL)
        self._last_contact = time.monotonic()
        # The server may have accepted the request a while ago: earlier ones of its lane go first.
        self._started = request.future.entered
        self._polled = False

    def run(self) -> None:
        """Settle the future, or raise the error to settle it with."""
        with self._reserved():
            self._poll()

    def try_once(self) -> bool:
        """Like `run`, but poll only once; return False if that did not settle the future."""
        with self._reserved():
            return self._step(self._future.request_id or "") is None or self._future.done()

    @contextlib.contextmanager
    def _reserved(self) -> Iterator[None]:
        """Reserve the bytes of a result of known size; at the end, release all reserved bytes."""
        try:
            if self._announced > 0:
                self._reserve(self._announced)
            yield
        finally:
            if self._held:
                self._resources.limits.results.release(self._held)

    def _poll(self) -> None:
        request_id = self._future.request_id or ""
        while not self._future.done():
            delay = self._step(request_id)
            if delay is None:
                return
            if delay > 0:  # ends early when the future is cancelled or the client closed
                self._channel.stopped.wait(delay)
            stopped = self._channel.stopped.is_set() or self._transport.closing.is_set()
            if stopped and not self._future.done():
                raise ClientClosedError(
                    f"the client was closed before {self._future.kind} was done"
                )

    def _step(self, request_id: str) -> Optional[float]:
        """Poll once; return the pause before the next poll, or None when settled."""
        began = time.monotonic()
        # Check no limit before the first poll: a result that is ready is fetched, however late.
        if self._polled:
            self._check_limits(began)
        self._polled = True
        self._future.attempts += 1
        try:
            reply = retrieve_future(
                self._transport,
                request_id,
                binary=self._request.binary,
                read_timeout_s=self._read_timeout_s(began),
                payload=self._payload,
                size_first=self._request.large and not self._payload,
                channel=self._channel,
            )
        except APIConnectionError as silence:
            # With an error status, the poll got no token and was never sent.  Without one, the lost
            # response may have been the result.
            unsent = silence.status is not None and silence.status >= 300
            self._request.maybe_lost |= not unsent
            return self._after_failure(silence, began)
        except APIStatusError as refused:  # the server issues no token at present
            return self._after_failure(refused, began, {})
        # Any response is contact, even an error: no_progress_timeout_s is about silence.
        self._last_contact = time.monotonic()
        error = None if reply.status < 300 else self._transport.status_error(_POLL, reply)
        try:
            outcome = interpret(
                reply,
                error,
                request_id=request_id,
                kind=self._future.kind,
                maybe_lost=self._request.maybe_lost,
            )
            return self._act_on(outcome, began)
        except ResponseDecodeError as unreadable:
            if not reply.is_damaged:
                raise
            # The response was cut off or garbled on its way: the server may have handed out the
            # result, or may still have it.
            self._request.maybe_lost = True
            return self._after_failure(unreadable, began, {})

    def _act_on(self, outcome: Outcome, began: float) -> Optional[float]:
        if isinstance(outcome, Done):
            # A result has no queue state: without this, the end of a pause would not be logged.
            if self._future.queue_state not in (None, "active"):
                self._note_queue("active", None)
            self._finish(outcome.reply)
            return None
        if isinstance(outcome, Failed):
            raise outcome.error
        if isinstance(outcome, Pending):
            self._note_queue(outcome.queue_state, outcome.reason)
            self._future.last_error = None
            return self._backoff.after_pending(self._last_contact - began)
        if isinstance(outcome, Announced):
            return self._ask_for_payload(outcome)
        assert isinstance(outcome, Trouble)
        return self._after_failure(outcome.error, began, {})

    def _finish(self, reply: Reply) -> None:
        """Decode the result and settle the future with it."""
        result = self._request.decode(reply)
        decode_s = time.monotonic() - self._last_contact
        waited_s = self._last_contact - self._started
        queue_s = max(0.0, waited_s - reply.read_s)
        self._resources.recorder.result(queue_s, reply.read_s, decode_s)
        self._future.try_set_result(result)

    def _note_queue(self, state: Optional[str], reason: Optional[str]) -> None:
        self._future.queue_state, self._future.queue_state_reason = state, reason
        if self._request.owner:
            grace_s = self._request.pause_grace_s
            self._pauses.note(self._request.owner, state, reason, grace_s)

    def _ask_for_payload(self, announced: Announced) -> float:
        # The server sends the size first, so that few large results are in memory at a time.
        if self._payload:
            raise ResponseDecodeError(
                f"the server announces the result of {self._future.kind} ({announced.size} bytes), "
                "but does not send it",
                request_id=self._future.request_id,
            )
        self._backoff.after_news()
        self._reserve(announced.size)
        return 0.0

    def _reserve(self, size: int) -> None:
        """Wait until a result of *size* bytes may be fetched; the next poll requests it."""
        self._resources.limits.results.acquire(
            size,
            lambda: self._future.done() or self._channel.stopped.is_set(),
            self._future,
        )
        self._held, self._payload = size, True
        # The wait was on our side, so the server was not silent; and since the result is ready, no
        # limit may end the next poll.
        self._last_contact = time.monotonic()
        self._polled = False

    def _after_failure(
        self, error: APIError, began: float, headers: Optional[Mapping[str, str]] = None
    ) -> float:
        """Return the pause after a poll that failed; raise *error* once it is final."""
        # Shown by status() and in the log while the poll is retried.
        self._future.last_error = error.message
        error.attempts = self._future.attempts
        error.elapsed_s = time.monotonic() - self._started
        error.request_id = error.request_id or self._future.request_id
        return self._backoff.after_failure(error, began, headers)

    def _read_timeout_s(self, now: float) -> float:
        """Return how long to wait for a response, within the limits of the operation."""
        limits = [self._config.poll_timeout_s]
        if self._config.operation_timeout_s is not None:
            limits.append(self._started + self._config.operation_timeout_s - now)
        if self._no_progress_s is not None:
            limits.append(self._last_contact + self._no_progress_s - now)
        return max(0.05, min(limits))  # a socket timeout of 0 would mean non-blocking

    def _check_limits(self, now: float) -> None:
        error = overdue(
            self._request,
            self._config,
            waited_s=now - self._started,
            silent_s=now - self._last_contact,
        )
        if error is not None:
            raise error


def overdue(
    request: PendingRequest[Any], config: Config, *, waited_s: float, silent_s: float
) -> Optional[TinkexError]:
    """Return the error of a request that took too long, or had no contact for too long; or None."""
    future = request.future
    if config.operation_timeout_s is not None and waited_s >= config.operation_timeout_s:
        return OperationTimeoutError(
            f"no result within operation_timeout_s = {config.operation_timeout_s:g} s: "
            f"{future.status()}",
            request_id=future.request_id,
            elapsed_s=waited_s,
        )
    no_progress_s = request.no_progress_timeout_s or config.no_progress_timeout_s
    if no_progress_s is not None and silent_s >= no_progress_s:
        return NoProgressError(
            f"no contact with the server for {silent_s:.0f} s: {future.status()}",
            request_id=future.request_id,
            elapsed_s=waited_s,
        )
    return None
