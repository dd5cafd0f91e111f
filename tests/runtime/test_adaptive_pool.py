"""AdaptivePool: how many threads serve short requests, and what happens to waiting tasks."""

from __future__ import annotations

import functools
import threading
import time
from typing import Any, Iterable, Iterator, List, Optional

import pytest
from support.threads import PATIENCE_S, race, wait_until

from tinkex._runtime import adaptive_pool
from tinkex._runtime.adaptive_pool import AdaptivePool
from tinkex._runtime.worker_pool import WorkerPools
from tinkex.errors import ClientClosedError

pools = WorkerPools()


@pytest.fixture(autouse=True)
def join_them() -> Iterator[None]:
    yield
    pools.close()
    assert pools.join(time.monotonic() + PATIENCE_S) == []


def make() -> AdaptivePool:
    return AdaptivePool(pools, "tinkex-adaptive")


def each(run: Any, items: Iterable[Any]) -> List[Any]:
    """Return a task per item, which runs the item."""
    return [functools.partial(run, item) for item in items]


def test_there_are_more_threads_if_the_server_is_far_away_and_they_are_idle() -> None:
    made = make()

    def after(request_s: float, cpu_s: float) -> Optional[int]:
        """Return how many threads are wanted after requests with these total and CPU times."""
        ended = made._counted_from + 2 * adaptive_pool.RECENT_S  # earlier requests are forgotten
        made._fastest_s = made._fastest_before_s = 1e9
        notes = [
            made._note(
                ended - request_s,
                ended,
                cpu_s / adaptive_pool.DECIDE_EVERY * 2 * adaptive_pool.RECENT_S,
            )
            for _ in range(adaptive_pool.DECIDE_EVERY)
        ]
        assert notes[:-1] == [None] * (adaptive_pool.DECIDE_EVERY - 1)
        return notes[-1]

    assert after(0.0005, cpu_s=0.01) == adaptive_pool.MIN_THREADS
    assert after(0.0305, cpu_s=0.01) == 30
    assert after(0.5, cpu_s=0.01) == adaptive_pool.MAX_THREADS
    assert after(0.0305, cpu_s=0.9) == adaptive_pool.MIN_THREADS


def test_one_quick_recent_request_shows_how_far_away_the_server_is() -> None:
    made = make()
    began = made._period_began

    def note(at_s: float, took_s: float) -> Optional[int]:
        return made._note(began + at_s - took_s, began + at_s, 0.0)

    assert note(1.0, 0.0005) is None
    slow = [note(1.0 + number, 0.05) for number in range(15)]  # delayed by the interpreter
    assert slow[-1] == adaptive_pool.MIN_THREADS
    later = [note(26.0 + number, 0.0505) for number in range(16)]  # the server is farther away now
    assert later[-1] == 50


def test_the_pool_grows_while_requests_wait_for_the_server() -> None:
    inside, most = 0, 0
    lock, never = threading.Lock(), threading.Event()

    def run(number: int) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        never.wait(0.01)  # as if for the server
        with lock:
            inside -= 1
            ran.append(number)

    ran: List[int] = []
    made = make()
    made.put(each(run, range(200)))
    wait_until(lambda: len(ran) == 200, "all ran")
    assert adaptive_pool.MIN_THREADS < most <= made.pool.cap


def test_the_pool_shrinks_while_it_has_work_to_do() -> None:
    full, go = threading.Barrier(9), threading.Event()
    ran: List[int] = []

    def run(number: int) -> None:
        if number < 8:
            full.wait(PATIENCE_S)
            assert go.wait(PATIENCE_S)
        else:
            ran.append(made._at_work)

    made = make()
    made.pool.cap = 8
    made.put(each(run, range(8)))
    full.wait(PATIENCE_S)
    made.put(each(run, range(8, 8 + adaptive_pool.DECIDE_EVERY // 2)))
    made.pool.cap = 3
    go.set()
    wait_until(lambda: len(ran) == adaptive_pool.DECIDE_EVERY // 2, "all ran")
    assert set(ran) <= {1, 2, 3}


def test_every_task_runs_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: List[Any] = []
    made = make()

    def put(name: str) -> Any:
        return lambda: [made.put(each(ran.append, [(name, number)])) for number in range(300)]

    race(put("a"), put("b"), lambda: [made.run_waiting() for _ in range(300)])
    wait_until(lambda: len(ran) == 600, "all ran")
    assert sorted(ran) == [(name, number) for name in ("a", "b") for number in range(300)]
    monkeypatch.setattr(adaptive_pool, "MIN_THREADS", 1)
    monkeypatch.setattr(adaptive_pool, "MAX_THREADS", 1)  # a second thread could overtake the first
    one = make()
    ran.clear()
    one.put(each(ran.append, range(1000)))
    wait_until(lambda: len(ran) == 1000, "all ran")
    assert ran == list(range(1000))


def test_waiting_tasks_are_dropped_at_close() -> None:
    go, ran = threading.Event(), []

    def run(number: int) -> None:
        ran.append(number)
        assert go.wait(PATIENCE_S)

    made = make()
    made.put(each(run, range(10)))
    wait_until(lambda: len(ran) == adaptive_pool.MIN_THREADS, "all threads are busy")
    made.pool.close()
    made.clear()
    go.set()
    assert made.pool.join(time.monotonic() + PATIENCE_S) == []
    assert (len(ran), made.waiting) == (adaptive_pool.MIN_THREADS, 0)
    with pytest.raises(ClientClosedError):
        made.put([print])
