"""Poller: settles futures against a real server, however it responds, and closes immediately."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, Callable, Iterator, List, Optional

import pytest
from support.clocks import ManualClock
from support.pending import ScriptedRequest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.threads import promptly, wait_until
from support.transports import open_resources

from tinkex._api._call import read
from tinkex._results import backoff, poll_loop
from tinkex._results.poller import Poller
from tinkex._runtime.worker_pool import WorkerPool
from tinkex._transport import billing
from tinkex._transport.request import Reply
from tinkex._transport.server_flags import ServerFlags
from tinkex.errors import (
    APIConnectionError,
    BillingError,
    ClientClosedError,
    InternalServerError,
    NoProgressError,
    NotFoundError,
    OperationTimeoutError,
    RequestFailedError,
    ResponseDecodeError,
    ResultExpiredError,
    SessionLostError,
    TinkexError,
)
from tinkex.futures import APIFuture
from tinkex.retry import MAX_DAMAGED
from tinkex.types import SaveWeightsResponse, UntypedFuture

POLL = "POST /api/v1/retrieve_future"
CANCEL = "POST /api/v1/cancel_future"
TRY_AGAIN = Answer(body={"type": "try_again", "request_id": "r", "queue_state": "active"})


def same(error: TinkexError) -> TinkexError:
    return error


@contextlib.contextmanager
def open_poller(
    server: ScriptedServer,
    explain: Callable[[TinkexError], TinkexError] = same,
    **settings: Any,
) -> Iterator[Poller]:
    """Yield a poller; at the end, close everything in the order in which a session does."""
    with open_resources(server, **settings) as resources:
        poller = Poller(resources, explain)
        try:
            yield poller
        finally:
            shut(poller)


def shut(poller: Poller) -> None:
    poller._transport.closing.set()
    poller.close(ClientClosedError("the client was closed"))
    poller._resources.abort()
    assert poller.join(time.monotonic() + PATIENCE_S) == []


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_BACKOFF_S", 0.002)


def decode_path(reply: Reply) -> str:
    return read(SaveWeightsResponse, reply, "save").path


def watch(
    poller: Poller,
    request_id: str = "r",
    lane: str = "model",
    decode: Callable[[Reply], Any] = decode_path,
    binary: bool = False,
) -> APIFuture[Any]:
    """Return a future of work that the server has accepted."""
    future = poller.new_future("save_state")
    future.enter("waiting", request_id)
    poller.watch(lane, ScriptedRequest(future, decode, binary=binary))
    return future


def by_request(answers: Any) -> Callable[[Received], Answer]:
    """Answer each poll by its request id."""
    return lambda received: answers[received.json()["request_id"]]


def result(path: str = "p") -> Answer:
    return Answer(body={"path": path})


def test_a_result_settles_the_future(server: ScriptedServer) -> None:
    server.on(POLL, result("tinker://r/weights/a"))
    with open_poller(server) as poller:
        future = watch(poller, "r-1")
        assert future.result(PATIENCE_S) == "tinker://r/weights/a"
        assert poller.inflight() == []
    assert server.requests()[0].json() == {"request_id": "r-1"}
    assert future.attempts == 1


@pytest.mark.parametrize(
    ("binary", "accept"),
    [(True, "application/x-protobuf, application/json"), (False, "application/json")],
)
def test_protobuf_is_requested_for_results_that_may_have_it(
    server: ScriptedServer, binary: bool, accept: str
) -> None:
    server.on(POLL, result())
    with open_poller(server) as poller:
        watch(poller, binary=binary).result(PATIENCE_S)
    assert server.requests()[0].headers["accept"] == accept


def test_pending_work_is_requested_again_and_its_state_shown(server: ScriptedServer) -> None:
    release = threading.Event()
    paused = {"type": "try_again", "queue_state": "paused_capacity", "queue_state_reason": "full"}
    finished = Answer(body={"path": "p"}, hold=release)
    server.on(POLL, TRY_AGAIN, Answer(408), Answer(body=paused), finished)
    with open_poller(server) as poller:
        future = watch(poller)
        server.wait_for(POLL, 4)
        assert poller.inflight() == [future]
        status = future.status()
        assert (status.state, status.request_id, status.attempts) == ("waiting", "r", 4)
        assert (status.queue_state, status.queue_state_reason) == ("paused_capacity", "full")
        release.set()
        assert future.result(PATIENCE_S) == "p"


def test_a_server_that_reports_pending_at_once_is_not_polled_without_pauses(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backoff.random, "random", lambda: 0.5)
    server.on(POLL, *[Answer(408)] * 3, *[TRY_AGAIN] * 2, result())
    with open_poller(server) as poller:
        watch(poller).result(PATIENCE_S)
    at = [r.at for r in server.requests()]
    gaps = [later - earlier for earlier, later in zip(at, at[1:])]
    for gap, least in zip(gaps, (0.02, 0.03, 0.045, 0.0675, 0.101)):
        assert gap >= least * 0.95


def test_temporary_trouble_is_retried_and_shown(server: ScriptedServer) -> None:
    release = threading.Event()
    server.on(
        POLL,
        Answer(503, {"detail": "restarting"}),
        Answer(reset=True),
        Answer(429),
        Answer(500, b"Internal Server Error", content_type="text/plain", close_after=True),
        Answer(502, {"detail": "bad gateway"}),
        Answer(body={"path": "p"}, hold=release),
    )
    with open_poller(server) as poller:
        future = watch(poller)
        server.wait_for(POLL, 6)
        assert "bad gateway" in (future.status().last_error or "")
        release.set()
        assert future.result(PATIENCE_S) == "p"


def test_after_trouble_the_poller_backs_off(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backoff, "FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(backoff.random, "random", lambda: 1.0)
    server.on(POLL, *[Answer(503)] * 3, result())
    with open_poller(server) as poller:
        watch(poller).result(PATIENCE_S)
    at = [r.at for r in server.requests()]
    for gap, least in zip([b - a for a, b in zip(at, at[1:])], (0.02, 0.04, 0.08)):
        assert gap >= least * 0.95


def test_retry_after_is_obeyed(server: ScriptedServer) -> None:
    server.on(POLL, Answer(503, headers={"Retry-After": "0.1"}), result())
    with open_poller(server) as poller:
        watch(poller).result(PATIENCE_S)
    first, second = server.requests()
    assert second.at - first.at >= 0.095


def test_the_same_500_several_times_in_a_row_fails_the_future(server: ScriptedServer) -> None:
    server.on(POLL, Answer(500, {"detail": "route is broken"}))
    with open_poller(server) as poller:
        with pytest.raises(InternalServerError, match="route is broken") as caught:
            watch(poller, "r-5").result(PATIENCE_S)
    assert len(server.requests()) == 5
    assert caught.value.attempts == 5
    assert caught.value.request_id == "r-5"


def test_failed_work_fails_the_future(server: ScriptedServer) -> None:
    server.on(POLL, Answer(body={"error": "no such loss", "category": "user"}))
    with open_poller(server) as poller, pytest.raises(RequestFailedError) as caught:
        watch(poller, "r-6").result(PATIENCE_S)
    assert (caught.value.category, caught.value.request_id) == ("user", "r-6")


def test_an_interrupted_tracer_leaves_no_future_and_no_unread_slot(
    server: ScriptedServer,
) -> None:
    class Interrupted:
        def operation(self, kind: str) -> None:
            raise KeyboardInterrupt

    with open_poller(server, max_unread=1, on_backpressure="raise") as poller:
        poller._transport.tracer = Interrupted()  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt) as caught:
            poller.new_future("sample", counted=True)
        assert poller.inflight() == []
        poller._transport.tracer = None
        poller.new_future("sample", counted=True)  # although a traceback holds the first
        assert caught.tb is not None


def test_the_session_may_explain_the_error(server: ScriptedServer) -> None:
    server.on(POLL, Answer(404, {"detail": "unknown"}))

    def explain(error: TinkexError) -> TinkexError:
        return SessionLostError("the session was lost")

    with open_poller(server, explain) as poller, pytest.raises(SessionLostError) as caught:
        watch(poller).result(PATIENCE_S)
    assert isinstance(caught.value.__cause__, NotFoundError)


@pytest.mark.parametrize("cut_off", [Answer(drop=True), Answer(body={"path": "x"}, cut_after=4)])
def test_a_404_after_an_interrupted_poll_means_that_the_result_is_gone(
    server: ScriptedServer, cut_off: Answer
) -> None:
    server.on(POLL, cut_off, Answer(404, {"detail": "unknown"}))
    with open_poller(server) as poller, pytest.raises(ResultExpiredError):
        watch(poller).result(PATIENCE_S)


def test_a_404_to_the_first_poll_is_not_found(server: ScriptedServer) -> None:
    server.on(POLL, Answer(404, {"detail": "unknown"}))
    with open_poller(server) as poller, pytest.raises(NotFoundError):
        watch(poller).result(PATIENCE_S)


@pytest.mark.parametrize(
    "answers",
    [[Answer(body={"wrong": "fields"})], [Answer(body=b'{"path": "p"')] * MAX_DAMAGED],
    ids=["wrong fields", "cut off, and again"],
)
def test_an_unreadable_response_fails_the_future(
    server: ScriptedServer, answers: List[Answer]
) -> None:
    server.on(POLL, *answers, result("next"))
    with open_poller(server) as poller:
        with pytest.raises(ResponseDecodeError):
            watch(poller).result(PATIENCE_S)
        assert watch(poller).result(PATIENCE_S) == "next"


@pytest.mark.parametrize("body", [b'{"path": "p"', b"\xff\xfe"], ids=["cut off", "garbled"])
def test_a_result_damaged_in_transit_is_requested_again(
    server: ScriptedServer, body: bytes
) -> None:
    server.on(POLL, Answer(body=body), result("intact"))
    with open_poller(server) as poller:
        assert watch(poller).result(PATIENCE_S) == "intact"


def test_a_404_after_a_damaged_result_means_the_result_is_gone(server: ScriptedServer) -> None:
    server.on(POLL, Answer(body=b'{"path": "p"'), Answer(404, {"detail": "unknown"}))
    with open_poller(server) as poller, pytest.raises(ResultExpiredError):
        watch(poller).result(PATIENCE_S)


def test_a_bug_while_decoding_fails_the_future_and_the_lane_continues(
    server: ScriptedServer,
) -> None:
    server.on(POLL, result())

    def decode(reply: Reply) -> Any:
        raise KeyError("a bug")

    with open_poller(server) as poller:
        first, second = watch(poller, decode=decode), watch(poller)
        with pytest.raises(KeyError):
            first.result(PATIENCE_S)
        assert second.result(PATIENCE_S) == "p"


# Large results


def test_an_announced_result_is_requested(server: ScriptedServer) -> None:
    announced = Answer(body={"status": "complete_metadata", "response_payload_size": 5_000_000})
    server.on(POLL, announced, result("large"))
    with open_poller(server) as poller:
        assert watch(poller, "r-1").result(PATIENCE_S) == "large"
    first, second = (r.json() for r in server.requests())
    assert first == {"request_id": "r-1"}
    assert second == {"request_id": "r-1", "allow_metadata_only": False}


def test_a_result_that_is_announced_forever_is_an_error(server: ScriptedServer) -> None:
    server.on(POLL, Answer(body={"status": "complete_metadata", "response_payload_size": 7}))
    with open_poller(server) as poller, pytest.raises(ResponseDecodeError, match="7 bytes"):
        watch(poller).result(PATIENCE_S)
    assert len(server.requests()) == 2


# Pauses


def test_the_pause_of_a_sampler_and_its_end_are_logged(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    paused = {
        "type": "try_again",
        "queue_state": "paused_rate_limit",
        "queue_state_reason": "quota",
    }
    server.on(POLL, Answer(body=paused), Answer(body=paused), result())
    with (
        caplog.at_level(logging.INFO, "tinkex._results.notices"),
        open_poller(server) as poller,
    ):
        future = poller.new_future("sample")
        request = ScriptedRequest(future, decode_path, lambda channel: UntypedFuture("r"))
        request.owner, request.pause_grace_s = "sampler s-1", 0.0
        poller.submit(request)
        future.result(PATIENCE_S)
        assert future.status().queue_state == "active"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "the server has paused sampler s-1: paused_rate_limit (quota)"),
        ("INFO", "sampler s-1 resumed"),
    ]


# Limits


def test_an_operation_that_takes_too_long_fails(server: ScriptedServer) -> None:
    server.on(POLL, Answer(hold=threading.Event()))
    with open_poller(server, operation_timeout_s=0.1) as poller:
        with pytest.raises(OperationTimeoutError) as caught:
            watch(poller, "r-7").result(PATIENCE_S)
    assert not isinstance(caught.value, NoProgressError)
    assert "operation_timeout_s = 0.1 s" in str(caught.value)
    assert caught.value.request_id == "r-7"


def test_an_operation_that_is_pending_for_too_long_fails(server: ScriptedServer) -> None:
    server.on(POLL, TRY_AGAIN)
    with open_poller(server, operation_timeout_s=0.1) as poller:
        with pytest.raises(OperationTimeoutError):
            watch(poller).result(PATIENCE_S)


def test_time_behind_others_in_the_lane_counts_but_a_finished_result_is_still_fetched(
    server: ScriptedServer,
) -> None:
    never = threading.Event()
    slow = [f"slow-{number}" for number in range(15)]
    server.on(
        POLL,
        by_request({**{name: Answer(hold=never) for name in slow}, "ready": result()}),
    )
    with open_poller(server, operation_timeout_s=0.7) as poller:
        futures, ready = [watch(poller, name) for name in slow], watch(poller, "ready")
        with promptly():  # it does not take 0.7 s for each
            for future in futures:
                with pytest.raises(OperationTimeoutError):
                    future.result(PATIENCE_S)
        assert ready.result(PATIENCE_S) == "p"


@pytest.mark.parametrize("answer", [Answer(hold=threading.Event()), Answer(drop=True)])
def test_after_too_long_a_silence_the_future_fails(server: ScriptedServer, answer: Answer) -> None:
    server.on(POLL, answer)
    with open_poller(server, no_progress_timeout_s=0.1) as poller:
        with pytest.raises(NoProgressError, match="no contact with the server") as caught:
            watch(poller).result(PATIENCE_S)
    assert caught.value.elapsed_s is not None
    assert caught.value.elapsed_s >= 0.1


def test_contact_keeps_a_slow_operation_alive(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock(time.monotonic())
    monkeypatch.setattr(poll_loop, "time", clock)

    def pending(_: Received) -> Answer:
        clock.advance(20.0)
        return Answer(408)

    server.on(POLL, *[pending] * 6, result())
    with open_poller(server, no_progress_timeout_s=25.0) as poller:
        assert watch(poller).result(PATIENCE_S) == "p"  # after 120 s in total


def test_an_outage_is_retried_until_the_time_limit(server: ScriptedServer) -> None:
    server.on(POLL, Answer(drop=True))
    with open_poller(server, max_outage_s=0.1) as poller:
        with pytest.raises(APIConnectionError, match=f"127.0.0.1:{server.port}") as caught:
            watch(poller, "r-8").result(PATIENCE_S)
    assert caught.value.request_id == "r-8"
    assert caught.value.elapsed_s is not None
    assert caught.value.elapsed_s >= 0.1


def test_a_gateway_that_fails_for_too_long_is_an_outage_too(server: ScriptedServer) -> None:
    server.on(POLL, Answer(503, {"detail": "no upstream"}))
    with open_poller(server, max_outage_s=0.1) as poller:
        with pytest.raises(InternalServerError, match="no upstream"):
            watch(poller).result(PATIENCE_S)
    assert len(server.requests()) > 2


def test_a_429_is_not_an_outage(server: ScriptedServer) -> None:
    server.on(POLL, *[Answer(429)] * 8, result())
    with open_poller(server, max_outage_s=0.01) as poller:
        assert watch(poller).result(PATIENCE_S) == "p"


def test_a_402_raises_at_once_by_default(server: ScriptedServer) -> None:
    server.on(POLL, Answer(402, {"detail": "top up"}))
    with open_poller(server) as poller, pytest.raises(BillingError, match="top up"):
        watch(poller).result(PATIENCE_S)


def test_a_402_is_waited_out_for_as_long_as_the_server_allows(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(billing, "PAUSE_S", 0.001)
    server.on(POLL, Answer(402, {"detail": "top up"}))
    with open_poller(server, on_billing="wait") as poller:
        flags = ServerFlags(billing_exception_max_pause_duration_sec=0.05)
        poller._transport.server.flags.static = flags
        with pytest.raises(BillingError, match="top up"):
            watch(poller).result(PATIENCE_S)
    assert len(server.requests()) > 2
    levels = [r.levelname for r in caplog.records if "pay" in r.getMessage()]
    assert levels == ["WARNING"]  # at most once a minute


def test_a_402_may_be_waited_out(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(billing, "PAUSE_S", 0.001)
    server.on(POLL, Answer(402), Answer(402), result())
    with open_poller(server, on_billing="wait") as poller:
        assert watch(poller).result(PATIENCE_S) == "p"


def test_a_poll_that_times_out_is_repeated(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server holds polls for longer than the client waits, which is no outage.
    hold = threading.Event()
    server.on(POLL, Answer(hold=hold), result())
    with open_poller(
        server, poll_timeout_s=1.2, connect_timeout_s=0.05, max_outage_s=0.1
    ) as poller:
        assert watch(poller).result(PATIENCE_S) == "p"
    hold.set()


# Lanes


def test_a_lane_is_polled_in_order_by_one_thread(server: ScriptedServer) -> None:
    release = threading.Event()
    held = Answer(body={"path": "a"}, hold=release)
    server.on(POLL, by_request({"a": held, "b": result("b"), "c": result("c")}))
    with open_poller(server) as poller:
        futures = [watch(poller, name) for name in "abc"]
        server.wait_for(POLL)
        assert [r.json()["request_id"] for r in server.requests()] == ["a"]
        release.set()
        assert [f.result(PATIENCE_S) for f in futures] == ["a", "b", "c"]
    assert [r.json()["request_id"] for r in server.requests()] == ["a", "b", "c"]
    assert {r.connection for r in server.requests()} == {0}


def test_lanes_do_not_wait_for_each_other(server: ScriptedServer) -> None:
    never = threading.Event()
    server.on(POLL, by_request({"stuck": Answer(hold=never), "free": result("free")}))
    with open_poller(server) as poller:
        stuck = watch(poller, "stuck", lane="one")
        server.wait_for(POLL)
        assert watch(poller, "free", lane="two").result(PATIENCE_S) == "free"
        assert not stuck.done()


def test_a_cancelled_head_does_not_hold_up_its_lane(server: ScriptedServer) -> None:
    server.on(POLL, by_request({"head": TRY_AGAIN, "next": result("next")}))
    with open_poller(server) as poller:
        head, following = watch(poller, "head"), watch(poller, "next")
        server.wait_for(POLL)
        assert head.cancel()
        assert following.result(PATIENCE_S) == "next"
        with pytest.raises(CancelledError):
            head.result(0)


def test_a_lane_that_ran_empty_is_polled_again(server: ScriptedServer) -> None:
    server.on(POLL, result())
    with open_poller(server) as poller:
        for _ in range(200):  # the next request arrives while the lane is being given up
            assert watch(poller).result(PATIENCE_S) == "p"
        wait_until(lambda: poller._lanes == {}, "the lane is gone")


def test_a_lane_that_cannot_start_a_thread_fails_and_works_again_later(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on(POLL, result())

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with open_poller(server) as poller:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            failed = watch(poller)
            unsent = sample(poller, "s", server)
        for future in (failed, unsent):
            with pytest.raises(ClientClosedError, match="can't start new thread"):
                future.result(PATIENCE_S)
        assert watch(poller).result(PATIENCE_S) == "p"


# Samples


def sample(
    poller: Poller,
    name: str,
    server: ScriptedServer,
    sent: Optional[List[str]] = None,
) -> APIFuture[Any]:
    future = poller.new_future("sample")

    def send(channel: Any) -> UntypedFuture:
        if sent is not None:
            sent.append(name)
        return UntypedFuture(name)

    poller.submit(ScriptedRequest(future, decode_path, send))
    return future


def test_samples_wait_in_parallel_each_on_its_own_connection(server: ScriptedServer) -> None:
    release = threading.Event()
    server.on(POLL, Answer(body={"path": "p"}, hold=release))
    with open_poller(server) as poller:
        futures = [sample(poller, f"s{i}", server) for i in range(24)]
        server.wait_for(POLL, 24)
        assert server.connections == 24
        release.set()
        assert [f.result(PATIENCE_S) for f in futures] == ["p"] * 24


def test_samples_finish_in_any_order(server: ScriptedServer) -> None:
    never = threading.Event()
    server.on(POLL, by_request({"slow": Answer(hold=never), "quick": result("quick")}))
    with open_poller(server) as poller:
        slow = sample(poller, "slow", server)
        assert sample(poller, "quick", server).result(PATIENCE_S) == "quick"
        assert not slow.done()


def test_samples_beyond_the_cap_wait_their_turn(server: ScriptedServer) -> None:
    release = threading.Event()
    server.on(POLL, Answer(body={"path": "p"}, hold=release))
    sent: List[str] = []
    with open_poller(server, max_concurrent_samples=2) as poller:
        futures = [sample(poller, f"s{i}", server, sent) for i in range(5)]
        server.wait_for(POLL, 2)
        assert sorted(sent) == ["s0", "s1"]
        assert [f.status().state for f in futures[2:]] == ["queued"] * 3
        futures[3].cancel()
        release.set()
        for index in (0, 1, 2, 4):
            assert futures[index].result(PATIENCE_S) == "p"
    assert sorted(sent) == ["s0", "s1", "s2", "s4"]  # the cancelled ones are not even sent


def test_a_sample_that_cannot_be_submitted_fails(server: ScriptedServer) -> None:
    with open_poller(server) as poller:
        future = poller.new_future("sample")

        def send(channel: Any) -> UntypedFuture:
            raise NotFoundError("no such sampler")

        poller.submit(ScriptedRequest(future, decode_path, send))
        with pytest.raises(NotFoundError, match="no such sampler"):
            future.result(PATIENCE_S)


def test_workers_keep_their_connections(server: ScriptedServer) -> None:
    server.on(POLL, result())
    with open_poller(server, max_concurrent_samples=1) as poller:
        for _ in range(10):
            sample(poller, "s", server).result(PATIENCE_S)
    assert server.connections == 1


# Cancelled samples


def cancels(poller: Poller) -> WorkerPool:
    """Return the threads that send cancel requests."""
    return poller._samples.cancels._pool


def wait_for_cancels(poller: Poller) -> None:
    state = cancels(poller)._state
    wait_until(
        lambda: state.backlog == 0 and state.idle == len(state.threads),
        "the cancels are dealt with",
    )


def cancellable(server: ScriptedServer, most: int = 64) -> None:
    """Have the server accept cancel requests."""
    body = {"sample_cancel_enabled": True, "sample_cancel_max_batch_size": most}
    server.on("POST /api/v1/client/dynamic_config", Answer(body=body))
    server.on(CANCEL, Answer())


def test_a_cancelled_sample_frees_its_worker_at_once(server: ScriptedServer) -> None:
    never = threading.Event()
    server.on(POLL, by_request({"stuck": Answer(hold=never), "next": result("next")}))
    with open_poller(server, max_concurrent_samples=1) as poller:
        stuck, following = sample(poller, "stuck", server), sample(poller, "next", server)
        server.wait_for(POLL)
        assert stuck.cancel()
        assert following.result(PATIENCE_S) == "next"  # the long poll would have lasted longer
        assert sample(poller, "next", server).result(PATIENCE_S) == "next"
    first, second, third = (r.connection for r in server.requests(POLL))
    assert first != second == third  # it keeps the new connection


def test_a_cancelled_sample_does_not_wait_out_its_back_off(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backoff, "FIRST_BACKOFF_S", 60.0)
    server.on(POLL, by_request({"failing": Answer(503), "next": result("next")}))
    with open_poller(server, max_concurrent_samples=1) as poller:
        failing, following = sample(poller, "failing", server), sample(poller, "next", server)
        server.wait_for(POLL)
        wait_until(lambda: failing.last_error is not None, "the trouble is noted")
        failing.cancel()
        assert following.result(PATIENCE_S) == "next"


def test_a_cancelled_head_frees_its_lane_at_once(server: ScriptedServer) -> None:
    never = threading.Event()
    server.on(POLL, by_request({"head": Answer(hold=never), "next": result("next")}))
    with open_poller(server) as poller:
        head, following = watch(poller, "head"), watch(poller, "next")
        server.wait_for(POLL)
        assert head.cancel()
        assert following.result(PATIENCE_S) == "next"


def test_a_cancelled_head_is_not_passed_to_the_failure_handler(server: ScriptedServer) -> None:
    never = threading.Event()
    server.on(POLL, by_request({"head": Answer(hold=never), "next": result("next")}))
    appeals: List[Any] = []
    with open_poller(server) as poller:
        head = poller.new_future("optim_step")
        head.enter("waiting", "head")
        poller.watch("model", ScriptedRequest(head, decode_path, on_failure=appeals.append))
        following = watch(poller, "next")
        server.wait_for(POLL)
        assert head.cancel()
        assert following.result(PATIENCE_S) == "next"
    assert appeals == []


def test_cancels_race_results_and_every_worker_continues(server: ScriptedServer) -> None:
    server.on(POLL, result())
    with open_poller(server, max_concurrent_samples=4) as poller:
        for _ in range(100):
            futures = [sample(poller, "s", server) for _ in range(4)]
            for future in futures:
                future.cancel()
            for future in futures:
                assert future.cancelled() or future.result(PATIENCE_S) == "p"
        assert [sample(poller, "s", server).result(PATIENCE_S) for _ in range(8)] == ["p"] * 8


def test_cancelled_samples_are_reported_to_the_server_if_it_sets_the_flag(
    server: ScriptedServer,
) -> None:
    cancellable(server)
    server.on(POLL, Answer(hold=threading.Event()))
    with open_poller(server) as poller:
        futures = [sample(poller, f"s{i}", server) for i in range(20)]
        lane = watch(poller, "a training request")
        server.wait_for(POLL, 21)
        for future in futures:
            future.cancel()
        lane.cancel()
        told = server.wait_for(CANCEL, 20)
        assert sorted(r.json()["request_id"] for r in told) == sorted(f"s{i}" for i in range(20))
    assert len(server.requests(CANCEL)) == 20  # only samples can be cancelled
    assert len(server.requests("POST /api/v1/client/dynamic_config")) == 1


def test_no_more_cancel_requests_are_in_flight_than_the_server_allows(
    server: ScriptedServer,
) -> None:
    cancellable(server, most=1)
    release = threading.Event()
    server.on(CANCEL, Answer(hold=release), Answer())
    server.on(POLL, Answer(hold=threading.Event()))
    with open_poller(server) as poller:
        futures = [sample(poller, f"s{i}", server) for i in range(5)]
        server.wait_for(POLL, 5)
        for future in futures:
            future.cancel()
        server.wait_for(CANCEL)
        wait_until(
            lambda: cancels(poller).waiting == 4 and cancels(poller)._state.idle == 0,
            "the others wait for the first",
        )
        assert len(server.requests(CANCEL)) == 1
        release.set()
        server.wait_for(CANCEL, 5)


@pytest.mark.parametrize("answer", [Answer(404), Answer(body={"sample_cancel_enabled": False})])
def test_no_cancel_requests_are_sent_without_the_flag(
    server: ScriptedServer, answer: Answer
) -> None:
    server.on("POST /api/v1/client/dynamic_config", answer)
    server.on(POLL, Answer(hold=threading.Event()))
    with open_poller(server) as poller:
        for number in range(3):
            future = sample(poller, f"s{number}", server)
            server.wait_for(POLL, number + 1)
            future.cancel()
        server.wait_for("POST /api/v1/client/dynamic_config")
        wait_for_cancels(poller)
    assert server.requests(CANCEL) == []


def test_a_server_without_the_cancel_route_gets_no_further_requests(server: ScriptedServer) -> None:
    cancellable(server)
    server.on(CANCEL, Answer(405))
    server.on(POLL, Answer(hold=threading.Event()))
    with open_poller(server) as poller:
        for number in range(3):
            future = sample(poller, f"s{number}", server)
            server.wait_for(POLL, number + 1)
            future.cancel()
            server.wait_for(CANCEL)
            wait_for_cancels(poller)
    assert len(server.requests(CANCEL)) == 1


def test_a_sample_cancelled_while_it_is_submitted_is_cancelled_on_the_server(
    server: ScriptedServer,
) -> None:
    cancellable(server)
    accepted = threading.Event()
    begun = threading.Event()
    with open_poller(server) as poller:
        future = poller.new_future("sample")

        def send(channel: Any) -> UntypedFuture:
            begun.set()
            assert accepted.wait(PATIENCE_S)
            return UntypedFuture("r-9")

        poller.submit(ScriptedRequest(future, decode_path, send))
        assert begun.wait(PATIENCE_S)
        assert future.cancel()
        accepted.set()
        assert [r.json() for r in server.wait_for(CANCEL)] == [{"request_id": "r-9"}]
    assert server.requests(POLL) == []


# Lost results of samples


def test_a_sample_with_a_lost_result_is_submitted_as_a_new_request(
    server: ScriptedServer,
) -> None:
    server.on(POLL, by_request({"s0": Answer(410), "s1": Answer(410), "s2": result("third")}))
    numbers = itertools.count()
    asked: List[int] = []

    def soon(times: int) -> float:
        asked.append(times)
        return 0.001

    with open_poller(server) as poller:
        future = poller.new_future("sample")

        def send(channel: Any) -> UntypedFuture:
            return UntypedFuture(f"s{next(numbers)}")

        poller.submit(ScriptedRequest(future, decode_path, send, retry_after_s=soon))
        assert future.result(PATIENCE_S) == "third"
    assert future.request_id == "s2"
    assert asked == [0, 1]


def test_a_lost_result_is_an_error_after_the_last_retry(server: ScriptedServer) -> None:
    server.on(POLL, Answer(410))
    with open_poller(server) as poller:
        with pytest.raises(ResultExpiredError):
            sample(poller, "s", server).result(PATIENCE_S)


def test_the_failure_handler_runs_before_the_future_settles_and_not_for_cancels(
    server: ScriptedServer,
) -> None:
    server.on(POLL, by_request({"bad": Answer(404), "gone": Answer(hold=threading.Event())}))
    reported: List[Any] = []

    def report(future: APIFuture[Any], error: BaseException) -> None:
        reported.append((future.done(), future.request_id, error))

    with open_resources(server) as resources:
        poller = Poller(resources, same, report)
        bad, gone = sample(poller, "bad", server), sample(poller, "gone", server)
        error = bad.exception(PATIENCE_S)
        server.wait_for(POLL, 2)
        gone.cancel()
        shut(poller)
    assert reported == [(False, "bad", error)]


# Close


def test_close_wakes_every_waiter_and_ends_long_polls_at_once(server: ScriptedServer) -> None:
    server.on(POLL, Answer(hold=threading.Event()))
    with open_poller(server, max_concurrent_samples=3) as poller, ThreadPoolExecutor(10) as pool:
        futures = [watch(poller, f"r{i}", lane=f"lane {i % 2}") for i in range(4)]
        futures += [sample(poller, f"s{i}", server) for i in range(6)]
        waiters = [pool.submit(f.exception, PATIENCE_S) for f in futures]
        server.wait_for(POLL, 5)
        with promptly():
            shut(poller)
            errors = [w.result(PATIENCE_S) for w in waiters]
    assert all(isinstance(error, ClientClosedError) for error in errors)
    assert poller.inflight() == []


def test_close_wakes_a_pause_between_polls(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backoff, "FIRST_BACKOFF_S", 60.0)
    monkeypatch.setattr(backoff, "LAST_BACKOFF_S", 60.0)
    server.on(POLL, Answer(503))
    with open_poller(server) as poller:
        watch(poller)
        server.wait_for(POLL)
        with promptly():
            shut(poller)


def test_a_closed_poller_refuses_new_work(server: ScriptedServer) -> None:
    with open_poller(server) as poller:
        shut(poller)
        with pytest.raises(ClientClosedError):
            poller.new_future("sample")


def test_callbacks_of_futures_settled_by_close_still_run(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.on(POLL, Answer(hold=threading.Event()))
    seen: List[Any] = []
    with caplog.at_level(logging.WARNING), open_poller(server) as poller:
        for index in range(5):
            future = watch(poller, f"r{index}")
            future.add_done_callback(lambda f: seen.append(type(f.exception())))
        shut(poller)
        assert seen == [ClientClosedError] * 5
    assert caplog.text == ""


def test_close_races_new_work_and_leaves_no_future_open(server: ScriptedServer) -> None:
    server.on(POLL, TRY_AGAIN)
    for _ in range(40):
        with open_poller(server) as poller, ThreadPoolExecutor(2) as pool:
            made: List[APIFuture[Any]] = []
            barrier = threading.Barrier(3)

            def submit(lane: str) -> None:
                barrier.wait(PATIENCE_S)
                try:
                    for _ in range(20):
                        made.append(watch(poller, lane=lane))
                        made.append(sample(poller, "s", server))
                except ClientClosedError:
                    pass

            jobs = [pool.submit(submit, lane) for lane in ("one", "two")]
            barrier.wait(PATIENCE_S)
            shut(poller)
            for job in jobs:
                job.result(PATIENCE_S)
            for future in made:
                assert isinstance(future.exception(PATIENCE_S), ClientClosedError)
