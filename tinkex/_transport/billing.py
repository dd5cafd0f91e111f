"""BillingPause: how long to wait while the account cannot pay (402).

One per transport, shared by submissions and polls; used only with ``on_billing="wait"``.
"""

from __future__ import annotations

import logging
import math
import threading
from typing import TYPE_CHECKING, Optional

from tinkex._runtime.clock import SYSTEM_CLOCK, Clock
from tinkex._transport.server_flags import flags_for
from tinkex.errors import TinkexError

if TYPE_CHECKING:
    from tinkex._transport.transport import Sender

logger = logging.getLogger(__name__)

#: Seconds between two attempts while the account cannot pay.
PAUSE_S = 5.0
#: The longest wait in all, in seconds, unless the server's flags name another.
DEFAULT_LIMIT_S = 3600.0
#: A 402 that comes this long after the previous one, in seconds, begins a new wait.
_NEW_AFTER_S = 300.0
#: The wait is logged no more often than this, in seconds.
_LOG_INTERVAL_S = 60.0


class BillingPause:
    """Decides after each 402 whether to wait.  Thread-safe; does not wait itself."""

    def __init__(self, where: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self._where = where
        self._clock = clock
        # Guards what follows.  Not held while the flags are requested, which may take seconds.
        self._lock = threading.Lock()
        self._fetched = False
        self._limit_s = DEFAULT_LIMIT_S
        self._began = self._last = self._logged = -math.inf

    def after_402(self, sender: Optional[Sender]) -> Optional[float]:
        """Return the seconds until the next attempt, or None if the wait has lasted too long.

        The first call requests the server's flags with *sender*, which is None if the request for
        the flags itself got the 402.
        """
        if sender is not None:
            self._fetch_limit(sender)
        now = self._clock.monotonic()
        with self._lock:
            # Nothing reports a success here: only a time without a 402 shows that a wait is over.
            if now - self._last > _NEW_AFTER_S:
                self._began, self._logged = now, -math.inf
            self._last = now
            lasted_s, limit_s = now - self._began, self._limit_s
            log_is_due = now - self._logged >= _LOG_INTERVAL_S
            if log_is_due:
                self._logged = now
        if lasted_s > limit_s:
            if log_is_due:
                logger.error(
                    "%s: the account could not pay for %.0f s; no longer waiting",
                    self._where,
                    lasted_s,
                )
            return None
        if log_is_due:
            logger.warning(
                "%s: the account cannot pay (status 402); work is paused, for at most %.0f s more. "
                "Check its billing set-up.",
                self._where,
                limit_s - lasted_s,
            )
        return PAUSE_S

    def _fetch_limit(self, sender: Sender) -> None:
        with self._lock:
            fetched, self._fetched = self._fetched, True
        if fetched:
            return
        try:
            limit_s = flags_for(sender).billing_exception_max_pause_duration_sec
        except TinkexError as error:
            # Often the request for the flags gets a 402, too.  The default limit stands.
            logger.debug("%s: cannot fetch the longest billing pause: %s", self._where, error)
            return
        with self._lock:
            self._limit_s = limit_s
