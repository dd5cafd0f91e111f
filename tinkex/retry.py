"""RetryPolicy: when a failed request is sent again, and how long after.  Pure arithmetic."""

from __future__ import annotations

import dataclasses
import email.utils
import math
from typing import Mapping, Optional

#: Pauses a server asks for are obeyed up to this long, in seconds.
MAX_HINT_S = 60.0


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with full jitter, bounded in total time.

    Attributes:
        base_s: the first delay is drawn from 0.5 .. 1 times this.
        cap_s: no delay is longer (a server's own hint may be, up to 60 s).
        max_elapsed_s: no new attempt begins later than this after the first one.
        max_server_errors: a plain 500 is believed after so many attempts: it rarely goes
            away, unlike 502, 503 and 504.
        max_gateway_answers: an answer that looks like a gateway's is taken for the server's own
            after so many attempts, e.g. for a missing route of an unusual web framework; None
            never takes it for that, where a wrong guess would lose a request's number.
    """

    base_s: float = 0.5
    cap_s: float = 10.0
    max_elapsed_s: float = 300.0
    max_server_errors: int = 4
    max_gateway_answers: Optional[int] = 4

    def delay_s(
        self, attempt: int, elapsed_s: float, hint_s: Optional[float], rand: float
    ) -> Optional[float]:
        """Seconds to wait before the next attempt, or None to give up.

        *attempt* counts the attempts made (from 1), *elapsed_s* is the time since the first began,
        *hint_s* the server's own wish, *rand* is uniform in [0, 1).
        """
        if hint_s:  # "at once" is no wish we can grant: it would be a busy loop
            delay = min(hint_s, MAX_HINT_S)
        else:
            ceiling = min(self.base_s * 2.0 ** min(attempt - 1, 30), self.cap_s)
            delay = ceiling * (0.5 + rand / 2)
        return delay if elapsed_s + delay <= self.max_elapsed_s else None

    def retries_gateway(self, attempt: int) -> bool:
        """Tell whether an answer that looks like a gateway's is worth another attempt."""
        return self.max_gateway_answers is None or attempt < self.max_gateway_answers

    def retries_status(self, status: int, attempt: int, headers: Mapping[str, str]) -> bool:
        """Tell whether an answer with *status* is worth another attempt.

        408, 429 and 5xx are; 409 is not (the conflict will not go away), nor 501 (no such thing).
        The server's ``x-should-retry`` header decides before all that.
        """
        wish = headers.get("x-should-retry", "").lower()
        if wish in ("true", "false"):
            return wish == "true"
        if status == 500:
            return attempt < self.max_server_errors
        return status in (408, 429) or (status > 500 and status != 501)


def leaves_outcome_open(status: int) -> bool:
    """Tell whether a server that answered *status* may have done the work all the same.

    Any 5xx does, except 501 (no such thing): a gateway answers so when it loses the server's
    answer, and a server when it fails after it accepted the work.
    """
    return status >= 500 and status != 501


def retry_after_s(headers: Mapping[str, str], wall: float) -> Optional[float]:
    """Read the server's wish for a pause from ``retry-after-ms`` or ``retry-after``.

    The latter may be seconds (also fractions) or an HTTP date, compared with *wall* (seconds
    since the epoch).  None if there is no wish, or no sense in it.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000.0
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is not None or text is None:
        return seconds
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - wall)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _number(text: Optional[str]) -> Optional[float]:
    """A finite number, 0 or more; None if *text* is anything else."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None
