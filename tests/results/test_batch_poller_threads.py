"""Batch poller: which work goes first, what a slow request may delay, and who polls for whom."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, Dict, Iterator, List

import pytest
from support.batch_routes import (
    BATCH,
    NEVER,
    POLL,
    SAMPLER,
    at_last,
    bodies,
    done,
    open_poller,
    sample,
    wants_batches,
)
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.threads import wait_until

from tinkex._results import backoff, batch_poller, sampler_polls
from tinkex._results.pending import SamplerId
from tinkex._results.poller import Poller
from tinkex._results.sampler_polls import SamplerPolls, Submissions
from tinkex.errors import ResultExpiredError


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


# Order


def test_fetching_results_goes_before_submitting_samples(
    batches: ScriptedServer, poller: Poller
) -> None:
    go, fetched = threading.Event(), threading.Event()
    names = [f"s{number}" for number in range(20)]
    accepted: List[str] = []

    def fetch(received: Received) -> Answer:
        fetched.set()
        return Answer(body={"path": received.json()["request_id"]}, hold=NEVER)

    batches.on(POLL, fetch)
    batches.on(BATCH, *at_last(dataclasses.replace(done(*names, cursor=20), hold=go)))
    for name in names:
        sample(poller, name)
    wait_until(
        lambda: all(f.status().state == "waiting" for f in poller.inflight()), "all were accepted"
    )
    assert len(poller.inflight()) == 20
    go.set()
    assert fetched.wait(PATIENCE_S)
    wait_until(lambda: len(bodies(batches, POLL)) == 2, "those that fetch are busy")
    later = [sample(poller, f"later{number}", sent=accepted) for number in range(10)]
    # Both threads that submit now fetch instead, because finished samples wait.
    wait_until(lambda: len(bodies(batches, POLL)) == 4, "all fetch")
    assert accepted == []
    assert {future.status().state for future in later} == {"queued"}


def test_fetching_threads_do_not_wait_for_a_single_result(
    batches: ScriptedServer, poller: Poller
) -> None:
    """A server that does not have some results after all must not hold up the others."""
    stuck = [f"stuck{number}" for number in range(10)]
    go, ready = threading.Event(), threading.Event()

    def fetch(received: Received) -> Answer:
        name = received.json()["request_id"]
        late = name in stuck and not ready.is_set()
        return Answer(408, {}) if late else Answer(body={"path": name})

    batches.on(POLL, fetch)
    completed = dataclasses.replace(done(*stuck, "quick", cursor=11), hold=go)
    batches.on(BATCH, *at_last(completed))
    held, quick = [sample(poller, name) for name in stuck], sample(poller, "quick")
    wait_until(lambda: all(f.request_id for f in (*held, quick)), "all were accepted")
    go.set()
    assert quick.result(PATIENCE_S) == "quick"
    assert not any(future.done() for future in held)
    wait_until(lambda: {"quick"} == reported(batches), "what was fetched is reported")
    ready.set()  # the server keeps the other results until they are fetched
    assert [future.result(PATIENCE_S) for future in held] == stuck
    wait_until(lambda: {*stuck, "quick"} == reported(batches), "now all is")


def reported(server: ScriptedServer) -> Any:
    return {name for body in bodies(server, BATCH) for name in body["retrieved_request_ids"]}


def test_a_result_whose_response_was_lost_is_reported_as_lost(
    batches: ScriptedServer, poller: Poller
) -> None:
    batches.on(POLL, Answer(reset=True), Answer(404, {"detail": "unknown request"}))
    batches.on(BATCH, *at_last(done("a", cursor=1)))
    assert isinstance(sample(poller, "a").exception(PATIENCE_S), ResultExpiredError)


def test_no_completions_are_requested_while_many_results_wait(
    batches: ScriptedServer, poller: Poller
) -> None:
    polls = SamplerPolls(SAMPLER, poller._resources, Submissions())
    assert poller._batches.fetch_soon(polls, []) == 0.0
    poller._batches._fetches._waiting.extend([print] * (batch_poller.MAX_UNFETCHED + 1))
    assert poller._batches.fetch_soon(polls, []) == batch_poller.UNFETCHED_PAUSE_S
    poller._batches._fetches._waiting.clear()


# Many samplers


def test_samples_of_samplers_beyond_the_cap_are_polled_for_individually(
    batches: ScriptedServer,
) -> None:
    """Samples don't wait for those of other samplers, which may never finish."""
    cap, more = batch_poller.POLL_CAP, 6
    go = threading.Event()

    def poll(received: Received) -> Answer:
        body = received.json()
        name = body["target"]["sampling_session_id"]
        if body["prev_cursor"] == 0 and not body["retrieved_request_ids"]:
            return dataclasses.replace(done(name, cursor=1), hold=go)
        return at_last()[0](received)

    batches.on(BATCH, poll)
    for poller in open_poller(batches):
        watched = [sample(poller, f"w{n}", sampler=SamplerId(f"w{n}")) for n in range(cap)]
        wait_until(lambda: len(bodies(batches, BATCH)) == cap, "the cap is reached")
        beyond = [sample(poller, f"b{n}", sampler=SamplerId(f"b{n}")) for n in range(more)]
        assert [future.result(PATIENCE_S) for future in beyond] == [f"b{n}" for n in range(more)]
        assert not any(future.done() for future in watched)
        go.set()
        assert [future.result(PATIENCE_S) for future in watched] == [f"w{n}" for n in range(cap)]
        assert polled_for(batches) == {f"w{n}" for n in range(cap)}
        # A sampler whose samples are done makes room, even for a sampler that was polled for
        # individually.
        wait_until(lambda: not poller._batches._samplers[SamplerId("w0")]._polled, "there is room")
        assert sample(poller, "b0", sampler=SamplerId("b0")).result(PATIENCE_S) == "b0"
        assert "b0" in polled_for(batches)


def polled_for(server: ScriptedServer) -> Any:
    targets: List[Dict[str, Any]] = [body["target"] for body in bodies(server, BATCH)]
    return {target["sampling_session_id"] for target in targets}
