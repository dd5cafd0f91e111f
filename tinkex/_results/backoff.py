"""Backoff: how long to wait between two polls, for one request or for one sampler.

Not thread-safe: each polling thread has its own.
"""

from __future__ import annotations

import logging
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Mapping, Optional

from tinkex._transport.request import Request
from tinkex._transport.request_errors import repeated_error_hint, unreachable_server
from tinkex.errors import APIError, APITimeoutError
from tinkex.retry import RetryPolicy, RetryState

if TYPE_CHECKING:
    from tinkex._transport.resources import ClientResources

logger = logging.getLogger(__name__)

#: A server that responds "pending" immediately is polled again after this many seconds ...
FIRST_SPACING_S = 0.02
#: ... which grows by half each time, up to this.
LAST_SPACING_S = 1.0
#: A pending response that took longer than this was a real long poll: poll again immediately.
HELD_S = 1.0
#: Back-off after failed polls.
FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 10.0
#: The same 500, word for word, this many times in a row is the server's final response.
SAME_500_LIMIT = 5


def poll_policy(max_outage_s: float) -> RetryPolicy:
    """Return how failed polls are retried: the result of accepted work must not be lost."""
    return RetryPolicy(
        base_s=FIRST_BACKOFF_S,
        cap_s=LAST_BACKOFF_S,
        max_elapsed_s=max_outage_s,
        max_server_errors=SAME_500_LIMIT,
        max_gateway_answers=None,
        for_result=True,
    )


class PollInterval:
    """How long to wait between two polls that the server responds to.  Pure."""

    def __init__(self) -> None:
        self._spacing_s = FIRST_SPACING_S

    def after_pending(self, took_s: float, rand: float) -> float:
        """Return the pause after a pending response that took *took_s*; *rand* is in [0, 1)."""
        if took_s >= HELD_S:
            self._spacing_s = FIRST_SPACING_S
            return 0.0
        # Jitter: the polls of many futures that began together would stay in step.
        delay_s = self._spacing_s * (0.5 + rand)
        self._spacing_s = min(self._spacing_s * 1.5, LAST_SPACING_S)
        return delay_s


class Backoff:
    """How long to wait between two polls; raises the error that ends them."""

    def __init__(self, resources: ClientResources, poll: Request) -> None:
        transport, config = resources.transport, resources.transport.config
        # An account without credit is no outage: with on_billing="wait" it pauses all polls.
        wait = partial(resources.billing.after_402, transport)
        self._retries = RetryState(
            poll_policy(config.max_outage_s),
            pause_for_billing=wait if config.on_billing == "wait" else None,
        )
        self._interval = PollInterval()
        self._poll = poll
        self._config = config
        # A timeout while connecting is an outage; after that, it is a poll that was held too long.
        self._held_s = config.connect_timeout_s + 1

    def after_news(self) -> None:
        """Note a response that brought news: an outage, if there was one, is over."""
        self._retries.succeeded()

    def after_pending(self, took_s: float) -> float:
        """Return the pause after a response that took *took_s* and brought no news."""
        self._retries.succeeded()
        return self._interval.after_pending(took_s, random.random())

    def after_failure(
        self, error: APIError, began: float, headers: Optional[Mapping[str, str]] = None
    ) -> float:
        """Return the pause after a poll that failed; raise *error* once it is final.

        *began* is when the poll began; *headers* are as for `RetryState.decide`.
        """
        now = time.monotonic()
        if headers is None and isinstance(error, APITimeoutError) and now - began > self._held_s:
            return 0.0  # the server held the poll for longer than we wait
        delay_s, error = self._retries.decide(error, now, random.random(), headers, began=began)
        if delay_s is not None:
            logger.debug(
                "%s; polling again in %.1f s",
                error.message,
                delay_s,
                extra=unreachable_server(error, self._config),
            )
            return delay_s
        # The same 5xx again and again looks like a route that the server cannot serve.
        if error.status is not None and error.status >= 500 and self._retries.repeats > 1:
            error.hint = error.hint or repeated_error_hint(self._poll, self._retries.repeats)
        raise error
