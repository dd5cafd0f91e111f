"""Batch poller: one long poll serves all samples of a sampler, and none is lost when it fails."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from concurrent.futures import CancelledError
from typing import Any, Iterator

import pytest
from support.batch_routes import (
    BATCH,
    CANCEL,
    NEVER,
    POLL,
    SAMPLER,
    at_last,
    bodies,
    done,
    open_poller,
    sample,
    shut,
    wants_batches,
)
from support.pending import ScriptedRequest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.threads import wait_until

from tinkex import ServiceClient, types
from tinkex._results import backoff, sampler_polls
from tinkex._results.pending import PendingRequest
from tinkex._results.poller import Poller
from tinkex._results.sampler_polls import CompletionTracker
from tinkex.errors import (
    APIConnectionError,
    BillingError,
    ClientClosedError,
    NoProgressError,
    OperationTimeoutError,
)
from tinkex.futures import APIFuture
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.settings import ClientFlags, ServerSettings
from tinkex.types import UntypedFuture

TARGET = {"type": "sampling_session", "sampling_session_id": "sampler", "cloned_sampler_id": 7}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_BACKOFF_S", 0.002)
    monkeypatch.setattr(sampler_polls, "ACKNOWLEDGE_AFTER_S", 0.01)


@pytest.fixture
def batches(server: ScriptedServer) -> ScriptedServer:
    wants_batches(server)
    return server


@pytest.fixture
def poller(batches: ScriptedServer) -> Iterator[Poller]:
    yield from open_poller(batches)


# Normal operation


def test_one_poll_waits_for_all_samples_and_fetched_results_are_reported(
    batches: ScriptedServer, poller: Poller
) -> None:
    go = threading.Event()
    first = dataclasses.replace(done("b", "a", cursor=5), hold=go)
    batches.on(BATCH, *at_last(first))
    futures = [sample(poller, name) for name in ("a", "b")]
    wait_until(lambda: all(f.status().state == "waiting" for f in futures), "both were accepted")
    batches.wait_for(BATCH)
    assert batches.requests(POLL) == []
    go.set()
    assert [future.result(PATIENCE_S) for future in futures] == ["a", "b"]
    wait_until(lambda: bodies(batches, BATCH)[-1]["prev_cursor"] == 5, "the cursor was reported")
    wait_until(
        lambda: (
            {n for b in bodies(batches, BATCH) for n in b["retrieved_request_ids"]} == {"a", "b"}
        ),
        "both were reported",
    )
    sent = bodies(batches, BATCH)
    assert sent[0] == {"target": TARGET, "prev_cursor": 0, "retrieved_request_ids": []}
    assert sent[-1]["timeout"] == 0.0
    fetches = bodies(batches, POLL)
    assert all(fetch["allow_metadata_only"] is False for fetch in fetches)
    assert len(fetches) == 2
    assert poller.inflight() == []


def test_idle_threads_end_and_no_further_polls_are_sent(
    batches: ScriptedServer, poller: Poller
) -> None:
    batches.on(BATCH, *at_last(done("a", cursor=1)))
    assert sample(poller, "a").result(PATIENCE_S) == "a"
    watch = poller._batches._samplers[SAMPLER]
    wait_until(lambda: not watch._polled, "no thread polls")
    assert watch._tracker.is_idle
    assert bodies(batches, BATCH)[-1]["retrieved_request_ids"] == ["a"]


def test_a_completion_that_arrives_before_its_acknowledgement_is_kept(
    batches: ScriptedServer, poller: Poller
) -> None:
    answered, reported = threading.Event(), threading.Event()

    def report(received: Received) -> Answer:
        assert answered.wait(PATIENCE_S)
        reported.set()
        return done("late", "a", cursor=2)

    batches.on(BATCH, *at_last(report))
    first = sample(poller, "a")
    batches.wait_for(BATCH)
    second = sample(poller, "late", before=reported)
    wait_until(lambda: second.status().state == "submitting", "it is being submitted")
    answered.set()
    assert first.result(PATIENCE_S) == "a"
    assert second.result(PATIENCE_S) == "late"


def test_a_cancelled_sample_is_reported_to_the_server_and_others_continue(
    batches: ScriptedServer, poller: Poller
) -> None:
    go = threading.Event()
    flags = {"sample_cancel_enabled": True}
    batches.on("POST /api/v1/client/dynamic_config", Answer(body=flags))
    batches.on(CANCEL, Answer())
    batches.on(BATCH, *at_last(dataclasses.replace(done("a", "b", cursor=2), hold=go)))
    gone, other = sample(poller, "a"), sample(poller, "b")
    wait_until(lambda: gone.request_id is not None and other.request_id is not None, "accepted")
    assert gone.cancel()
    assert [r.json() for r in batches.wait_for(CANCEL)] == [{"request_id": "a"}]
    go.set()
    assert other.result(PATIENCE_S) == "b"
    with pytest.raises(CancelledError):
        gone.result(0)
    assert [fetch["request_id"] for fetch in bodies(batches, POLL)] == ["b"]


def test_the_number_of_unanswered_samples_is_bounded(batches: ScriptedServer) -> None:
    go = threading.Event()

    def report(received: Received) -> Answer:
        cursor = received.json()["prev_cursor"]
        if "timeout" in received.json() or cursor == 2:  # a report, perhaps between the two
            return at_last()[0](received)
        name = "ab"[cursor]
        return dataclasses.replace(done(name, cursor=cursor + 1), hold=go)

    batches.on(BATCH, report)
    for poller in open_poller(batches, max_unanswered_samples=1):
        first, second = sample(poller, "a"), sample(poller, "b")
        batches.wait_for(BATCH)
        assert (first.status().state, second.status().state) == ("waiting", "queued")
        go.set()
        assert [f.result(PATIENCE_S) for f in (first, second)] == ["a", "b"]


# Trouble


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 501])
def test_after_a_refused_poll_samples_are_polled_for_individually(
    batches: ScriptedServer, poller: Poller, status: int
) -> None:
    batches.on(BATCH, Answer(status, {"detail": "no"}))
    assert sample(poller, "a").result(PATIENCE_S) == "a"
    assert sample(poller, "b").result(PATIENCE_S) == "b"
    assert len(batches.requests(BATCH)) == 1
    missing = poller._batches._server.missing_status(sampler_polls.ROUTE) is not None
    assert missing == (status in (404, 405, 501))


@pytest.mark.parametrize("body", [b"what?", b"[]", b'{"completions": 3, "cursor": 1}'])
def test_after_an_unreadable_response_samples_are_polled_for_individually(
    batches: ScriptedServer, poller: Poller, body: bytes
) -> None:
    batches.on(BATCH, Answer(body=body))
    assert sample(poller, "a").result(PATIENCE_S) == "a"


def test_a_bug_in_the_poller_loses_no_future(
    batches: ScriptedServer, poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError("a bug")

    batches.on(BATCH, *at_last(done("a", cursor=1)))
    monkeypatch.setattr(CompletionTracker, "note_completions", fail)
    assert sample(poller, "a").result(PATIENCE_S) == "a"


def test_temporary_trouble_is_waited_out(batches: ScriptedServer, poller: Poller) -> None:
    trouble = (Answer(503), Answer(429), Answer(408), Answer(reset=True), Answer(502))
    batches.on(BATCH, *at_last(*trouble, done("a", cursor=1)))
    assert sample(poller, "a").result(PATIENCE_S) == "a"
    assert {b["prev_cursor"] for b in bodies(batches, BATCH)[:6]} == {0}


def test_an_outage_fails_all_waiting_samples(batches: ScriptedServer) -> None:
    batches.on(BATCH, Answer(reset=True))
    for poller in open_poller(batches, max_outage_s=0.02):
        futures = [sample(poller, name) for name in ("a", "b")]
        errors = [future.exception(PATIENCE_S) for future in futures]
        assert [type(e) for e in errors] == [APIConnectionError] * 2
        assert [e.request_id for e in errors if isinstance(e, APIConnectionError)] == ["a", "b"]
        assert batches.requests(POLL) == []


def test_an_account_that_cannot_pay_fails_all_waiting_samples(
    batches: ScriptedServer, poller: Poller
) -> None:
    batches.on(BATCH, Answer(402))
    assert isinstance(sample(poller, "a").exception(PATIENCE_S), BillingError)


def test_a_sample_with_a_lost_result_is_submitted_again(
    batches: ScriptedServer, poller: Poller
) -> None:
    batches.on(BATCH, *at_last(done("a", cursor=1)))
    batches.on(POLL, Answer(410), Answer(body={"path": "again"}))
    future: APIFuture[Any] = poller.new_future("sample")
    poller.submit(
        ScriptedRequest(
            future,
            lambda reply: reply.json()["path"],
            lambda channel: UntypedFuture("a"),
            retry_after_s=lambda losses: 0.001,
            sampler=SAMPLER,
        )
    )
    assert future.result(PATIENCE_S) == "again"


def test_timeouts_apply(batches: ScriptedServer) -> None:
    batches.on(BATCH, Answer(hold=NEVER))
    for poller in open_poller(batches, operation_timeout_s=0.02):
        error = sample(poller, "a").exception(PATIENCE_S)
        assert isinstance(error, OperationTimeoutError)
        assert error.request_id == "a"
    for poller in open_poller(batches):
        error = sample(poller, "b", no_progress_s=0.02).exception(PATIENCE_S)
        assert isinstance(error, NoProgressError)


# The end


def test_close_wakes_all_waiters_at_once_and_reports_fetched_results(
    batches: ScriptedServer, poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_polls, "ACKNOWLEDGE_AFTER_S", PATIENCE_S)
    batches.on(BATCH, *at_last(done("a", cursor=1)))
    assert sample(poller, "a").result(PATIENCE_S) == "a"
    left = sample(poller, "never")
    wait_until(lambda: left.request_id is not None, "it was accepted")
    batches.wait_for(BATCH, 2)
    began = time.monotonic()
    shut(poller)
    assert time.monotonic() - began < PATIENCE_S / 2
    assert isinstance(left.exception(0), ClientClosedError)
    last = bodies(batches, BATCH)[-1]
    assert (last["prev_cursor"], last["timeout"]) == (1, 0.0)


# The bookkeeping of one sampler's samples


def request() -> PendingRequest[Any]:
    return ScriptedRequest(APIFuture("sample"))


def test_an_unclaimed_completion_is_acknowledged_once_no_submission_can_claim_it() -> None:
    tracker = CompletionTracker()
    tracker.note_completions(tracker.next_poll(), {"x": 1}, 4, begun=2)
    tracker.drop_unwanted(oldest=2)  # the second submission is still in flight
    assert tracker.next_poll().retrieved == ()
    tracker.drop_unwanted(oldest=3)
    assert tracker.next_poll() == (4, ("x",), False)


def test_a_completion_announced_twice_is_fetched_once_and_acknowledged_until_a_poll_succeeds() -> (
    None
):
    tracker, one = CompletionTracker(), request()
    tracker.expect("a", one)
    asked = tracker.next_poll()
    assert tracker.note_completions(asked, {"a": 3}, 1, begun=1) == [(one, 3)]
    assert tracker.note_completions(asked, {"a": 3}, 1, begun=1) == []
    tracker.drop_unwanted(oldest=9)
    assert tracker.next_poll().retrieved == ()  # still being fetched, so the server must keep it
    tracker.note_fetched("a")
    assert tracker.next_poll().retrieved == tracker.next_poll().retrieved == ("a",)
    tracker.note_completions(tracker.next_poll(), {}, 1, begun=1)
    assert tracker.is_idle


# With the embedded server


@pytest.fixture
def hosted() -> Iterator[LocalServer]:
    settings = ServerSettings(flags=ClientFlags(sample_use_retrieve_futures=True))
    engine = DeterministicEngine(vocab_size=1000, context_length=64)
    with LocalServer(engine, settings=settings) as running:
        yield running


def test_hundreds_of_samples_take_few_threads_and_leave_nothing_on_the_server(
    hosted: LocalServer,
) -> None:
    prompt, params = types.ModelInput.from_ints([1, 2, 3]), types.SamplingParams(max_tokens=2)
    with ServiceClient(base_url=hosted.url) as client:
        sampler = client.create_sampling_client(base_model="deterministic")
        sampler.sample(prompt, sampling_params=params).result(PATIENCE_S)
        futures = [sampler.sample(prompt, sampling_params=params) for _ in range(500)]
        names = [t.name for t in threading.enumerate() if t.name.startswith("tinkex-sample")]
        assert [len(f.result(PATIENCE_S).sequences[0].tokens) for f in futures] == [2] * 500
        assert names == []
        trackers = [w._tracker for w in client._runtime.poller._batches._samplers.values()]
        wait_until(lambda: all(tracker.is_idle for tracker in trackers), "all was reported")
        kept = [hosted._backend.futures.wait(f.request_id or "", 0) for f in futures]
        assert kept == [None] * 500


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_child_of_a_fork_gets_an_error_immediately(hosted: LocalServer) -> None:
    prompt = types.ModelInput.from_ints([1, 2, 3])
    with ServiceClient(base_url=hosted.url) as client:
        sampler = client.create_sampling_client(base_model="deterministic")
        sampler.sample(prompt).result(PATIENCE_S)
        child = os.fork()
        if child == 0:  # pragma: no cover
            try:
                sampler.sample(prompt)
            except ClientClosedError:
                os._exit(3)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert sampler.sample(prompt).result(PATIENCE_S).sequences
