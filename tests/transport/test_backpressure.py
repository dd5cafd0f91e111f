"""Back-pressure: quotas, the limit on unread futures, 429s, and what the user sees of them."""

from __future__ import annotations

import concurrent.futures
import gc
import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, List

import pytest
from support.clocks import ManualClock
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.threads import race, wait_until
from support.tinker_routes import TinkerRoutes
from support.transports import open_resources, quick_config

from tinkex import ServiceClient, types
from tinkex._transport import limits
from tinkex._transport.limits import Quota, RateLimiter, UnreadLimit, megabytes
from tinkex._transport.resources import ByteLimits
from tinkex._transport.server_flags import flags_for
from tinkex._transport.server_state import state_of
from tinkex.errors import BackpressureError, ClientClosedError, ConfigError, RateLimitError
from tinkex.futures import APIFuture

PROMPT = types.ModelInput.from_ints([1, 2, 3])
BATCH = [
    types.Datum(
        types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4], "weights": [1.0] * 3}
    )
]


def never() -> bool:
    return False


def waiting(quota: Quota) -> int:
    return len(quota._queue)


# Quotas


def test_a_quota_grants_requests_while_its_size_is_not_exceeded() -> None:
    quota = Quota("things", 10, str)
    quota.acquire(10, never)
    quota.acquire(5, never)  # docs/protocol.md, "Back-pressure": the rest may become negative
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(quota.acquire, 1, never)
        wait_until(lambda: waiting(quota) == 1, "the third waits")
        quota.release(5)
        third.result(PATIENCE_S)
    assert quota.describe() == "things: 11 of 10 in flight"


def test_a_request_larger_than_the_quota_passes_and_the_next_waits_for_it() -> None:
    quota = Quota("things", 10, str)
    quota.acquire(1000, never)
    with ThreadPoolExecutor(1) as pool:
        small = pool.submit(quota.acquire, 1, never)
        wait_until(lambda: waiting(quota) == 1, "the small one waits")
        quota.release(1000)
        small.result(PATIENCE_S)


def test_waiting_callers_are_served_in_order() -> None:
    quota = Quota("things", 0, str)
    quota.acquire(1, never)
    order: List[int] = []

    def take(number: int) -> None:
        quota.acquire(1, never)
        order.append(number)
        quota.release(1)

    with ThreadPoolExecutor(20) as pool:
        for number in range(20):
            pool.submit(take, number)
            wait_until(lambda n=number: waiting(quota) == n + 1, "it waits")
        quota.release(1)
    assert order == list(range(20))


def test_stopping_ends_a_wait_and_takes_nothing() -> None:
    quota = Quota("things", 0, str)
    quota.acquire(1, never)
    stopped = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(quota.acquire, 7, stopped.is_set)
        wait_until(lambda: waiting(quota) == 1, "it waits")
        second = pool.submit(quota.acquire, 1, never)
        wait_until(lambda: waiting(quota) == 2, "it waits")
        stopped.set()
        quota.wake()
        with pytest.raises(ClientClosedError, match="things"):
            first.result(PATIENCE_S)
        assert not second.done()
        quota.release(1)
        second.result(PATIENCE_S)
    assert quota.describe() == "things: 1 of 0 in flight"


def test_ctrl_c_at_the_moment_of_the_grant_passes_the_grant_on() -> None:
    quota = Quota("things", 0, str)
    quota.acquire(1, never)

    def interrupted() -> bool:
        quota.release(1)  # grants it at this very moment
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quota.acquire(5, interrupted)
    assert quota.describe() == "things: 0 of 0 in flight"


def test_two_hundred_threads_share_a_quota_and_release_all_of_it() -> None:
    size, largest = 100, 40
    quota = Quota("things", size, str)
    lock = threading.Lock()
    in_use, most = 0, 0

    def work(seed: int) -> bool:
        nonlocal in_use, most
        amounts = random.Random(seed)
        for _ in range(20):
            amount = amounts.randint(1, largest)
            with quota.holding(amount, never):
                with lock:
                    in_use += amount
                    most = max(most, in_use)
                with lock:
                    in_use -= amount
        return True

    assert race(*[lambda seed=seed: work(seed) for seed in range(200)]) == [True] * 200
    assert most <= size + largest
    assert quota.describe() == "things: 0 of 100 in flight"


def test_a_wait_shows_in_the_status_of_the_future() -> None:
    quota = Quota("sample requests", 10_000_000, megabytes)
    quota.acquire(12_000_000, never)
    future: APIFuture[Any] = APIFuture("sample")
    future.enter("submitting")
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(quota.acquire, 1, never, future)
        wait_until(lambda: future.waiting_for is not None, "it waits")
        reported = "sample requests: 12.0 MB of 10.0 MB in flight"
        assert future.status().held_back == reported
        with pytest.raises(concurrent.futures.TimeoutError, match=reported):
            future.result(0)
        quota.release(12_000_000)
        held.result(PATIENCE_S)
    assert future.status().held_back is None


# Sizes


def test_the_callers_limits_are_bounded_by_the_flags(server: ScriptedServer) -> None:
    flags = {
        "sample_dispatch_bytes_semaphore_size": 1000,
        "fwdbwd_dispatch_bytes_semaphore_size": 2000,
    }
    server.on("POST /api/v1/client/config", Answer(body=flags))
    settings = {"max_sample_bytes": 5000, "max_batch_bytes": 7}
    with open_resources(server, **settings) as resources:
        limits = resources.limits
        assert (limits.samples.size, limits.results.size) == (5000, 52_428_800)
        flags_for(resources.transport)
        assert limits.sample_bytes(3) == 30  # reads the flags, too
    sizes = [q.size for q in (limits.samples, limits.batches, limits.results)]
    assert sizes == [1000, 7, 52_428_800]


def test_after_a_429_a_sample_weighs_twenty_times_as_much(server: ScriptedServer) -> None:
    config = quick_config(server)
    limits = ByteLimits(config, state_of(config))
    state_of(config).limiter.back_off(1.0)
    assert limits.sample_bytes(3) == 600


@pytest.mark.parametrize(
    "setting",
    [
        {"on_backpressure": "panic"},
        {"max_unread": 0},
        {"max_sample_bytes": 1.5},
        {"max_batch_bytes": -1},
        {"max_result_bytes": True},
    ],
)
def test_settings_are_checked(server: ScriptedServer, setting: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        quick_config(server, **setting)


# Unread futures


def unread(most: int, raises: bool = False, notice_after_s: float = 10.0) -> UnreadLimit:
    return UnreadLimit(
        most, raises=raises, closing=threading.Event(), notice_after_s=notice_after_s
    )


def test_beyond_the_limit_a_call_waits_until_a_future_is_read() -> None:
    limit = unread(2)
    limit.acquire("sample")
    limit.acquire("sample")
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(limit.acquire, "sample")
        with pytest.raises(concurrent.futures.TimeoutError):
            third.result(0.02)
        limit.release()
        third.result(PATIENCE_S)
    assert limit._count == 2


def test_beyond_the_limit_a_call_raises_if_requested() -> None:
    limit = unread(1, raises=True)
    limit.acquire("sample")
    with pytest.raises(BackpressureError, match="max_unread = 1") as caught:
        limit.acquire("optim_step")
    assert "optim_step was not submitted" in str(caught.value)
    assert caught.value.retryable
    limit.release()
    limit.acquire("sample")


def test_a_wait_for_reads_is_reported_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    limit = unread(1, notice_after_s=0.002)
    limit.acquire("sample")
    with (
        caplog.at_level(logging.WARNING, "tinkex._transport.limits"),
        ThreadPoolExecutor(1) as pool,
    ):
        second = pool.submit(limit.acquire, "sample")
        wait_until(lambda: "sample has waited for" in caplog.text, "it is logged")
        limit.release()
        second.result(PATIENCE_S)
    assert "1 results are unread (max_unread = 1)" in caplog.text


def test_a_thread_that_may_be_waiting_for_itself_gets_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another thread may still read, which cannot be known, so this is not an error."""
    limit = unread(1, notice_after_s=0.002)

    def submit_two() -> None:
        limit.acquire("sample")
        limit.acquire("sample")

    with caplog.at_level(logging.WARNING, "tinkex._transport.limits"):
        alone = threading.Thread(target=submit_two, name="alone", daemon=True)
        alone.start()
        wait_until(lambda: "sample has waited for" in caplog.text, "it is logged")
        assert "Only this thread, alone, has submitted requests" in caplog.text
        assert "it waits forever. Read some with result()" in caplog.text
        assert alone.is_alive()
        limit.release()  # another thread has read after all
        alone.join(PATIENCE_S)
        assert not alone.is_alive()
        caplog.clear()
        with ThreadPoolExecutor(1) as pool:
            third = pool.submit(limit.acquire, "sample")
            wait_until(lambda: "sample has waited for" in caplog.text, "it is logged")
            limit.release()
            third.result(PATIENCE_S)
        assert "for ever" not in caplog.text  # two threads submit, so another one can read


def test_closing_ends_every_wait_for_reads() -> None:
    limit = unread(1)
    limit.acquire("sample")
    with ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(limit.acquire, "sample") for _ in range(3)]
        limit._closing.set()
        limit.wake()
        for wait in waits:
            with pytest.raises(ClientClosedError):
                wait.result(PATIENCE_S)


def test_two_hundred_threads_never_exceed_the_limit() -> None:
    limit = unread(7)
    lock = threading.Lock()
    inside, most = 0, 0

    def work() -> bool:
        nonlocal inside, most
        for _ in range(10):
            limit.acquire("sample")
            with lock:
                inside += 1
                most = max(most, inside)
            with lock:
                inside -= 1
            limit.release()
        return True

    assert race(*[work] * 200) == [True] * 200
    assert most <= 7
    with limit._lock:
        limit._count_released_locked()
    assert limit._count == 0


def test_a_future_counts_as_read_by_result_by_a_callback_or_when_collected(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    with ServiceClient(base_url=server.url, max_unread=1, on_backpressure="raise") as service:
        sampler = service.create_sampling_client(base_model="base")
        first = sampler.sample(PROMPT)
        with pytest.raises(BackpressureError):
            sampler.sample(PROMPT)
        first.result(PATIENCE_S)
        first.result(PATIENCE_S)  # reading it counts once
        second = sampler.sample(PROMPT)
        with pytest.raises(BackpressureError):
            sampler.sample(PROMPT)
        reported = threading.Event()
        second.add_done_callback(lambda future: reported.set())
        assert reported.wait(PATIENCE_S)
        third = sampler.sample(PROMPT)
        wait_until(third.done, "it is done")
        wait_until(lambda: not service.inflight(), "nothing else holds it")
        with pytest.raises(BackpressureError):
            sampler.sample(PROMPT)
        del third

        def dropped() -> bool:
            gc.collect()
            try:
                sampler.sample(PROMPT).result(PATIENCE_S)
            except BackpressureError:
                return False
            return True

        wait_until(dropped, "the place of what was dropped is free")
    assert len(routes.submitted("asample")) == 4


def test_the_parts_of_a_batch_do_not_count_as_unread_futures(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    routes.serve("client/config", Answer(body={"fwdbwd_max_chunk_len": 1}))
    with ServiceClient(base_url=server.url, max_unread=1, on_backpressure="raise") as service:
        trainer = service.create_lora_training_client("base")
        combined = trainer.forward_backward(BATCH * 3, "cross_entropy")
        assert len(combined.result(PATIENCE_S).loss_fn_outputs) == 3
        trainer.optim_step(types.AdamParams()).result(PATIENCE_S)
    assert len(routes.submitted("forward_backward")) == 3


# 429


def test_after_a_back_off_few_requests_are_sent_at_a_time() -> None:
    clock = ManualClock()
    limiter = RateLimiter(clock)
    assert not limiter.throttled
    assert limiter.describe() is None
    limiter.back_off(5.0)
    assert limiter.describe() == "rate-limited by the server (429), 5.0 s to go"
    clock.advance(5.0)
    assert limiter.describe() == "after a 429, 10 requests at a time"
    for _ in range(10):
        limiter.acquire(lambda delay_s: None, never)
    with ThreadPoolExecutor(1) as pool:
        eleventh = pool.submit(limiter.acquire, lambda delay_s: None, never)
        wait_until(lambda: waiting(limiter._quota) == 1, "the eleventh waits")
        limiter.release()
        eleventh.result(PATIENCE_S)
    clock.advance(10.0)
    assert not limiter.throttled


def test_a_429_during_the_wait_for_a_slot_is_waited_out_too() -> None:
    clock = ManualClock()
    limiter = RateLimiter(clock)
    limiter.back_off(2.0)
    pauses: List[float] = []

    def pause(delay_s: float) -> None:
        pauses.append(delay_s)
        clock.advance(delay_s)
        if len(pauses) == 1:
            limiter.back_off(3.0)

    limiter.acquire(pause, never)
    assert pauses == [2.0, 3.0]


def test_few_requests_are_sent_concurrently_after_a_429(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    go = threading.Event()
    lock = threading.Lock()
    inside, most = 0, 0

    def accept(received: Received) -> Answer:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            full = inside == 10
        if full:
            go.set()
        go.wait(PATIENCE_S)
        with lock:
            inside -= 1
        return routes.accept(received)

    routes.serve("asample", Answer(429, headers={"Retry-After": "0.05"}), accept)
    with ServiceClient(base_url=server.url) as service:
        sampler = service.create_sampling_client(base_model="base")
        first = sampler.sample(PROMPT)
        limiter = service._runtime.transport.server.limiter
        wait_until(lambda: limiter.throttled, "the 429 was read")
        futures = [first] + [sampler.sample(PROMPT) for _ in range(39)]
        for future in futures:
            future.result(PATIENCE_S)
    assert most == 10


def test_a_429_is_raised_immediately_if_requested(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    slow = Answer(429, {"detail": "slow down"}, headers={"Retry-After": "30"})
    routes.serve("asample", slow)
    with ServiceClient(base_url=server.url, on_backpressure="raise") as service:
        sampler = service.create_sampling_client(base_model="base")
        first = sampler.sample(PROMPT).exception(PATIENCE_S)
        assert isinstance(first, RateLimitError)
        assert first.retry_after_s == 30.0
        second = sampler.sample(PROMPT).exception(PATIENCE_S)
        assert isinstance(second, RateLimitError)
        assert "was not sent" in str(second)
        assert second.retry_after_s is not None
        assert 20 < second.retry_after_s <= 30
    assert len(routes.submitted("asample")) == 1


def test_a_run_always_waits_after_a_429(server: ScriptedServer, routes: TinkerRoutes) -> None:
    routes.serve("optim_step", Answer(429, headers={"Retry-After": "0.02"}), routes.accept)
    with ServiceClient(base_url=server.url, on_backpressure="raise") as service:
        trainer = service.create_lora_training_client("base")
        trainer.optim_step(types.AdamParams()).result(PATIENCE_S)
    assert len(routes.submitted("optim_step")) == 2


def test_a_rate_limited_future_says_so_and_close_ends_it_immediately(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    routes.serve("asample", Answer(429, headers={"Retry-After": "50"}))
    with ServiceClient(base_url=server.url) as service:
        sampler = service.create_sampling_client(base_model="base")
        futures = [sampler.sample(PROMPT) for _ in range(30)]

        def reported() -> bool:
            return all("rate-limited" in (f.status().held_back or "") for f in futures)

        wait_until(reported, "every future says why")
    for future in futures:
        assert isinstance(future.exception(0), ClientClosedError)


# Batches and results


def test_batches_of_several_runs_share_a_quota(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    go = threading.Event()

    def held(received: Received) -> Answer:
        go.wait(PATIENCE_S)
        return routes.accept_pass(received)

    with ServiceClient(base_url=server.url, max_batch_bytes=1) as service:
        runs = [service.create_lora_training_client("base") for _ in range(2)]
        runs[0].forward_backward(BATCH, "cross_entropy").result(PATIENCE_S)  # settles the encoding
        routes.serve("forward_backward", held)
        first = runs[0].forward_backward(BATCH, "cross_entropy")
        server.wait_for("POST /api/v1/forward_backward", 2)
        second = runs[1].forward_backward(BATCH, "cross_entropy")
        wait_until(lambda: "training batches" in str(second.status()), "the second is held back")
        assert len(routes.submitted("forward_backward")) == 2
        go.set()
        for future in (first, second):
            future.result(PATIENCE_S)


LARGE = types.SamplingParams(max_tokens=1_000_000)


def test_large_results_are_fetched_one_at_a_time(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    go = threading.Event()
    fetches: List[str] = []

    def retrieve(received: Received) -> Answer:
        body = received.json()
        if body["allow_metadata_only"]:
            return Answer(body={"status": "complete_metadata", "response_payload_size": 9_000_000})
        fetches.append(body["request_id"])
        go.wait(PATIENCE_S)
        return routes.retrieve(received)

    with ServiceClient(base_url=server.url, max_result_bytes=1) as service:
        sampler = service.create_sampling_client(base_model="base")
        routes.serve("retrieve_future", retrieve)
        futures = [sampler.sample(PROMPT, 1, LARGE) for _ in range(3)]

        def held_back() -> int:
            return sum("large results: 9.0 MB of 0.0 MB" in str(f.status()) for f in futures)

        wait_until(lambda: held_back() == 2 and fetches != [], "two wait, and one is fetched")
        assert len(fetches) == 1
        go.set()
        for future in futures:
            assert future.result(PATIENCE_S).sequences[0].tokens == [5]
        assert service._runtime.resources.limits.results._used == 0
    assert len(fetches) == 3


def test_close_ends_a_wait_for_the_quota_at_once(
    server: ScriptedServer, routes: TinkerRoutes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_CHECK_INTERVAL_S", 3600.0)  # threads check only when woken
    with ServiceClient(base_url=server.url) as service:
        sampler = service.create_sampling_client(base_model="base")
        quota = service._runtime.resources.limits.samples
        quota.acquire(1 << 30, never)
        futures = [sampler.sample(PROMPT) for _ in range(5)]
        wait_until(lambda: waiting(quota) == 5, "all wait")
    assert waiting(quota) == 0
    for future in futures:
        assert isinstance(future.exception(0), ClientClosedError)
    assert routes.submitted("asample") == []
