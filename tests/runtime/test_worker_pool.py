"""WorkerPool: order, growth, idle threads, close, and tasks that must never be lost."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from typing import Any, Iterator, List

import pytest
from support.threads import PATIENCE_S, race, wait_until

from tinkex._runtime.worker_pool import WorkerPool
from tinkex.errors import ClientClosedError


@pytest.fixture
def pools() -> Iterator[List[WorkerPool]]:
    """Pools appended to this list are closed after the test, and their threads joined."""
    made: List[WorkerPool] = []
    yield made
    for pool in made:
        pool.close()
    for pool in made:
        assert pool.join(time.monotonic() + PATIENCE_S) == []


def threads_named(prefix: str) -> List[str]:
    return sorted(t.name for t in threading.enumerate() if t.name.startswith(prefix))


def test_a_lane_runs_tasks_in_order_of_arrival(pools: List[WorkerPool]) -> None:
    lane = WorkerPool("tinkex-test-lane", 1)
    pools.append(lane)
    ran: List[int] = []
    done = threading.Event()
    for number in range(500):
        lane.submit(lambda number=number: ran.append(number))  # type: ignore[misc]  # default
    lane.submit(done.set)
    assert done.wait(PATIENCE_S)
    assert ran == list(range(500))
    assert threads_named("tinkex-test-lane") == ["tinkex-test-lane"]


def test_no_thread_is_started_before_the_first_task(pools: List[WorkerPool]) -> None:
    pools.append(WorkerPool("tinkex-test-lazy", 4))
    assert threads_named("tinkex-test-lazy") == []


def test_a_pool_grows_with_its_work_up_to_the_cap(pools: List[WorkerPool]) -> None:
    pool = WorkerPool("tinkex-test-grow", 3)
    pools.append(pool)
    release = threading.Event()
    started = threading.Semaphore(0)
    running: List[str] = []

    def task() -> None:
        running.append(threading.current_thread().name)
        started.release()
        release.wait(PATIENCE_S)

    for expected in (1, 2, 3):
        pool.submit(task)
        assert started.acquire(timeout=PATIENCE_S)
        assert len(threads_named("tinkex-test-grow")) == expected
    pool.submit(task)
    pool.submit(task)
    assert len(threads_named("tinkex-test-grow")) == 3
    release.set()
    wait_until(lambda: len(running) == 5, "the tasks beyond the cap ran")
    assert sorted(set(running)) == [f"tinkex-test-grow-{i}" for i in range(3)]


def test_an_idle_thread_is_reused(pools: List[WorkerPool]) -> None:
    pool = WorkerPool("tinkex-test-reuse", 8)
    pools.append(pool)
    idents = set()
    for _ in range(20):
        ran = threading.Event()
        pool.submit(lambda: (idents.add(threading.get_ident()), ran.set()))
        assert ran.wait(PATIENCE_S)
        wait_until(lambda: pool._state.idle == 1, "the thread is idle again")
    assert len(idents) == 1


def test_idle_threads_end(pools: List[WorkerPool]) -> None:
    pool = WorkerPool("tinkex-test-idle", 4, idle_s=0.01)
    pools.append(pool)
    both = threading.Barrier(2)
    for _ in range(2):
        pool.submit(lambda: both.wait(PATIENCE_S))
    wait_until(lambda: threads_named("tinkex-test-idle") == [], "the idle threads have ended")
    ran = threading.Event()
    pool.submit(ran.set)
    assert ran.wait(PATIENCE_S)


def test_no_task_is_lost_between_idle_timeout_and_submit(pools: List[WorkerPool]) -> None:
    # With idle_s of 0 threads give up at once, over and over, while tasks arrive.
    pool = WorkerPool("tinkex-test-edge", 2, idle_s=0.0)
    pools.append(pool)
    for _ in range(200):
        first, second = threading.Event(), threading.Event()
        race(lambda: pool.submit(first.set), lambda: pool.submit(second.set))
        assert first.wait(PATIENCE_S)
        assert second.wait(PATIENCE_S)


def test_close_ends_idle_threads_at_once() -> None:
    pool = WorkerPool("tinkex-test-close", 2, idle_s=60.0)
    both = threading.Barrier(2)
    for _ in range(2):
        pool.submit(lambda: both.wait(PATIENCE_S))
    wait_until(lambda: pool._state.idle == 2, "both threads idle")
    pool.close()
    assert pool.join(time.monotonic() + PATIENCE_S) == []
    assert threads_named("tinkex-test-close") == []


def test_close_drops_queued_tasks_and_lets_them_be_collected() -> None:
    pool = WorkerPool("tinkex-test-drop", 1)
    began, release = threading.Event(), threading.Event()
    ran: List[str] = []

    class Owner:
        def task(self) -> None:
            ran.append("late")

    owner = Owner()
    alive = weakref.ref(owner)
    pool.submit(lambda: (began.set(), release.wait(PATIENCE_S)))
    assert began.wait(PATIENCE_S)
    for _ in range(3):
        pool.submit(owner.task)
    pool.close()
    release.set()
    assert pool.join(time.monotonic() + PATIENCE_S) == []
    del owner
    gc.collect()
    assert ran == []
    assert alive() is None


def test_a_closed_pool_refuses_tasks() -> None:
    pool = WorkerPool("tinkex-test-closed", 1)
    pool.close()
    with pytest.raises(ClientClosedError, match="tinkex-test-closed"):
        pool.submit(lambda: None)


def test_join_names_threads_that_remain() -> None:
    pool = WorkerPool("tinkex-test-stay", 1)
    began, release = threading.Event(), threading.Event()
    pool.submit(lambda: (began.set(), release.wait(PATIENCE_S)))
    assert began.wait(PATIENCE_S)
    pool.close()
    assert pool.join(time.monotonic()) == ["tinkex-test-stay"]
    release.set()
    assert pool.join(time.monotonic() + PATIENCE_S) == []


def test_a_task_may_close_and_join_its_own_pool() -> None:
    pool = WorkerPool("tinkex-test-self", 1)
    left: List[List[str]] = []

    def task() -> None:
        pool.close()
        left.append(pool.join(time.monotonic() + PATIENCE_S))

    pool.submit(task)
    wait_until(lambda: left == [[]], "the task has joined its own pool")


def test_drain_runs_the_queued_tasks_and_then_ends() -> None:
    pool = WorkerPool("tinkex-test-drain", 1)
    began, release = threading.Event(), threading.Event()
    ran: List[int] = []
    pool.submit(lambda: (began.set(), release.wait(PATIENCE_S)))
    assert began.wait(PATIENCE_S)
    for number in range(3):
        pool.submit(lambda number=number: ran.append(number))  # type: ignore[misc]  # default
    pool.drain()
    with pytest.raises(ClientClosedError):
        pool.submit(lambda: ran.append(99))
    release.set()
    assert pool.join(time.monotonic() + PATIENCE_S) == []
    assert ran == [0, 1, 2]


def test_the_exception_of_a_task_is_logged_and_the_next_task_runs(
    pools: List[WorkerPool], caplog: pytest.LogCaptureFixture
) -> None:
    lane = WorkerPool("tinkex-test-error", 1)
    pools.append(lane)
    ran = threading.Event()

    def fail() -> None:
        raise ValueError("the task's own")

    with caplog.at_level(logging.ERROR, "tinkex._runtime.worker_pool"):
        lane.submit(fail)
        lane.submit(ran.set)
        assert ran.wait(PATIENCE_S)
    assert "a task of tinkex-test-error failed" in caplog.text
    assert "the task's own" in caplog.text


def test_a_task_is_released_once_it_has_run(pools: List[WorkerPool]) -> None:
    pool = WorkerPool("tinkex-test-keep", 1)
    pools.append(pool)

    class Result:
        pass

    result = Result()
    alive = weakref.ref(result)
    pool.submit(lambda result=result: None)  # type: ignore[misc]  # default
    del result
    wait_until(lambda: pool._state.idle == 1, "the task has run")
    gc.collect()
    assert alive() is None


def refuse_to_start(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_task_for_which_no_thread_can_start_is_refused_and_never_runs(
    pools: List[WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = WorkerPool("tinkex-test-nothread", 1)
    pools.append(pool)
    ran: List[str] = []
    done = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_to_start)
        with pytest.raises(ClientClosedError, match="can't start new thread"):
            pool.submit(lambda: ran.append("refused"))
    pool.submit(lambda: ran.append("accepted"))
    pool.submit(done.set)
    assert done.wait(PATIENCE_S)
    assert ran == ["accepted"]


def test_a_pool_that_cannot_start_more_threads_uses_those_it_has(
    pools: List[WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = WorkerPool("tinkex-test-few", 4)
    pools.append(pool)
    began, release, ran = threading.Event(), threading.Event(), threading.Event()
    pool.submit(lambda: (began.set(), release.wait(PATIENCE_S)))
    assert began.wait(PATIENCE_S)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_to_start)
        pool.submit(ran.set)
    release.set()
    assert ran.wait(PATIENCE_S)


@pytest.mark.parametrize("started", [False, True])
def test_ctrl_c_while_a_thread_starts_leaves_a_lane_in_order(
    pools: List[WorkerPool], monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    start = threading.Thread.start
    made: List[threading.Thread] = []

    def interrupted(self: threading.Thread) -> None:
        if started:
            start(self)
            made.append(self)
        raise KeyboardInterrupt

    pool = WorkerPool("tinkex-test-interrupted", 1)
    pools.append(pool)
    ran: List[Any] = []
    done = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.submit(lambda: ran.append("interrupted"))
    for number in range(20):
        pool.submit(lambda number=number: ran.append((number, threading.get_ident())))
    pool.submit(done.set)
    assert done.wait(PATIENCE_S)
    assert [number for number, _ in ran] == list(range(20))
    assert len({thread for _, thread in ran}) == 1
    for thread in made:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_a_finalizer_may_stop_a_pool_even_inside_its_lock() -> None:
    pool = WorkerPool("tinkex-test-final", 2, idle_s=60.0)
    state = pool._state
    both = threading.Barrier(2)
    for _ in range(2):
        pool.submit(lambda: both.wait(PATIENCE_S))
    wait_until(lambda: state.idle == 2, "both threads idle")
    stop = state.stop_from_finalizer
    alive = weakref.ref(pool)
    with state.lock:  # a garbage collection may happen here
        stop()
    assert pool.join(time.monotonic() + PATIENCE_S) == []
    del pool
    gc.collect()
    assert alive() is None


def test_a_finalizer_lets_queued_tasks_finish() -> None:
    began, release, done = threading.Event(), threading.Event(), threading.Event()
    pool = WorkerPool("tinkex-test-last", 1)
    pool.submit(lambda: (began.set(), release.wait(PATIENCE_S)))
    assert began.wait(PATIENCE_S)
    pool.submit(done.set)
    pool._state.stop_from_finalizer()
    release.set()
    assert done.wait(PATIENCE_S)
    assert pool.join(time.monotonic() + PATIENCE_S) == []
    with pytest.raises(ClientClosedError):
        pool.submit(int)


def test_threads_do_not_keep_the_pool_alive() -> None:
    pool = WorkerPool("tinkex-test-weak", 1, idle_s=60.0)
    alive = weakref.ref(pool)
    ran = threading.Event()
    pool.submit(ran.set)
    assert ran.wait(PATIENCE_S)
    del pool
    gc.collect()
    assert alive() is None
    wait_until(lambda: threads_named("tinkex-test-weak") == [], "its thread has ended")


def test_close_races_submit_without_leaving_a_task_or_thread() -> None:
    for _ in range(300):
        pool = WorkerPool("tinkex-test-race", 2)
        ran: List[int] = []

        def submit(pool: WorkerPool = pool, ran: List[int] = ran) -> str:
            try:
                pool.submit(lambda: ran.append(1))
            except ClientClosedError:
                return "refused"
            return "accepted"

        outcome, _ = race(submit, pool.close)
        assert outcome in ("refused", "accepted")
        assert pool.join(time.monotonic() + PATIENCE_S) == []
        if outcome == "refused":
            assert ran == []
    assert threads_named("tinkex-test-race") == []


def test_no_task_of_many_submitters_is_lost() -> None:
    pool = WorkerPool("tinkex-test-many", 4, idle_s=0.0)
    ran: List[int] = []

    def submit_some() -> None:
        for number in range(200):
            pool.submit(lambda number=number: ran.append(number))  # type: ignore[misc]  # default

    race(*[submit_some] * 6)
    wait_until(lambda: len(ran) == 1200, "every task has run")
    pool.close()
    assert pool.join(time.monotonic() + PATIENCE_S) == []
