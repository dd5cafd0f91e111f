"""The meaning of answers to polls (docs/protocol.md, "Interpreting a poll"), and their pacing."""

from __future__ import annotations

import json
from typing import Any, Dict, Optional

import pytest

from tinkex._results.backoff import (
    FIRST_SPACING_S,
    LAST_BACKOFF_S,
    LAST_SPACING_S,
    SAME_500_LIMIT,
    PollInterval,
    poll_policy,
)
from tinkex._results.outcomes import Announced, Done, Failed, Outcome, Pending, Trouble, interpret
from tinkex._transport.request import Reply, Request
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    NotFoundError,
    RequestFailedError,
    ResponseDecodeError,
    ResultExpiredError,
    status_error_type,
)
from tinkex.retry import MAX_HINT_S, RetryState

POLL = Request("POST", "/api/v1/retrieve_future")


def outcome(
    status: int,
    body: Any = b"",
    content_type: str = "application/json",
    maybe_lost: bool = False,
    headers: Optional[Dict[str, str]] = None,
) -> Outcome:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = Reply(status, {"content-type": content_type, **(headers or {})}, raw)
    transport = Transport(Config.resolve(environ={}, base_url="http://127.0.0.1:1"))
    error = None if status < 300 else transport.status_error(POLL, reply)
    return interpret(reply, error, request_id="r-1", kind="sample", maybe_lost=maybe_lost)


# 2xx


@pytest.mark.parametrize("status", [200, 201, 202])
def test_a_json_object_is_a_result(status: int) -> None:
    found = outcome(status, {"path": "tinker://r/weights/a"})
    assert isinstance(found, Done)
    assert found.reply.json() == {"path": "tinker://r/weights/a"}


def test_protobuf_is_a_result_whatever_its_bytes() -> None:
    found = outcome(200, b'{"type":"try_again","error":"x"}', "application/x-protobuf")
    assert isinstance(found, Done)


@pytest.mark.parametrize("body", [{}, {"error": None, "path": "p"}, {"metrics": {"error": 0.5}}])
def test_results_that_look_like_failures_are_results(body: Any) -> None:
    assert isinstance(outcome(200, body), Done)


@pytest.mark.parametrize(
    ("body", "state", "reason"),
    [
        ({"type": "try_again", "request_id": "r-1", "queue_state": "active"}, "active", None),
        (
            {"type": "try_again", "queue_state": "paused_capacity", "queue_state_reason": "full"},
            "paused_capacity",
            "full",
        ),
        ({"type": "try_again"}, None, None),
        # The tag may come last, after a long reason.
        ({"queue_state_reason": "x" * 5000, "type": "try_again"}, None, "x" * 5000),
    ],
)
def test_try_again_is_pending(body: Any, state: Optional[str], reason: Optional[str]) -> None:
    assert outcome(200, body) == Pending(state, reason)


@pytest.mark.parametrize(
    ("state", "reason"), [(7, None), (None, ["x"]), ({}, 3)], ids=["state", "reason", "both"]
)
def test_a_queue_state_that_is_not_text_is_none(state: Any, reason: Any) -> None:
    body = {"type": "try_again", "queue_state": state, "queue_state_reason": reason}
    assert outcome(200, body) == Pending()
    assert outcome(408, body) == Pending()


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({"status": "complete_metadata", "response_payload_size": 70_000_000}, 70_000_000),
        ({"status": "complete_metadata"}, 0),
        ({"status": "complete_metadata", "response_payload_size": "large"}, 0),
        ({"status": "complete_metadata", "response_payload_size": -1}, 0),
    ],
)
def test_metadata_announces_a_result(body: Any, size: int) -> None:
    assert outcome(200, body) == Announced(size)


def test_a_result_may_mention_metadata() -> None:
    assert isinstance(outcome(200, {"path": '"complete_metadata"', "status": "done"}), Done)


@pytest.mark.parametrize(
    ("category", "expected"),
    [
        ("user", "user"),
        ("server", "server"),
        ("USER", "user"),
        ("unknown", "unknown"),
        ("cosmic", "unknown"),
        (None, "unknown"),
        (7, "unknown"),
    ],
)
def test_an_error_key_is_failed_work(category: Any, expected: str) -> None:
    found = outcome(200, {"error": "loss is NaN", "category": category})
    assert isinstance(found, Failed)
    assert isinstance(found.error, RequestFailedError)
    assert found.error.category == expected
    assert found.error.request_id == "r-1"
    assert "loss is NaN" in str(found.error)
    assert "sample" in str(found.error)


def test_a_2xx_that_is_not_json_and_mentions_an_error_is_a_decode_error() -> None:
    with pytest.raises(ResponseDecodeError):
        outcome(200, b'<html>"error"</html>', "text/html")


# Error statuses


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"detail": "still running"}, Pending()),
        (
            {"queue_state": "paused_rate_limit", "queue_state_reason": "quota"},
            Pending("paused_rate_limit", "quota"),
        ),
        (b"", Pending()),
        (b"Request Timeout", Pending()),
        ([1], Pending()),
    ],
)
def test_408_is_pending(body: Any, expected: Pending) -> None:
    assert outcome(408, body) == expected


@pytest.mark.parametrize("status", [402, 429, 500, 502, 503, 504, 529])
def test_possibly_temporary_statuses_are_trouble(status: int) -> None:
    found = outcome(status, {"detail": "passing"})
    assert isinstance(found, Trouble)
    assert type(found.error) is status_error_type(status)
    assert found.error.request_id == "r-1"


def test_410_is_an_expired_result() -> None:
    found = outcome(410, {"detail": "gone"})
    assert isinstance(found, Failed)
    assert isinstance(found.error, ResultExpiredError)
    assert found.error.status == 410
    assert isinstance(found.error.__cause__, APIStatusError)


def test_404_is_not_found_unless_a_response_was_lost_on_the_way() -> None:
    never = outcome(404, {"detail": "unknown future"})
    assert isinstance(never, Failed)
    assert isinstance(never.error, NotFoundError)
    lost = outcome(404, {"detail": "unknown future"}, maybe_lost=True)
    assert isinstance(lost, Failed)
    assert isinstance(lost.error, ResultExpiredError)
    assert "before you submit it again" in str(lost.error)


@pytest.mark.parametrize("status", [400, 409, 422])
def test_how_open_servers_report_failed_work(status: int) -> None:
    # SkyRL: 400 with a detail; TuFT: the mapped status, "Future failed: ..."
    found = outcome(status, {"detail": "Future failed: unknown loss"})
    assert isinstance(found, Failed)
    assert isinstance(found.error, RequestFailedError)
    assert found.error.category == "user"
    assert found.error.status == status
    assert "unknown loss" in str(found.error)
    assert isinstance(found.error.__cause__, APIStatusError)


@pytest.mark.parametrize("status", [302, 401, 403, 405, 415, 501])
def test_other_responses_are_final_under_their_own_type(status: int) -> None:
    found = outcome(status, {"detail": "no"})
    assert isinstance(found, Failed)
    assert type(found.error) is status_error_type(status)


# When to poll again


def test_a_real_long_poll_is_followed_at_once() -> None:
    assert PollInterval().after_pending(took_s=30.0, rand=0.9) == 0.0


def test_quick_pending_responses_are_spaced_ever_further_up_to_a_second() -> None:
    interval = PollInterval()
    delays = [interval.after_pending(took_s=0.0, rand=0.5) for _ in range(30)]
    assert delays[0] == FIRST_SPACING_S
    assert delays == sorted(delays)
    assert delays[-1] == LAST_SPACING_S


def test_jitter_is_half_to_one_and_a_half() -> None:
    assert PollInterval().after_pending(0.0, rand=0.0) == FIRST_SPACING_S * 0.5
    assert PollInterval().after_pending(0.0, rand=1.0) == FIRST_SPACING_S * 1.5


def test_a_held_poll_starts_the_spacing_again() -> None:
    interval = PollInterval()
    for _ in range(20):
        interval.after_pending(0.0, 0.5)
    interval.after_pending(10.0, 0.5)
    assert interval.after_pending(0.0, 0.5) == FIRST_SPACING_S


# Failed polls


def error(status: int, text: str = "boom", retry_after_s: Optional[float] = None) -> APIStatusError:
    return status_error_type(status)(text, status=status, retry_after_s=retry_after_s)


class Polls:
    """Polls that fail, on a clock that the test sets."""

    def __init__(self, max_outage_s: float = 300.0) -> None:
        self.state = RetryState(poll_policy(max_outage_s))
        self.now = 0.0

    def fail(self, failure: APIError, *, took_s: float = 0.0, rand: float = 1.0) -> Optional[float]:
        """Return the pause after a poll that failed after *took_s*; None if it is final."""
        headers: Optional[Dict[str, str]] = {} if isinstance(failure, APIStatusError) else None
        began, self.now = self.now, self.now + took_s
        return self.state.decide(failure, self.now, rand, headers, began=began).delay_s


def test_trouble_backs_off_to_ten_seconds_and_pending_resets_it() -> None:
    polls = Polls()
    delays = [polls.fail(error(503)) for _ in range(7)]
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, LAST_BACKOFF_S, LAST_BACKOFF_S]
    polls.state.succeeded()
    assert polls.fail(error(503)) == 0.5


def test_retry_after_is_obeyed_up_to_a_limit() -> None:
    assert Polls().fail(error(503, retry_after_s=3.0), rand=0.0) == 3.0
    assert Polls().fail(error(503, retry_after_s=86400.0), rand=0.0) == MAX_HINT_S
    assert Polls().fail(error(503, retry_after_s=0.0), rand=0.0) == 0.25


def test_the_same_500_several_times_in_a_row_is_final() -> None:
    polls = Polls()
    goes_on = [polls.fail(error(500)) is not None for _ in range(SAME_500_LIMIT)]
    assert goes_on == [True] * (SAME_500_LIMIT - 1) + [False]


def test_different_500s_and_503s_are_retried() -> None:
    polls = Polls()
    assert all(polls.fail(error(500, f"boom {n}")) is not None for n in range(20))
    for _ in range(SAME_500_LIMIT - 1):
        polls.fail(error(500))
    assert polls.fail(error(503, "busy")) is not None
    assert polls.fail(error(500)) is not None


def test_a_pending_response_between_500s_starts_the_count_again() -> None:
    polls = Polls()
    for _ in range(SAME_500_LIMIT - 1):
        polls.fail(error(500))
    polls.state.succeeded()
    assert polls.fail(error(500)) is not None


def test_a_long_outage_ends_the_polling_however_the_polls_failed() -> None:
    polls = Polls(max_outage_s=300.0)
    assert polls.fail(error(503)) is not None
    polls.now = 300.0
    assert polls.fail(APIConnectionError("refused")) is not None
    polls.now = 301.0
    assert polls.fail(error(502)) is None


def test_an_outage_begins_with_the_last_contact() -> None:
    polls = Polls(max_outage_s=10.0)
    # Held for a minute, then an error: the outage begins with the error.
    assert polls.fail(error(502), took_s=60.0) is not None
    polls.state.succeeded()
    # Held for a minute, then cut off: the server has been silent for a minute.
    assert polls.fail(APIConnectionError("reset"), took_s=60.0) is None


def test_a_429_is_waited_out_however_long_it_lasts() -> None:
    polls = Polls(max_outage_s=10.0)
    for _ in range(100):
        assert polls.fail(error(429, retry_after_s=60.0)) == 60.0
        polls.now += 60.0
    assert polls.fail(error(503)) is not None  # the 429s were no outage


def test_a_429_ends_an_outage() -> None:
    polls = Polls(max_outage_s=10.0)
    for failure in (APIConnectionError("refused"), error(503)):
        assert polls.fail(failure) is not None
        polls.now += 9.0
        assert polls.fail(error(429)) is not None
        polls.now += 9.0


def test_a_poll_is_repeated_even_after_errors_that_are_not_retryable() -> None:
    broken_tls = APIConnectionError("certificate", retryable=False)
    assert Polls().fail(broken_tls) is not None


def test_a_402_waits_as_long_as_the_billing_pause() -> None:
    pauses = iter([5.0, None])
    state = RetryState(poll_policy(300.0), pause_for_billing=lambda: next(pauses))
    assert state.decide(error(402), 0.0, 0.0, {}).delay_s == 5.0
    assert state.decide(error(402), 5.0, 0.0, {}).delay_s is None
    assert Polls().fail(error(402)) is None
