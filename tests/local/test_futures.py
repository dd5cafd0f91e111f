"""The table of futures: waiting, waking, and the lifetime of results."""

from __future__ import annotations

import threading
from typing import Any, List

from local.harness import ManualClock

from tinkex.local.state.futures import Failure, FutureTable, Success, Waiting


def table(**limits: Any) -> FutureTable:
    return FutureTable(**limits)


def test_a_future_is_pending_and_then_settled_once() -> None:
    futures = table()
    futures.create("r", "m", 3)
    assert futures.wait("r", 0) == Waiting("m", 3)
    futures.complete("r", Success(1))
    futures.complete("r", Failure("late", "server"))
    assert futures.wait("r", 0) == Success(1)
    assert futures.wait("unknown", 0) is None


def test_a_completion_wakes_only_the_threads_that_wait_for_it() -> None:
    futures = table()
    futures.create("a", "m", 1)
    futures.create("b", "m", 2)
    woken: List[Any] = []
    threads = [
        threading.Thread(target=lambda: woken.append(futures.wait("a", 20))) for _ in range(4)
    ]
    other = threading.Thread(target=lambda: woken.append(futures.wait("b", 20)))
    for thread in (*threads, other):
        thread.start()
    futures.complete("a", Success("done"))
    for thread in threads:
        thread.join(20)
    assert woken == [Success("done")] * 4
    futures.complete("b", Success("too"))
    other.join(20)
    assert woken[4:] == [Success("too")]


def test_a_wait_ends_after_its_timeout() -> None:
    futures = table()
    futures.create("r", "m", 1)
    assert futures.wait("r", 0.001) == Waiting("m", 1)


def test_close_releases_the_waiters() -> None:
    futures = table()
    futures.create("r", "m", 1)
    found: List[Any] = []
    waiter = threading.Thread(target=lambda: found.append(futures.wait("r", 60)))
    waiter.start()
    futures.close()
    waiter.join(20)
    assert found == [Waiting("m", 1)]
    assert futures.wait("r", 60) == Waiting("m", 1)  # and later waits return at once


def test_results_are_dropped_some_time_after_they_were_fetched() -> None:
    clock = ManualClock()
    futures = table(clock=clock, keep_fetched_s=100, keep_unfetched_s=1000)
    for name in ("fetched", "forgotten"):
        futures.create(name, "m", 1)
        futures.complete(name, Success(name))
    clock.now += 50
    futures.fetched("fetched", 10)
    clock.now += 50
    futures.fetched("fetched", 10)  # a second fetch does not prolong it
    clock.now += 50
    futures.sweep(clock.now)
    assert futures.wait("fetched", 0) is None
    assert futures.wait("forgotten", 0) == Success("forgotten")
    clock.now += 850
    futures.sweep(clock.now)
    assert futures.wait("forgotten", 0) is None


def test_results_are_bounded_in_number_and_in_bytes() -> None:
    futures = table(max_finished=3, max_fetched_bytes=100)
    for name in "abcd":
        futures.create(name, "m", 1)
        futures.complete(name, Success(name))
    assert futures.wait("a", 0) is None
    for name in "bcd":
        futures.fetched(name, 60)
    assert [futures.wait(name, 0) for name in "bcd"] == [None, None, Success("d")]


def test_unfetched_results_are_not_displaced_by_fetched_ones() -> None:
    futures = table(max_finished=3)
    futures.create("mine", "a", 1)
    futures.complete("mine", Success("mine"))
    for number in range(10):
        name = str(number)
        futures.create(name, "b", number)
        futures.complete(name, Success(name))
        futures.fetched(name, 10)
    assert futures.wait("mine", 0) == Success("mine")
    kept = [name for name in map(str, range(10)) if futures.wait(name, 0) is not None]
    assert kept == ["7", "8", "9"]


def test_fetched_results_are_not_displaced_by_a_flood_of_others() -> None:
    futures = table(max_finished=3)
    futures.create("mine", "a", 1)
    futures.complete("mine", Success("mine"))
    futures.fetched("mine", 10)
    for number in range(10):
        futures.create(str(number), "b", number)
        futures.complete(str(number), Success(number))
    assert futures.wait("mine", 0) == Success("mine"), "its answer may have been lost"
    assert [n for n in range(10) if futures.wait(str(n), 0) is not None] == [7, 8, 9]


def test_an_old_result_can_be_fetched_again_for_as_long_as_any_other() -> None:
    clock = ManualClock()
    futures = table(clock=clock, keep_fetched_s=100, keep_unfetched_s=1000)
    futures.create("old", "m", 1)
    futures.complete("old", Success("old"))
    clock.now += 999
    futures.fetched("old", 10)
    clock.now += 99
    futures.sweep(clock.now)
    assert futures.wait("old", 0) == Success("old")
    clock.now += 1
    futures.sweep(clock.now)
    assert futures.wait("old", 0) is None
