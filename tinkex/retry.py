"""Whether a failed request is retried, and after what delay.  Pure arithmetic: no I/O, no clock.

`RetryPolicy` defines which retries are allowed, `RetryState` keeps track of the failures of one
request, and `RetryDecision` is the outcome of the latest failure: wait and send again, or raise.
`RetryConfig` holds what users may set for one sampling client, in the official SDK's terms.
"""

from __future__ import annotations

import dataclasses
import email.utils
import math
from concurrent.futures import CancelledError
from typing import Callable, Mapping, NamedTuple, Optional, Tuple, Type

from tinkex._runtime.numeric import convert_fields, is_finite, is_int
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    InvalidInputError,
    RequestFailedError,
    ResponseDecodeError,
    ResultExpiredError,
    UnsupportedError,
    a_type,
)

#: Statuses that mean the server has read the request and refused its contents: it would have
#: refused an earlier attempt, too.
_READ_AND_REFUSED = (400, 404, 410, 422)

#: A request whose response was damaged is retried after a pause (in seconds), and fails after this
#: many damaged responses.
MAX_DAMAGED = 3
DAMAGED_PAUSE_S = 0.1

#: The longest pause, in seconds, that we make at the server's request.
MAX_HINT_S = 60.0

#: A sample whose result was lost is submitted again at most this many times.
MAX_RESUBMISSIONS = 5

#: The fields of RetryConfig that are times.
_SECONDS = ("progress_timeout", "retry_delay_base", "retry_delay_max")


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter, limited in total time.

    Attributes:
        base_s: the first delay is drawn from 0.5 .. 1 times this.
        cap_s: the longest delay (a pause requested by the server may be longer, up to 60 s).
        max_elapsed_s: no new attempt begins later than this after the first attempt began.
        max_server_errors: a plain 500 is final after this many attempts: unlike 502, 503 and 504,
            it rarely goes away.
        max_gateway_answers: a response that looks like a gateway's counts as the server's own after
            this many attempts: it may be an unusual web framework's response for a missing route.
            None means never: for requests whose seq_id a wrong guess would lose.
        for_result: the request is a poll for the result of accepted work, which would be lost if
            the poll failed.  So it fails only after *max_elapsed_s* of failures without a 429
            between them, every failure to connect is retried, and only 500s that repeat word for
            word count for *max_server_errors*.
    """

    base_s: float = 0.5
    cap_s: float = 10.0
    max_elapsed_s: float = 300.0
    max_server_errors: int = 4
    max_gateway_answers: Optional[int] = 4
    for_result: bool = False

    def delay_s(
        self, attempt: int, elapsed_s: float, hint_s: Optional[float], rand: float
    ) -> Optional[float]:
        """Return the seconds to wait before the next attempt, or None to stop retrying.

        *attempt* is the number of attempts made (1 or more), *elapsed_s* the time since the first
        began, *hint_s* the pause that the server requests, *rand* uniform in [0, 1).
        """
        if hint_s:  # a pause of 0 is ignored: it would be a busy loop
            delay = min(hint_s, MAX_HINT_S)
        else:
            # The exponent is limited because a float overflows at 2**1024.  Half of the delay is
            # random, so that clients that failed together do not come back together.
            ceiling = min(self.base_s * 2.0 ** min(attempt - 1, 30), self.cap_s)
            delay = ceiling * (0.5 + rand / 2)
        # A poll may still begin when the time is up: giving up would lose finished work.
        ends_at = elapsed_s if self.for_result else elapsed_s + delay
        return delay if ends_at <= self.max_elapsed_s else None

    def retries_gateway(self, attempt: int) -> bool:
        """True if a response that looks like a gateway's is worth another attempt."""
        return self.max_gateway_answers is None or attempt < self.max_gateway_answers

    def retries_status(self, status: int, attempt: int, headers: Mapping[str, str]) -> bool:
        """True if a response with *status* is worth another attempt.

        408, 429 and 5xx are; 409 is not (the conflict will not go away), nor is 501 (not
        implemented).  The server's ``x-should-retry`` header takes precedence.
        """
        wish = headers.get("x-should-retry", "").lower()
        if wish in ("true", "false"):
            return wish == "true"
        if status == 500:
            return attempt < self.max_server_errors
        return status in (408, 429) or (status > 500 and status != 501)


class RetryDecision(NamedTuple):
    """What to do after a failed attempt.

    Attributes:
        delay_s: send again after this many seconds; None means raise *error*.
        error: the failure.
    """

    delay_s: Optional[float]
    error: APIError


class RetryState:
    """The history of failures of one request, or of the polls for one result.

    For one thread.

    Args:
        policy: which retries are allowed.
        began: when the first attempt began (monotonic), from which ``max_elapsed_s`` counts; None
            counts from the first failure, and again from the first one after `succeeded`.
        pause_for_billing: called after a 402; returns the seconds to wait, or None to fail.
            Without it, a 402 is treated like any other error.

    Attributes:
        attempts: how many failures in a row.
        repeats: how many times in a row the latest error occurred, word for word.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        began: Optional[float] = None,
        *,
        pause_for_billing: Optional[Callable[[], Optional[float]]] = None,
    ) -> None:
        self.policy = policy
        self.attempts = 0
        self.repeats = 0
        self._damaged = 0
        self._last_message: Optional[str] = None
        self._pause_for_billing = pause_for_billing
        self._failing_since = began

    def succeeded(self) -> None:
        """Note that the server responded properly: the next failure begins a new outage."""
        self.attempts = self.repeats = self._damaged = 0
        self._failing_since = None

    def decide(
        self,
        error: APIError,
        now: float,
        rand: float,
        headers: Optional[Mapping[str, str]] = None,
        *,
        began: Optional[float] = None,
    ) -> RetryDecision:
        """Decide what to do after an attempt that *began* then and failed *now*.

        *headers* are those of the server's response; None if there was no response, or one that
        looks like a gateway's.  *rand* is uniform in [0, 1).  A ResponseDecodeError means that the
        response was damaged in transit.
        """
        self.attempts += 1
        self.repeats = self.repeats + 1 if error.message == self._last_message else 1
        self._last_message = error.message
        # A gateway's response is an APIConnectionError, since the server has not responded.  Behind
        # it is the error to raise if the response is the server's own after all.
        own = server_error_behind(error) if headers is None else None
        if isinstance(error, ResponseDecodeError):
            self._damaged += 1
            delay_s = DAMAGED_PAUSE_S if self._damaged < MAX_DAMAGED else None
        elif error.status == 402 and self._pause_for_billing is not None:
            delay_s = self._pause_for_billing()
        elif self._is_worth_retrying(error, own, headers):
            hint_s = getattr(own or error, "retry_after_s", None)
            # The server may hold a poll for longer than an outage may last.  If a response comes in
            # the end, nothing was wrong before it; if none comes, the outage may have begun with
            # the poll.
            failed_at = now if began is None or headers is not None else began
            elapsed_s = self._elapsed_s(error, failed_at, now)
            delay_s = self.policy.delay_s(self.attempts, elapsed_s, hint_s, rand)
        else:
            delay_s = None
        if delay_s is None and own is not None and self.policy.max_gateway_answers is not None:
            error = own
        return RetryDecision(delay_s, error)

    def _is_worth_retrying(
        self, error: APIError, own: Optional[APIError], headers: Optional[Mapping[str, str]]
    ) -> bool:
        policy = self.policy
        if headers is not None:
            attempt = self.repeats if policy.for_result else self.attempts
            return policy.retries_status(error.status or 0, attempt, headers)
        if own is not None and not policy.retries_gateway(self.attempts):
            return False
        return error.retryable or policy.for_result

    def _elapsed_s(self, error: APIError, failed_at: float, now: float) -> float:
        """Return how long the failures have lasted, in seconds."""
        if error.status == 429 and self.policy.for_result:
            self._failing_since = None  # rate-limited, but reachable: no outage
            return -math.inf
        if self._failing_since is None:
            self._failing_since = failed_at
        return now - self._failing_since


@dataclasses.dataclass(frozen=True)
class RetryConfig:
    """Retries and limits of one sampling client.  Immutable; times are seconds.

    Temporary failures (no connection, 408, 429, 5xx) are always retried, under the same seq_id, so
    that no work is repeated.  These settings are about everything else.

    Args:
        max_connections: the most samples of this client in flight at the same time; more wait, in
            order.  The session's ``max_concurrent_samples`` also applies, and None leaves only that
            limit.
        progress_timeout: a sample fails after this long without contact with the server.
        retry_delay_base, retry_delay_max, jitter_factor: the pause before a sample whose result the
            server has lost (410) is submitted again, as a new request.  It begins with the base,
            doubles each time up to the maximum, and varies randomly by this fraction.
        enable_retry_logic: if False, such a sample fails immediately with ResultExpiredError.
        enable_stuck_detection: if False, `progress_timeout` has no effect.
        retryable_exceptions: has no effect here.

    Raises:
        InvalidInputError (a ValueError): a value is out of its range.
    """

    max_connections: Optional[int] = 1000
    progress_timeout: float = 7200.0
    retry_delay_base: float = 0.5
    retry_delay_max: float = 10.0
    jitter_factor: float = 0.25
    enable_retry_logic: bool = True
    enable_stuck_detection: bool = True
    retryable_exceptions: Tuple[Type[Exception], ...] = (APIConnectionError, ResultExpiredError)

    def __post_init__(self) -> None:
        convert_fields(
            self, ints=("max_connections",), floats=(*_SECONDS, "jitter_factor"), text=False
        )
        limit = self.max_connections
        if limit is not None and not is_int(limit, 1):
            raise InvalidInputError(
                f"max_connections is {limit!r}; it must be an integer, at least 1, or None"
            )
        for name in _SECONDS:
            value = getattr(self, name)
            if not (is_finite(value) and value > 0):
                raise InvalidInputError(
                    f"{name} is {value!r}; it must be a positive number of seconds"
                )
        if not (is_finite(self.jitter_factor) and 0 <= self.jitter_factor <= 1):
            raise InvalidInputError(
                f"jitter_factor is {self.jitter_factor!r}; it must be a number from 0 to 1"
            )

    @property
    def no_progress_timeout_s(self) -> Optional[float]:
        """A sample fails after this long without contact with the server; None means never."""
        return self.progress_timeout if self.enable_stuck_detection else None

    def delay_s(self, times: int, rand: float) -> Optional[float]:
        """Return the seconds before a lost sample is submitted again, or None to fail it.

        *times* is how often the sample was submitted again before; *rand* is uniform in [0, 1).
        """
        if not self.enable_retry_logic or times >= MAX_RESUBMISSIONS:
            return None
        delay = min(self.retry_delay_base * 2.0**times, self.retry_delay_max)
        varied = delay * (1 + self.jitter_factor * (2 * rand - 1))
        return min(varied, self.retry_delay_max)


def check_retry_config(retry_config: object) -> None:
    """Raise InvalidInputError unless *retry_config* is a RetryConfig or None."""
    if not isinstance(retry_config, (RetryConfig, type(None))):
        raise InvalidInputError(f"retry_config is {a_type(retry_config)}, not a RetryConfig")


def server_error_behind(error: Exception) -> Optional[APIError]:
    """Return the server's own error, if a response that looked like a gateway's was the server's.

    Returns None if *error* is not about such a response, or if the server's own error is temporary.
    """
    cause = error.__cause__
    if isinstance(error, APIConnectionError) and isinstance(
        cause, (APIStatusError, ResponseDecodeError)
    ):
        return None if cause.retryable else cause
    return None


def leaves_outcome_open(status: int) -> bool:
    """True if the work may have been done although the response has this *status*.

    This holds for any 5xx except 501 (not implemented): a gateway sends one if it loses the
    server's response, and a server if it fails after accepting the work.
    """
    return status >= 500 and status != 501


def left_undone(error: BaseException, *, was_sent: bool, was_accepted: bool) -> bool:
    """True if the server certainly did no work for a request that failed with *error*.

    *was_accepted*: the server has returned a request id.  Unless *error* is the failure of the work
    itself, it is then about fetching the result, and the work may have been done.
    """
    # The order matters: work that the server has accepted may be done, whatever came afterwards.
    if isinstance(error, CancelledError):
        return not was_sent
    if was_accepted:
        return isinstance(error, RequestFailedError)
    if isinstance(error, (InvalidInputError, RequestFailedError, UnsupportedError)):
        return True
    if isinstance(error, APIConnectionError):
        return not error.maybe_taken
    if isinstance(error, APIStatusError) and error.status is not None:
        if error.status in _READ_AND_REFUSED:
            return True
        # After an attempt without a response, the server may refuse the next only because it has
        # accepted the first.
        return error.status != 408 and not error.maybe_taken
    return not was_sent


def retry_after_s(headers: Mapping[str, str], wall: float) -> Optional[float]:
    """Read the pause that the server requests from ``retry-after-ms`` or ``retry-after``.

    ``retry-after`` may hold seconds (also fractions) or an HTTP date, which is compared with *wall*
    (seconds since the epoch).  Returns None if there is neither header, or it is malformed.
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
    """Return *text* as a finite number, 0 or more; None if it is anything else."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None
