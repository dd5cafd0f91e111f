"""Samples without the batch poller: a thread and a connection each, up to a firm cap."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, List

import pytest
from support.batch_routes import NEVER, POLL, open_poller, sample
from support.pending import ScriptedRequest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.threads import wait_until

from tinkex._results.poller import Poller
from tinkex._runtime.worker_pool import WorkerPool
from tinkex._transport.server_flags import ServerFlags, flags_for
from tinkex.futures import APIFuture
from tinkex.types import UntypedFuture


def result(received: Received) -> Answer:
    return Answer(body={"path": received.json()["request_id"]})


def workers() -> int:
    return sum(thread.name.startswith("tinkex-sample") for thread in threading.enumerate())


def test_there_are_never_more_threads_and_connections_than_the_cap(server: ScriptedServer) -> None:
    most = 0
    sent: List[str] = []

    def look(received: Received) -> Answer:
        nonlocal most
        most = max(most, workers())
        return result(received)

    server.on(POLL, look)
    names = [f"s{number}" for number in range(200)]
    for poller in open_poller(server, max_concurrent_samples=5):
        futures = [sample(poller, name, sent=sent) for name in names]
        assert [future.result(PATIENCE_S) for future in futures] == names
    assert most == 5
    asked_for_flags = 1
    assert server.connections <= 5 + asked_for_flags
    assert sorted(sent) == sorted(names)


def test_samples_begin_in_the_order_in_which_they_were_requested(server: ScriptedServer) -> None:
    sent: List[str] = []
    server.on(POLL, result)
    names = [f"s{number}" for number in range(50)]
    for poller in open_poller(server, max_concurrent_samples=1):
        futures = [sample(poller, name, sent=sent) for name in names]
        for future in futures:
            future.result(PATIENCE_S)
    assert sent == names


def test_a_sample_does_not_overtake_samples_that_wait_for_the_flags(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, go = threading.Event(), threading.Event()

    def flags_slowly(*args: Any, **how: Any) -> ServerFlags:
        flags = flags_for(*args, **how)
        known.set()
        assert go.wait(PATIENCE_S)
        return flags

    monkeypatch.setattr("tinkex._results.poller.flags_for", flags_slowly)
    sent: List[str] = []
    server.on(POLL, result)
    for poller in open_poller(server, max_concurrent_samples=1):
        futures = [sample(poller, "first", sent=sent)]
        assert known.wait(PATIENCE_S)
        futures.append(sample(poller, "second", sent=sent))
        go.set()
        for future in futures:
            future.result(PATIENCE_S)
    assert sent == ["first", "second"]


def test_the_last_waiting_sample_is_not_passed_over(server: ScriptedServer) -> None:
    """Waiting samples get their turn before any that come after them."""
    go = threading.Event()
    sent: List[str] = []
    server.on(POLL, lambda received: dataclasses.replace(result(received), hold=go))
    for poller in open_poller(server, max_concurrent_samples=2):
        early = [sample(poller, f"early{number}", sent=sent) for number in range(20)]
        server.wait_for(POLL, 2)
        late: List[APIFuture[Any]] = []
        for future in early:  # a new sample arrives for each one that is done
            future.on_settled(lambda f: late.append(sample(poller, f"late{len(late)}", sent=sent)))
        go.set()
        for future in early:
            future.result(PATIENCE_S)
        wait_until(lambda: len(late) == 20, "all came")
        for future in list(late):
            future.result(PATIENCE_S)
    assert {name[:5] for name in sent[:20]} == {"early"}


def test_a_flag_can_lower_the_cap_but_not_raise_it_above_the_callers(
    server: ScriptedServer,
) -> None:
    go = threading.Event()
    server.on(POLL, lambda received: dataclasses.replace(result(received), hold=go))
    accepted: List[str] = []

    def choose(poller: Poller, name: str, most: int) -> APIFuture[Any]:
        future: APIFuture[Any] = poller.new_future("sample")

        def send(channel: Any) -> UntypedFuture:
            accepted.append(name)
            return UntypedFuture(name)

        request = ScriptedRequest(future, lambda reply: str(reply.json()["path"]), send)
        poller._choose(request, ServerFlags(sample_max_concurrent_requests=most))
        return future

    for poller in open_poller(server, max_concurrent_samples=3):
        futures = [choose(poller, f"s{number}", most=2) for number in range(10)]
        server.wait_for(POLL, 2)
        assert (workers(), len(accepted)) == (2, 2)
        futures.append(choose(poller, "s10", most=1000))
        server.wait_for(POLL, 3)
        assert (workers(), len(accepted)) == (3, 3)
        futures.append(choose(poller, "s11", most=1))
        go.set()
        names = [f"s{number}" for number in range(12)]
        assert [future.result(PATIENCE_S) for future in futures] == names
        assert workers() <= 3
        assert poller._samples._workers.cap == 1


def test_idle_threads_and_their_connections_go_away(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    server.on(POLL, lambda received: dataclasses.replace(result(received), hold=go))
    for poller in open_poller(server, max_concurrent_samples=8):
        pool: WorkerPool = poller._samples._workers
        pool._state.idle_s = 0.02
        futures = [sample(poller, f"s{number}") for number in range(8)]
        server.wait_for(POLL, 8)
        assert workers() == 8
        go.set()
        for future in futures:
            future.result(PATIENCE_S)
        wait_until(lambda: workers() == 0, "nobody idles")
        wait_until(lambda: server.open_connections() <= 1, "nor do their connections")
        assert sample(poller, "again").result(PATIENCE_S) == "again"  # new threads start again


def test_a_lowered_cap_ends_threads(server: ScriptedServer) -> None:
    server.on(POLL, Answer(hold=NEVER))
    for poller in open_poller(server, max_concurrent_samples=4):
        first = [sample(poller, f"s{number}") for number in range(4)]
        server.wait_for(POLL, 4)
        poller._samples._workers._state.idle_s = 0.02
        poller._samples._workers.resize(1)
        for future in first:
            future.cancel()
        wait_until(lambda: workers() == 0, "all are gone")
