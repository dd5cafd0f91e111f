"""RequestAttempts: sends one request again and again, until it succeeds or is given up."""

from __future__ import annotations

import logging
import random
from functools import partial
from typing import TYPE_CHECKING, Optional

from tinkex._transport.request import (
    Reply,
    Request,
    broken_route,
    error_if_damaged,
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
    """The attempts of one request.  For one thread, which they block.

    Args:
        waits: waits while the server asks to be left alone (429); otherwise that is an error.
        urgent: waits neither for a place among the requests after a 429 nor out a 402.
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
        # Aborting the transport stops every channel, too.
        self._stop = transport.closing if channel is None else channel.stopped
        self._key = request.idempotency_key or transport.new_key()
        self._began = transport.clock.monotonic()
        # No method of ours: the cycle would keep the body until the garbage collector runs.  The
        # limit of the pause is one of the server's flags, which the request for flags must not wait
        # for.
        pause_for_billing = (
            partial(transport.billing.after_402, None if request.raw_credential else transport)
            if transport.config.on_billing == "wait" and not urgent
            else None
        )
        self._retries = RetryState(policy, self._began, pause_for_billing=pause_for_billing)
        self._error: Optional[APIError] = None  # of the latest attempt
        self._maybe_taken = False  # of all attempts

    def run(self) -> Reply:
        """Send until there is a 2xx response that can be read.  Raises as `Transport.send`."""
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
            self._request.keep_body()
            self._pause(delay_s)
            self._transport.recorder.count("retries")

    def _attempt(self) -> Optional[Reply]:
        """Send once, and keep the error; return the response, if the server has sent one."""
        self._error = None
        try:
            reply = self._send_in_turn()
        except (APIConnectionError, APIStatusError) as caught:  # the latter is about a token
            self._error = caught
            return None
        if not 200 <= reply.status < 300:
            self._error = self._transport.status_error(self._request, reply)
        else:
            self._error = error_if_damaged(self._request, reply)
        return reply

    def _send_in_turn(self) -> Reply:
        """Send one attempt when the limiter of this server and key lets it go."""
        # Nearly always; a place of the limiter would take a lock that all clients share.
        if self._urgent or not self._limiter.throttled:
            self._pause(0.0)
            return self._send()
        self._limiter.acquire(self._pause, self._is_stopped)
        try:
            return self._send()
        finally:
            self._limiter.release()

    def _send(self) -> Reply:
        return self._transport.send_once(
            self._request, channel=self._channel, idempotency_key=self._key
        )

    def _next_delay_s(self, reply: Optional[Reply]) -> float:
        """The pause before the next attempt; raises the error of the last if there is to be none.

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
                    error.hint = error.hint or broken_route(self._request, self._retries.repeats)
                raise error
            if is_rate_limited:
                self._limiter.back_off(delay_s)
            if is_rate_limited and not self._waits:
                assert isinstance(error, APIStatusError)
                error.retry_after_s = error.retry_after_s or delay_s
                raise error
            self._log(error, delay_s)
            return delay_s
        finally:
            # The error's traceback holds this frame, and the frame the error: a cycle that would
            # keep the connection open until the garbage collector runs.
            del error

    def _describe(self, error: APIError, reply: Optional[Reply], now: float) -> None:
        error.attempts, error.elapsed_s = self._retries.attempts, now - self._began
        if error.maybe_taken or (reply is not None and leaves_outcome_open(reply.status)):
            self._maybe_taken = True
        error.maybe_taken = self._maybe_taken

    def _log(self, error: APIError, delay_s: float) -> None:
        attempt = self._retries.attempts
        # An outage of minutes has hundreds of attempts: a few of them are enough for the log.
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
        """Raise RateLimitError, instead of sending, while the server asks to be left alone."""
        wait_s = self._limiter.wait_s()
        if wait_s <= 0:
            return
        error = RateLimitError(
            f"{self._request.name} was not sent: the server has asked to wait, {wait_s:.1f} s to "
            "go",
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
