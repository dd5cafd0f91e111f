"""RequestAttempts: sends one request until it succeeds, or until no further attempt is allowed."""

from __future__ import annotations

import logging
import random
from functools import partial
from typing import TYPE_CHECKING, Optional

from tinkex._transport.request import Reply, Request
from tinkex._transport.request_errors import (
    error_if_damaged,
    repeated_error_hint,
    unreachable_server,
)
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    ClientClosedError,
    RateLimitError,
)
from tinkex.retry import RetryPolicy, RetryState, leaves_outcome_open

if TYPE_CHECKING:
    from tinkex._transport.fast_connection import AnyChannel
    from tinkex._transport.transport import Transport

logger = logging.getLogger(__name__)


class RequestAttempts:
    """All attempts of one request.  For one thread, which `run` blocks.

    Args:
        waits: wait while the server is rate-limiting (429); if False, raise RateLimitError instead.
        urgent: do not wait for the limiter after a 429, nor while the account cannot pay (402).
    """

    def __init__(
        self,
        transport: Transport,
        request: Request,
        policy: RetryPolicy,
        channel: Optional[AnyChannel],
        *,
        waits: bool,
        urgent: bool = False,
    ) -> None:
        self._transport = transport
        self._request = request
        self._channel = channel
        self._waits = waits
        self._urgent = urgent
        self._limiter = transport.server.limiter
        # Ends every pause when set.  Aborting the transport stops every channel, too.
        self._stop = transport.closing if channel is None else channel.stopped
        self._key = request.idempotency_key or transport.new_key()
        self._began = transport.clock.monotonic()
        # Not a method of this object: the reference cycle would keep the body alive until the
        # garbage collector runs.  The longest pause is one of the server's flags, so the request
        # for the flags (raw_credential) must not ask for it.
        pause_for_billing = (
            partial(transport.billing.after_402, None if request.raw_credential else transport)
            if transport.config.on_billing == "wait" and not urgent
            else None
        )
        self._retries = RetryState(policy, self._began, pause_for_billing=pause_for_billing)
        self._error: Optional[APIError] = None  # of the latest attempt
        self._maybe_taken = False  # by any attempt so far

    def run(self) -> Reply:
        """Send until there is a readable 2xx response.  Raises like `Transport.send`."""
        if self._request.encode_s is not None:
            self._transport.recorder.took("encode", self._request.encode_s)
        while True:
            if not self._waits:
                self._refuse_while_throttled()
            reply = self._attempt()
            if self._error is None:
                assert reply is not None
                if self._request.traffic == "work" and self._request.method == "POST":
                    took_s = self._transport.clock.monotonic() - self._began
                    self._transport.recorder.took("submit", took_s)
                return reply
            delay_s = self._next_delay_s(reply)
            # The arrays of a batch are copied only when it has to be sent again: the caller may
            # change them during the pause.
            self._request.keep_body()
            self._pause(delay_s)
            self._transport.recorder.count("retries")

    def _attempt(self) -> Optional[Reply]:
        """Send once and store the error, if any; return the response, if there was one."""
        self._error = None
        # Only while throttled, which is rare: the limiter's lock is shared by all clients.
        throttled = not self._urgent and self._limiter.throttled
        if throttled:
            self._limiter.acquire(self._pause, self._is_stopped)
        else:
            self._pause(0.0)
        try:
            reply = self._transport.send_once(
                self._request, channel=self._channel, idempotency_key=self._key
            )
        except (APIConnectionError, APIStatusError) as caught:  # APIStatusError: no token issued
            self._error = caught
            return None
        finally:
            if throttled:
                self._limiter.release()
        if not 200 <= reply.status < 300:
            self._error = self._transport.status_error(self._request, reply)
        else:
            self._error = error_if_damaged(self._request, reply)
        return reply

    def _next_delay_s(self, reply: Optional[Reply]) -> float:
        """Return the seconds before the next attempt; raise the latest error if none is allowed.

        *reply* is the server's response, if there was one.
        """
        error, self._error = self._error, None
        assert error is not None
        now = self._transport.clock.monotonic()
        headers = None if reply is None else reply.headers
        try:
            delay_s, error = self._retries.decide(error, now, random.random(), headers)
            self._describe(error, reply, now)
            is_rate_limited = reply is not None and reply.status == 429
            if delay_s is None:
                if reply is not None and reply.status >= 500 and self._retries.repeats > 1:
                    repeats = self._retries.repeats
                    error.hint = error.hint or repeated_error_hint(self._request, repeats)
                raise error
            # Even if this request does not wait: others do, as do other clients of the key.
            if is_rate_limited:
                self._limiter.back_off(delay_s)
            if is_rate_limited and not self._waits:
                assert isinstance(error, APIStatusError)
                error.retry_after_s = error.retry_after_s or delay_s
                raise error
            self._log(error, delay_s)
            return delay_s
        finally:
            # The error's traceback holds this frame, and this frame holds the error: a cycle that
            # would keep the connection open until the garbage collector runs.
            del error

    def _describe(self, error: APIError, reply: Optional[Reply], now: float) -> None:
        error.attempts, error.elapsed_s = self._retries.attempts, now - self._began
        # Never reset: the server may have carried out an earlier attempt.
        if error.maybe_taken or (reply is not None and leaves_outcome_open(reply.status)):
            self._maybe_taken = True
        error.maybe_taken = self._maybe_taken

    def _log(self, error: APIError, delay_s: float) -> None:
        attempt = self._retries.attempts
        # An outage of minutes means hundreds of attempts: log only a few of them at INFO.
        level = logging.INFO if attempt in (1, 4) or attempt % 16 == 0 else logging.DEBUG
        logger.log(
            level,
            "%s; attempt %d, next in %.1f s",
            error.message,
            attempt,
            delay_s,
            extra=unreachable_server(error, self._transport.config),
        )

    def _refuse_while_throttled(self) -> None:
        """Raise RateLimitError, instead of sending, while the server is rate-limiting."""
        wait_s = self._limiter.wait_s()
        if wait_s <= 0:
            return
        error = RateLimitError(
            f"{self._request.name} was not sent: rate-limited by the server (429), "
            f"{wait_s:.1f} s to go",
            status=429,
            retry_after_s=wait_s,
            attempts=self._retries.attempts,
        )
        error.maybe_taken = self._maybe_taken
        raise error

    def _pause(self, delay_s: float) -> None:
        if (delay_s > 0 and self._stop.wait(delay_s)) or self._is_stopped():
            raise ClientClosedError(f"the client was closed before {self._request.name} was done")

    def _is_stopped(self) -> bool:
        return self._stop.is_set() or self._transport.closing.is_set()
