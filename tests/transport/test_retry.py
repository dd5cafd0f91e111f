"""RetryPolicy and Retry-After: pure arithmetic."""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import Optional

import pytest
from freezegun import freeze_time

from tinkex._runtime.clock import SYSTEM_CLOCK
from tinkex.errors import (
    APIConnectionError,
    APIError,
    InvalidInputError,
    OperationTimeoutError,
    RequestFailedError,
    ResponseDecodeError,
    ResultExpiredError,
    status_error_type,
)
from tinkex.retry import (
    DAMAGED_PAUSE_S,
    MAX_DAMAGED,
    MAX_HINT_S,
    RetryPolicy,
    RetryState,
    left_undone,
    retry_after_s,
)

#: Sun, 06 Nov 1994 08:49:37 GMT
WALL = 784111777.0


def test_delays_double_up_to_the_cap_with_half_of_it_random() -> None:
    policy = RetryPolicy(base_s=0.5, cap_s=4.0)
    lowest = [policy.delay_s(n, 0.0, None, 0.0) for n in range(1, 7)]
    assert lowest == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0]
    highest = [policy.delay_s(n, 0.0, None, 1.0) for n in range(1, 7)]
    assert highest == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]


def test_a_thousandth_attempt_does_not_overflow() -> None:
    assert RetryPolicy(max_elapsed_s=1e9).delay_s(100_000, 0.0, None, 1.0) == 10.0


def test_retry_after_takes_precedence_up_to_a_minute() -> None:
    policy = RetryPolicy()
    assert policy.delay_s(1, 0.0, 7.5, 0.0) == 7.5
    assert policy.delay_s(9, 0.0, 0.125, 0.0) == 0.125
    assert policy.delay_s(1, 0.0, 86400.0, 0.0) == MAX_HINT_S


def test_a_retry_after_of_zero_is_ignored() -> None:
    assert RetryPolicy().delay_s(1, 0.0, 0.0, 0.0) == 0.25


def test_damaged_responses_are_requested_again_a_few_times_in_a_row() -> None:
    state = RetryState(RetryPolicy(), 0.0)
    damaged = ResponseDecodeError("not JSON", status=200)
    for _ in range(2):
        delays = [state.decide(damaged, 0.0, 0.0, {}).delay_s for _ in range(MAX_DAMAGED)]
        assert delays == [DAMAGED_PAUSE_S, DAMAGED_PAUSE_S, None]
        state.succeeded()


def test_no_attempt_begins_after_the_time_is_up() -> None:
    policy = RetryPolicy(base_s=1.0, max_elapsed_s=10.0)
    assert policy.delay_s(1, 9.0, None, 1.0) == 1.0
    assert policy.delay_s(1, 9.1, None, 1.0) is None
    assert policy.delay_s(1, 0.0, 30.0, 0.0) is None


@pytest.mark.parametrize(
    ("status", "again"),
    [
        (400, False),
        (401, False),
        (402, False),
        (403, False),
        (404, False),
        (408, True),
        (409, False),
        (410, False),
        (415, False),
        (422, False),
        (429, True),
        (500, True),
        (501, False),
        (502, True),
        (503, True),
        (504, True),
        (529, True),
        (302, False),
    ],
)
def test_which_statuses_are_sent_again(status: int, again: bool) -> None:
    assert RetryPolicy().retries_status(status, 1, {}) is again


def test_a_plain_500_is_final_the_fourth_time_and_a_503_never() -> None:
    policy = RetryPolicy()
    assert [policy.retries_status(500, n, {}) for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert policy.retries_status(503, 100, {})


@pytest.mark.parametrize(
    ("wish", "status", "again"),
    [("true", 400, True), ("True", 409, True), ("false", 503, False), ("maybe", 503, True)],
)
def test_the_servers_header_decides_before_the_status(wish: str, status: int, again: bool) -> None:
    assert RetryPolicy().retries_status(status, 1, {"x-should-retry": wish}) is again


@pytest.mark.parametrize(
    ("header", "value", "expected"),
    [
        ("retry-after", "3", 3.0),
        ("retry-after", "0.25", 0.25),
        ("retry-after", " 2 ", 2.0),
        ("retry-after", "0", 0.0),
        ("retry-after", "-3", None),
        ("retry-after", "soon", None),
        ("retry-after", "inf", None),
        ("retry-after", "nan", None),
        ("retry-after", "", None),
        ("retry-after", "\u00b2", None),
        ("retry-after-ms", "1500", 1.5),
        ("retry-after-ms", "-1", None),
        ("retry-after-ms", "nan", None),
        ("retry-after", "Sun, 06 Nov 1994 08:49:40 GMT", 3.0),
        ("retry-after", "Sun, 06 Nov 1994 08:49:30 GMT", 0.0),
        ("retry-after", "Sun, 99 Nov 1994 08:49:30 GMT", None),
    ],
)
def test_reading_retry_after(header: str, value: str, expected: Optional[float]) -> None:
    assert retry_after_s({header: value}, WALL) == expected


def test_no_retry_after() -> None:
    assert retry_after_s({}, WALL) is None


def test_milliseconds_win_and_nonsense_in_them_does_not_hide_the_seconds() -> None:
    assert retry_after_s({"retry-after-ms": "100", "retry-after": "3"}, WALL) == 0.1
    assert retry_after_s({"retry-after-ms": "soon", "retry-after": "3"}, WALL) == 3.0


def test_a_date_is_compared_with_the_wall_clock() -> None:
    # It reads every attribute of every module, which makes lazily importing libraries import
    # everything.
    late = ["torch", "transformers", "huggingface_hub", "peft"]
    with freeze_time("1994-11-06 08:49:37", ignore=late):
        wish = retry_after_s({"retry-after": "Sun, 06 Nov 1994 08:50:37 GMT"}, SYSTEM_CLOCK.wall())
    assert wish == 60.0


# Whether the request was executed


def refused(status: int, *, maybe_taken: bool = False) -> APIError:
    error = status_error_type(status)("refused", status=status)
    error.maybe_taken = maybe_taken
    return error


def unreachable(*, maybe_taken: bool) -> APIError:
    error = APIConnectionError("unreachable")
    error.maybe_taken = maybe_taken
    return error


@pytest.mark.parametrize(
    ("error", "was_accepted", "expected"),
    [
        (InvalidInputError("a bad argument"), False, True),
        (RequestFailedError("out of memory"), False, True),
        (RequestFailedError("out of memory"), True, True),
        (unreachable(maybe_taken=False), False, True),
        (unreachable(maybe_taken=True), False, False),
        (refused(422), False, True),
        (refused(400, maybe_taken=True), False, True),  # it was the same request each time
        (refused(401), False, True),
        (refused(401, maybe_taken=True), False, False),
        (refused(409, maybe_taken=True), False, False),  # the conflict may be with the lost attempt
        (refused(408), False, False),
        (refused(500, maybe_taken=True), False, False),
        (refused(503), False, True),  # no token could be obtained
        (refused(501), False, True),  # no such route
        (ResponseDecodeError("no request id"), False, False),  # the server accepted it
        (refused(404), True, False),  # about the result, not about the work
        (refused(401), True, False),
        (ResultExpiredError("gone"), True, False),
        (OperationTimeoutError("late"), True, False),
    ],
)
def test_which_errors_prove_that_nothing_was_executed(
    error: Exception, was_accepted: bool, expected: bool
) -> None:
    assert left_undone(error, was_sent=True, was_accepted=was_accepted) is expected


def test_a_cancelled_request_was_not_executed_if_it_was_not_sent() -> None:
    assert left_undone(CancelledError(), was_sent=False, was_accepted=False)
    assert not left_undone(CancelledError(), was_sent=True, was_accepted=False)
    assert not left_undone(CancelledError(), was_sent=True, was_accepted=True)
