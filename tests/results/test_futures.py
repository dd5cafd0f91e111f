"""APIFuture: a concurrent.futures.Future that settles once, however many threads settle it."""

from __future__ import annotations

import concurrent.futures
import gc
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor
from fractions import Fraction
from typing import Any, Callable, Iterator, List

import pytest
from support.scripted_server import Answer
from support.threads import PATIENCE_S, race, wait_until
from support.tinker_routes import TinkerRoutes

from tinkex import ServiceClient, futures, types
from tinkex._runtime.lifecycle import run_deferred
from tinkex._runtime.worker_pool import WorkerPool
from tinkex.errors import (
    BackpressureError,
    BadRequestError,
    ClientClosedError,
    RequestFailedError,
)
from tinkex.futures import APIFuture, FutureStatus, gather


def new(kind: str = "sample", **how: Any) -> APIFuture[Any]:
    return APIFuture(kind, **how)


@pytest.fixture
def callbacks() -> Iterator[WorkerPool]:
    pool = WorkerPool("tinkex-callbacks", 1)
    yield pool
    pool.close()
    assert pool.join(time.monotonic() + PATIENCE_S) == []


def test_a_result_is_returned_to_every_waiter() -> None:
    future = new()
    with ThreadPoolExecutor(4) as pool:
        waiters = [pool.submit(future.result, PATIENCE_S) for _ in range(4)]
        assert future.try_set_result("value")
        assert [w.result(PATIENCE_S) for w in waiters] == ["value"] * 4
    assert future.result(0) == "value"
    assert future.exception() is None
    assert future.done()


def test_an_error_is_raised_by_result_and_returned_by_exception() -> None:
    future = new()
    error = RequestFailedError("no", request_id="r", category="user")
    assert future.try_set_exception(error)
    assert future.exception() is error
    with pytest.raises(RequestFailedError):
        future.result()


def test_a_result_may_be_an_exception_type_that_waiting_itself_raises() -> None:
    future = new()
    future.try_set_exception(concurrent.futures.TimeoutError("the operation's own"))
    with pytest.raises(concurrent.futures.TimeoutError, match="the operation's own"):
        future.result(PATIENCE_S)


def test_a_future_is_its_own_future() -> None:
    future = new()
    assert future.future() is future


@pytest.mark.parametrize("timeout", [0, 0.01, -1.0, Fraction(1, 100)])
def test_a_timeout_error_describes_the_wait_and_leaves_the_future_pending(timeout: Any) -> None:
    future = new("forward_backward")
    future.enter("waiting", "r-17")
    for wait in (future.result, future.exception):
        with pytest.raises(concurrent.futures.TimeoutError) as caught:
            wait(timeout)
        assert "forward_backward: waiting" in str(caught.value)
        assert "r-17" in str(caught.value)
    assert not future.done()
    assert future.try_set_result(1)
    assert future.result(0) == 1


def test_futures_work_with_wait_and_as_completed() -> None:
    futures = [new() for _ in range(3)]
    futures[1].try_set_result("b")
    done, pending = concurrent.futures.wait(futures, 5, FIRST_COMPLETED)
    assert done == {futures[1]}
    assert pending == {futures[0], futures[2]}
    futures[0].try_set_exception(ValueError("a"))
    futures[2].cancel()
    assert set(concurrent.futures.as_completed(futures, 5)) == set(futures)


def test_a_cancel_wakes_wait_and_as_completed() -> None:
    first, second = new(), new()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(concurrent.futures.wait, [first, second], PATIENCE_S)
        iterating = pool.submit(
            lambda: list(concurrent.futures.as_completed([first, second], PATIENCE_S))
        )
        first.cancel()
        second.cancel()
        assert waiting.result(PATIENCE_S).not_done == set()
        assert set(iterating.result(PATIENCE_S)) == {first, second}


def test_cancel_settles_a_future_and_a_late_result_is_ignored() -> None:
    future = new()
    assert future.cancel()
    assert future.cancelled()
    assert not future.try_set_result("late")
    assert not future.try_set_exception(ValueError("late"))
    with pytest.raises(CancelledError):
        future.result()
    with pytest.raises(CancelledError):
        future.exception()


def test_cancel_after_the_result_does_nothing() -> None:
    future = new()
    future.try_set_result(1)
    assert not future.cancel()
    assert future.result() == 1


@pytest.mark.parametrize("how", ["cancel", "settle"])
def test_a_settled_future_keeps_no_callback_alive(how: str) -> None:
    future = new()

    def callback(settled: Any) -> None:
        pass

    called = weakref.ref(callback)
    future.on_settled(callback)
    del callback
    assert called() is not None
    assert future.cancel() if how == "cancel" else future.try_set_result(1)
    assert called() is None


def test_queued_work_is_either_begun_or_cancelled() -> None:
    for _ in range(300):
        future = new()
        begun, cancelled = race(future.begin, future.cancel_if_queued)
        assert begun != cancelled
        assert future.cancelled() == cancelled
        assert not future.cancel_if_queued()


def test_exactly_one_of_many_threads_settles_a_future() -> None:
    for _ in range(300):
        future = new()
        called: List[Any] = []
        future.add_done_callback(called.append)
        outcomes = race(
            future.cancel,
            future.cancel,
            lambda: future.try_set_result(1),
            lambda: future.try_set_exception(ValueError("x")),
        )
        assert sorted(outcomes) == [False, False, False, True]
        assert called == [future]
        assert future.cancelled() == (outcomes[0] or outcomes[1])


# Notices


def settle_after_notices(
    future: APIFuture[Any], caplog: pytest.LogCaptureFixture, count: int
) -> None:
    """Wait for *future*; settle it once *count* notices are in the log."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(future.result, PATIENCE_S)
        wait_until(lambda: caplog.text.count("still waiting") >= count, f"{count} notices")
        future.try_set_result("v")
        assert waiting.result(PATIENCE_S) == "v"


def test_a_long_wait_is_explained_in_the_log_at_growing_intervals(
    caplog: pytest.LogCaptureFixture,
) -> None:
    future = new("sample", notice_after_s=0.005)
    future.enter("waiting", "r-1")
    future.queue_state, future.queue_state_reason = "paused_capacity", "all GPUs are busy"
    future.last_error = "503 from the server"
    began = time.time()
    with caplog.at_level(logging.INFO, "tinkex.futures"):
        settle_after_notices(future, caplog, 3)
    notices = [r for r in caplog.records if "still waiting" in r.getMessage()]
    # After 5, 15 and 35 ms at the earliest, at growing intervals.
    assert notices[2].created - began >= 0.034
    assert {r.levelno for r in notices} == {logging.INFO}
    text = notices[0].getMessage()
    for part in ("sample: waiting", "r-1", "paused_capacity", "all GPUs are busy", "503"):
        assert part in text


def test_a_long_wait_in_trouble_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(futures, "_TROUBLE_S", 0.0)
    future = new("sample", notice_after_s=0.005)
    future.enter("waiting", "r-1")
    future.last_error = "503 from the server"
    settle_after_notices(future, caplog, 1)
    notices = [r for r in caplog.records if "503 from the server" in r.getMessage()]
    assert {r.levelno for r in notices} == {logging.WARNING}


def test_a_short_wait_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    future = new()
    threading.Timer(0.01, future.try_set_result, ["v"]).start()
    with caplog.at_level(logging.DEBUG):
        assert future.result() == "v"
    assert caplog.text == ""


# Status


def test_the_repr_of_a_future_describes_it() -> None:
    future = new("sample")
    assert repr(future) == "<APIFuture sample: queued>"
    future.enter("waiting", "r-1")
    assert repr(future) == "<APIFuture sample: waiting, request r-1>"
    future.try_set_result("v")
    assert repr(future) == "<APIFuture sample: finished, request r-1>"


def test_status_follows_the_operation() -> None:
    future = new("optim_step")
    assert future.status().state == "queued"
    future.enter("submitting")
    assert future.status().state == "submitting"
    future.enter("waiting", "r-9")
    future.attempts = 3
    status = future.status()
    assert (status.state, status.request_id, status.attempts) == ("waiting", "r-9", 3)
    assert future.request_id == "r-9"
    future.try_set_result(None)
    assert future.status().state == "done"


def test_a_status_reads_as_a_sentence() -> None:
    status = FutureStatus("sample", "waiting", 12.4, "r", "active", None, 2, None)
    assert str(status) == "sample: waiting for 12 s, request r"
    status = FutureStatus("sample", "waiting", 1.0, None, "paused_rate_limit", None, 2, "boom")
    assert str(status) == (
        "sample: waiting for 1 s, paused_rate_limit (no reason given), last error: boom"
    )


def test_the_status_of_a_gathered_future_is_that_of_its_first_open_part() -> None:
    parts = [new("forward"), new("forward")]
    gathered = gather(new("forward"), parts, list)
    parts[0].enter("waiting", "r-0")
    parts[1].enter("waiting", "r-1")
    assert gathered.request_id == "r-0"
    assert gathered.status().request_id == "r-0"
    parts[0].try_set_result(1)
    assert gathered.status().request_id == "r-1"
    parts[1].try_set_result(2)
    assert gathered.status().state == "done"


# Callbacks


def test_callbacks_run_on_their_own_thread(callbacks: WorkerPool) -> None:
    future = new(run_callback=callbacks.submit)
    ran = threading.Event()
    names: List[str] = []

    def callback(settled: Any) -> None:
        names.append(threading.current_thread().name)
        assert settled.result(0) == 1
        ran.set()

    future.add_done_callback(callback)
    future.try_set_result(1)
    assert ran.wait(PATIENCE_S)
    assert names == ["tinkex-callbacks"]


def test_a_callback_of_a_settled_future_runs_immediately_in_the_callers_thread(
    callbacks: WorkerPool,
) -> None:
    future = new(run_callback=callbacks.submit)
    future.try_set_result(1)
    names: List[str] = []
    future.add_done_callback(lambda _: names.append(threading.current_thread().name))
    assert names == [threading.current_thread().name]


@pytest.mark.parametrize("failure", [ValueError("mine"), SystemExit(3), KeyboardInterrupt()])
def test_a_callback_that_raises_stops_neither_the_others_nor_the_thread(
    callbacks: WorkerPool, caplog: pytest.LogCaptureFixture, failure: BaseException
) -> None:
    ran = threading.Event()

    def fail(_: Any) -> None:
        raise failure

    first, second = new(run_callback=callbacks.submit), new(run_callback=callbacks.submit)
    first.add_done_callback(fail)
    second.add_done_callback(lambda _: ran.set())
    with caplog.at_level(logging.ERROR, "tinkex.futures"):
        assert first.try_set_result(1)
        assert second.try_set_result(2)
        assert ran.wait(PATIENCE_S)
    assert "a callback of sample failed" in caplog.text


def test_a_callback_that_waits_for_another_future_does_not_delay_results(
    callbacks: WorkerPool,
) -> None:
    first, second = new(run_callback=callbacks.submit), new(run_callback=callbacks.submit)
    seen: List[Any] = []
    done = threading.Event()
    first.add_done_callback(lambda _: (seen.append(second.result(PATIENCE_S)), done.set()))
    assert first.try_set_result("a")
    assert first.result(PATIENCE_S) == "a"
    assert second.try_set_result("b")
    assert done.wait(PATIENCE_S)
    assert seen == ["b"]


def test_a_callback_still_runs_after_its_thread_has_ended() -> None:
    callbacks = WorkerPool("tinkex-callbacks", 1)
    future = new(run_callback=callbacks.submit)
    called: List[Any] = []
    future.add_done_callback(called.append)
    callbacks.close()
    future.try_set_result(1)
    assert called == [future]


def test_every_callback_runs_once_whenever_it_was_added(callbacks: WorkerPool) -> None:
    for _ in range(200):
        future = new(run_callback=callbacks.submit)
        ran: List[int] = []
        race(
            lambda: future.try_set_result(1),
            lambda: future.add_done_callback(lambda _: ran.append(1)),
            lambda: future.add_done_callback(lambda _: ran.append(2)),
        )
        wait_until(lambda: len(ran) == 2, "both callbacks ran")
        assert sorted(ran) == [1, 2]


# Gather


def test_gather_joins_results_in_the_order_of_the_parts() -> None:
    parts = [new() for _ in range(3)]
    gathered = gather(new(), parts, list)
    for index in (2, 0, 1):
        assert not gathered.done()
        parts[index].try_set_result(index)
    assert gathered.result(0) == [0, 1, 2]


def test_the_first_failure_fails_the_gathered_future_and_cancels_the_rest() -> None:
    parts = [new() for _ in range(3)]
    gathered = gather(new(), parts, list)
    error = ValueError("second part")
    parts[1].try_set_exception(error)
    assert gathered.exception(0) is error
    assert parts[0].cancelled()
    assert parts[2].cancelled()


def test_cancelling_a_gathered_future_cancels_its_parts() -> None:
    parts = [new() for _ in range(3)]
    gathered = gather(new(), parts, list)
    parts[0].try_set_result(0)
    assert gathered.cancel()
    assert [p.cancelled() for p in parts] == [False, True, True]


def test_cancelling_a_part_cancels_the_gathered_future() -> None:
    parts = [new() for _ in range(2)]
    gathered = gather(new(), parts, list)
    parts[0].cancel()
    assert gathered.cancelled()
    assert parts[1].cancelled()


def test_a_gathered_future_that_was_cancelled_first_cancels_its_later_parts() -> None:
    gathered = new()
    gathered.cancel()
    parts = [new() for _ in range(2)]
    gather(gathered, parts, list)
    assert all(p.cancelled() for p in parts)


def test_an_error_while_joining_fails_the_gathered_future() -> None:
    def fail(results: List[Any]) -> Any:
        raise ValueError("cannot be joined")

    part = new()
    gathered = gather(new(), [part], fail)
    part.try_set_result(1)
    with pytest.raises(ValueError, match="cannot be joined"):
        gathered.result(0)


def test_parts_that_settle_concurrently_settle_the_gathered_future_once() -> None:
    for _ in range(300):
        parts = [new() for _ in range(3)]
        gathered = gather(new(), parts, list)
        joined: List[Any] = []
        gathered.add_done_callback(joined.append)
        race(*[lambda i=i: parts[i].try_set_result(i) for i in range(3)])
        assert gathered.result(0) == [0, 1, 2]
        assert joined == [gathered]


def test_if_cancel_races_failure_every_part_ends() -> None:
    for _ in range(300):
        parts = [new() for _ in range(3)]
        gathered = gather(new(), parts, list)
        race(gathered.cancel, lambda: parts[0].try_set_exception(ValueError("x")))
        assert gathered.done()
        assert all(p.done() for p in parts)


# Fork


def test_a_wait_in_the_child_of_a_fork_ends_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    future = new("forward_backward")
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(ClientClosedError, match="forward_backward was started before a fork"):
        future.result()


def test_a_cancel_in_the_child_of_a_fork_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    part, gathered = new("part"), new("whole")
    gather(gathered, [part], lambda results: results)
    settled: List[Any] = []
    part.on_settled(settled.append)  # would abort the parent's poll
    parent = os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: parent + 1)
        assert not part.cancel()
        assert not gathered.cancel()
    assert settled == []
    part.try_set_result(1)
    assert gathered.result(PATIENCE_S) == [1]


# Errors that are never retrieved


@pytest.fixture
def lost(caplog: pytest.LogCaptureFixture) -> Callable[[], List[str]]:
    """Return the unretrieved failures logged so far."""
    gc.collect()
    run_deferred()  # reports those of other tests first
    caplog.clear()

    def logged() -> List[str]:
        gc.collect()
        run_deferred()
        assert {record.levelno for record in caplog.records} <= {logging.ERROR}
        return [record.getMessage() for record in caplog.records]

    return logged


def failed(error: BaseException, kind: str = "optim_step") -> APIFuture[Any]:
    future = new(kind)
    future.enter("waiting", "r-5")
    future.try_set_exception(error)
    return future


def test_an_unread_failure_is_reported_once_when_collected(
    lost: Callable[[], List[str]],
) -> None:
    future = failed(RequestFailedError("out of memory", category="server"))
    assert lost() == []
    del future
    said = "unretrieved failure in optim_step (request r-5): RequestFailedError: out of memory"
    assert lost() == [said]
    assert lost() == [said]


@pytest.mark.parametrize(
    "read",
    [
        lambda f: f.exception(),
        lambda f: concurrent.futures.wait([f]) and f.exception(0),
        lambda f: f.add_done_callback(lambda _: None),
    ],
    ids=["exception", "wait and exception", "callback"],
)
def test_a_read_failure_is_not_reported(
    lost: Callable[[], List[str]], read: Callable[[Any], Any]
) -> None:
    read(failed(ValueError("x")))
    assert lost() == []


def test_a_timed_out_wait_does_not_count_as_reading(lost: Callable[[], List[str]]) -> None:
    future = new()
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(0)
    future.try_set_exception(ValueError("later"))
    future.status()
    assert future.failed()
    del future
    assert len(lost()) == 1


def test_cancelled_closed_and_successful_futures_are_not_reported(
    lost: Callable[[], List[str]],
) -> None:
    new().cancel()
    failed(ClientClosedError("closed"))
    new().try_set_result(1)
    new()
    assert lost() == []


def test_a_failed_batch_is_reported_once_and_not_if_it_was_read(
    lost: Callable[[], List[str]],
) -> None:
    for read in (True, False):
        parts = [new("forward") for _ in range(3)]
        gathered = gather(new("forward"), parts, list)
        for part in parts:
            part.try_set_exception(ValueError("too long"))
        if read:
            assert gathered.exception() is not None
        del part, parts, gathered
        assert len(lost()) == (0 if read else 1)


def test_collection_inside_a_lock_of_logging_does_not_deadlock(
    lost: Callable[[], List[str]],
) -> None:
    lock = threading.Lock()  # like QueueHandler's, it cannot be taken twice

    class Careful(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert lock.acquire(blocking=False), "logged from a finalizer"
            lock.release()

    handler = Careful()
    logging.getLogger("tinkex.futures").addHandler(handler)
    try:
        future = failed(ValueError("x"))
        with lock:
            del future
            gc.collect()
        assert len(lost()) == 1
    finally:
        logging.getLogger("tinkex.futures").removeHandler(handler)


def test_the_next_call_of_a_client_reports_unread_failures(
    scripted: ServiceClient, routes: TinkerRoutes, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = scripted.create_sampling_client(base_model="base")
    prompt = types.ModelInput.from_ints([1])
    routes.serve("asample", Answer(400, {"detail": "no such token"}), routes.accept)
    future = sampler.sample(prompt)
    wait_until(future.done, "it failed")
    del future

    def logged() -> bool:
        gc.collect()
        sampler.sample(prompt).result(PATIENCE_S)
        return "no such token" in caplog.text

    wait_until(logged, "the failure is in the log")
    assert caplog.text.count("unretrieved failure") == 1


def test_an_unread_failure_is_reported_at_exit() -> None:
    script = (
        "from tinkex.futures import APIFuture\n"
        "future = APIFuture('save_state')\n"
        "future.try_set_exception(ValueError('disk full'))\n"
        "del future\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert "unretrieved failure in save_state: ValueError: disk full" in (ended.stderr)


# What is kept


@pytest.mark.parametrize(
    "settle", [lambda f: f.try_set_result(1), lambda f: f.try_set_exception(ValueError())]
)
def test_a_settled_future_releases_its_listeners(settle: Callable[[Any], bool]) -> None:
    class Listener:
        notified = 0

        def hear(self, future: Any) -> None:
            self.notified += 1

    listener, future = Listener(), new()
    gone = weakref.ref(listener)
    future.on_settled(listener.hear)
    assert settle(future)
    assert listener.notified == 1
    del listener
    gc.collect()
    assert gone() is None
    future.exception()


# Pickling


def test_results_and_errors_of_futures_pickle(
    scripted: ServiceClient, routes: TinkerRoutes
) -> None:
    sampler = scripted.create_sampling_client(base_model="base")
    prompt = types.ModelInput.from_ints([1])
    response = sampler.sample(prompt).result(PATIENCE_S)
    other = pickle.loads(pickle.dumps(response))
    assert type(other) is types.SampleResponse
    assert (other.sequences[0].tokens, other.sequences[0].logprobs) == ([5], [-0.5])
    routes.serve("asample", Answer(400, {"detail": "no such token"}))
    error = sampler.sample(prompt).exception(PATIENCE_S)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is BadRequestError
    assert (str(copy), copy.status, copy.attempts) == (str(error), 400, 1)
    refused = BackpressureError("full", hint="Read some.")
    assert str(pickle.loads(pickle.dumps(refused))) == str(refused)
