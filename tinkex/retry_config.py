"""RetryConfig: how one sampling client retries, in the official SDK's terms."""

from __future__ import annotations

import dataclasses
from typing import Optional, Tuple, Type

from tinkex._runtime.numeric import convert_fields, is_finite, is_int
from tinkex.errors import APIConnectionError, InvalidInputError, ResultExpiredError, a_type

#: A sample whose result was lost is submitted again this often at most.
MAX_RESUBMISSIONS = 5

_SECONDS = ("progress_timeout", "retry_delay_base", "retry_delay_max")


@dataclasses.dataclass(frozen=True)
class RetryConfig:
    """Retries and limits of one sampling client.  Immutable; times are seconds.

    Failures that may pass (no connection, 408, 429, 5xx) are retried in any case, under the same
    seq_id, so that no work is repeated.  What is configured here is the rest.

    Args:
        max_connections: this client's samples in flight at the same time; more wait, in order.
            None leaves only the session's ``max_concurrent_samples``, which holds as well.
        progress_timeout: a sample fails after this long without contact with the server.
        retry_delay_base, retry_delay_max, jitter_factor: the pause before a sample whose result
            the server has lost (410) is submitted again, as a new request: it doubles each time,
            and is varied by this part of it.
        enable_retry_logic: False fails such a sample with ResultExpiredError immediately.
        enable_stuck_detection: False switches `progress_timeout` off.
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
        """A sample fails after this long without contact with the server; None leaves that off."""
        return self.progress_timeout if self.enable_stuck_detection else None

    def delay_s(self, times: int, rand: float) -> Optional[float]:
        """Seconds before a lost sample is submitted again, or None to give up.

        *times* is how often that was done before, *rand* is uniform in [0, 1).
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
