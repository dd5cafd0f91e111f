"""Backoff: how long the batch poller waits between two polls for one sampler.

For one thread at a time; no threads of its own.
"""

from __future__ import annotations

import random
import time
from typing import Optional

from tinkex._results.outcomes import Pacing
from tinkex._transport.transport import Transport
from tinkex.errors import APIError, APITimeoutError


class Backoff:
    """How long to wait between two polls for one sampler; raises what ends them."""

    def __init__(self, transport: Transport) -> None:
        self._billing = transport.billing
        self._config = transport.config
        self._pacing = Pacing()
        self._trouble_since: Optional[float] = None

    def after_answer(self, took_s: float, news: bool) -> float:
        """The pause after an answer, which took so long; a poll without news is held."""
        self._trouble_since = None
        return 0.0 if news else self._pacing.after_pending(took_s, random.random())

    def after_silence(self, error: APIError, began: float, last_contact: float) -> float:
        """The pause after none; raises *error* after ``max_outage_s``."""
        now = time.monotonic()
        if isinstance(error, APITimeoutError) and now - began > self._config.connect_timeout_s + 1:
            return 0.0  # the server held the poll for longer than we wait
        if now - last_contact > self._config.max_outage_s:
            error.elapsed_s = now - last_contact
            raise error
        return self._pacing.after_trouble(random.random())

    def after_error(self, error: APIError) -> float:
        """The pause after an answer that is an error; raises one that must be meant."""
        if error.status == 402 and self._config.on_billing == "wait":
            delay = self._billing.after_402()
            if delay is not None:
                return delay
        if not error.retryable or error.status == 501:
            raise error
        if error.status != 429:  # there the server lives, and asks for patience
            now = time.monotonic()
            self._trouble_since = self._trouble_since or now
            outage_s = now - self._trouble_since
            if self._pacing.is_final(error) or outage_s > self._config.max_outage_s:
                raise error
        hint_s = getattr(error, "retry_after_s", None)
        return self._pacing.after_trouble(random.random(), hint_s)
