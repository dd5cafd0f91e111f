"""RateLimiter: one back-off for everybody who shares a server and a key."""

from __future__ import annotations

from support.clocks import ManualClock
from support.threads import race

from tinkex.rate_limiter import RateLimiter, limiter_for


def test_nobody_waits_before_a_429() -> None:
    assert RateLimiter(ManualClock()).wait_s() == 0.0


def test_a_back_off_holds_for_its_time() -> None:
    clock = ManualClock()
    limiter = RateLimiter(clock)
    limiter.back_off(5.0)
    clock.advance(3.0)
    assert limiter.wait_s() == 2.0
    clock.advance(2.0)
    assert limiter.wait_s() == 0.0


def test_an_earlier_longer_wish_stands() -> None:
    clock = ManualClock()
    limiter = RateLimiter(clock)
    limiter.back_off(10.0)
    limiter.back_off(1.0)
    assert limiter.wait_s() == 10.0
    limiter.back_off(20.0)
    assert limiter.wait_s() == 20.0


def test_one_limiter_per_server_and_key() -> None:
    assert limiter_for("http://a", "k") is limiter_for("http://a", "k")
    assert limiter_for("http://a", "k") is not limiter_for("http://a", "l")
    assert limiter_for("http://a", "k") is not limiter_for("http://b", "k")


def test_threads_that_ask_at_once_get_the_same_limiter() -> None:
    for round_ in range(200):
        url = f"http://race-{round_}"
        first, second = race(lambda: limiter_for(url, "k"), lambda: limiter_for(url, "k"))
        assert first is second
