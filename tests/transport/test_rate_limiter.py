"""RateLimiter: one back-off for all clients that share a server and a key."""

from __future__ import annotations

import pytest
from support.clocks import ManualClock
from support.threads import race

from tinkex._transport.limits import RateLimiter
from tinkex._transport.server_state import state_of
from tinkex.config import Config
from tinkex.errors import ClientClosedError


def test_no_request_waits_before_a_429() -> None:
    assert RateLimiter(ManualClock()).wait_s() == 0.0


def test_a_back_off_lasts_for_its_time() -> None:
    clock = ManualClock()
    limiter = RateLimiter(clock)
    limiter.back_off(5.0)
    clock.advance(3.0)
    assert limiter.wait_s() == 2.0
    clock.advance(2.0)
    assert limiter.wait_s() == 0.0


def test_an_earlier_longer_retry_after_stands() -> None:
    clock = ManualClock()
    limiter = RateLimiter(clock)
    limiter.back_off(10.0)
    limiter.back_off(1.0)
    assert limiter.wait_s() == 10.0
    limiter.back_off(20.0)
    assert limiter.wait_s() == 20.0


def limiter_for(base_url: str, key: str) -> RateLimiter:
    return state_of(Config(base_url, api_key=key)).limiter


def test_one_limiter_per_server_and_key() -> None:
    assert limiter_for("http://a", "k") is limiter_for("http://a", "k")
    assert limiter_for("http://a", "k") is not limiter_for("http://a", "l")
    assert limiter_for("http://a", "k") is not limiter_for("http://b", "k")


def test_concurrent_threads_get_the_same_limiter() -> None:
    for round_ in range(200):
        url = f"http://race-{round_}"
        first, second = race(lambda: limiter_for(url, "k"), lambda: limiter_for(url, "k"))
        assert first is second


def test_requests_are_throttled_for_a_while_after_a_back_off() -> None:
    clock = ManualClock()
    limiter = RateLimiter(clock)
    assert not limiter.throttled
    limiter.back_off(2.0)
    clock.advance(11.9)
    assert limiter.throttled
    clock.advance(0.2)
    assert not limiter.throttled


def test_the_limiter_describes_how_it_holds_requests_back() -> None:
    clock = ManualClock()
    limiter = RateLimiter(clock)
    assert limiter.describe() is None
    limiter.back_off(8.0)
    assert limiter.describe() == "rate-limited by the server (429), 8.0 s to go"
    clock.advance(8.0)
    assert limiter.describe() == "after a 429, 10 requests at a time"


def test_a_caller_that_gives_up_in_the_pause_takes_no_slot() -> None:
    clock = ManualClock()
    limiter = RateLimiter(clock)
    limiter.back_off(1.0)

    def closed(delay_s: float) -> None:
        raise ClientClosedError("closed")

    for _ in range(100):
        with pytest.raises(ClientClosedError):
            limiter.acquire(closed, lambda: True)
    clock.advance(1.0)
    for _ in range(10):  # all slots are free
        limiter.acquire(lambda delay_s: None, lambda: True)


def test_a_caller_stopped_while_waiting_for_a_slot_returns() -> None:
    limiter = RateLimiter(ManualClock())
    for _ in range(10):
        limiter.acquire(lambda delay_s: None, lambda: False)
    with pytest.raises(ClientClosedError, match="requests after a 429"):
        limiter.acquire(lambda delay_s: None, lambda: True)
    limiter.release()
    limiter.acquire(lambda delay_s: None, lambda: True)
