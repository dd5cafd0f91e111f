"""SingleFlight: one caller does the work, the others get its outcome."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, List

import pytest
from support.scripted_server import PATIENCE_S

from tinkex._runtime.single_flight import SingleFlight
from tinkex.errors import ClientClosedError, RateLimitError


class Closing(threading.Event):
    """Records that a thread has checked it, as threads that wait for a leader do."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = threading.Event()

    def is_set(self) -> bool:
        self.looked.set()
        return super().is_set()


class Bench:
    """A leader that is still working, and followers that wait for it."""

    def __init__(self) -> None:
        self.flight: SingleFlight[str] = SingleFlight()
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.closings: List[Closing] = []
        self.runs: List[str] = []

    def lead(self, outcome: Callable[[], str]) -> str:
        def work() -> str:
            self.runs.append("leader")
            self.began.set()
            assert self.go_on.wait(PATIENCE_S)
            return outcome()

        return self.flight.run(work, threading.Event())

    def follow(self, closing: Closing) -> str:
        def work() -> str:
            self.runs.append("follower")
            return "the follower's"

        return self.flight.run(work, closing)

    def start(
        self, pool: ThreadPoolExecutor, outcome: Callable[[], str], followers: int
    ) -> List[Future[str]]:
        """Return the futures of the leader and of *followers* waiting followers."""
        leading = pool.submit(self.lead, outcome)
        assert self.began.wait(PATIENCE_S)
        self.closings = [Closing() for _ in range(followers)]
        waiting = [pool.submit(self.follow, closing) for closing in self.closings]
        assert all(closing.looked.wait(PATIENCE_S) for closing in self.closings)
        return [leading, *waiting]


def fail(error: BaseException) -> Callable[[], str]:
    def outcome() -> str:
        raise error

    return outcome


def test_all_get_the_leaders_value() -> None:
    bench = Bench()
    with ThreadPoolExecutor(9) as pool:
        futures = bench.start(pool, lambda: "it", 8)
        assert bench.flight.busy
        bench.go_on.set()
        found = [future.result(PATIENCE_S) for future in futures]
    assert found == ["it"] * 9
    assert bench.runs == ["leader"]
    assert not bench.flight.busy


def test_each_follower_gets_a_copy_of_the_leaders_error() -> None:
    bench = Bench()
    error = RateLimitError("slow down", status=429, retry_after_s=3.0)
    with ThreadPoolExecutor(2) as pool:
        leading, waiting = bench.start(pool, fail(error), 1)
        bench.go_on.set()
        assert leading.exception(PATIENCE_S) is error
        mine = waiting.exception(PATIENCE_S)
    assert bench.runs == ["leader"]
    assert isinstance(mine, RateLimitError)
    assert mine is not error
    assert (str(mine), mine.retry_after_s, mine.__cause__) == ("slow down", 3.0, error)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), ClientClosedError("closed")])
def test_an_interrupted_or_closed_leader_decides_nothing(error: BaseException) -> None:
    bench = Bench()
    with ThreadPoolExecutor(2) as pool:
        leading, waiting = bench.start(pool, fail(error), 1)
        bench.go_on.set()
        assert leading.exception(PATIENCE_S) is error
        assert waiting.result(PATIENCE_S) == "the follower's"
    assert bench.runs == ["leader", "follower"]


def test_a_closed_follower_stops_waiting() -> None:
    bench = Bench()
    with ThreadPoolExecutor(2) as pool:
        leading, waiting = bench.start(pool, lambda: "it", 1)
        bench.closings[0].set()
        with pytest.raises(ClientClosedError):
            waiting.result(PATIENCE_S)
        assert not leading.done()
        bench.go_on.set()
        assert leading.result(PATIENCE_S) == "it"


def test_later_calls_do_the_work_again() -> None:
    flight: SingleFlight[int] = SingleFlight()
    closing = threading.Event()
    assert [flight.run(lambda n=n: n, closing) for n in range(3)] == [0, 1, 2]
