"""Fault scripts: which request a fault strikes, and what the client then gets."""

from __future__ import annotations

import dataclasses
import http.client
import threading
import time
from typing import Any, Callable, Iterator, List, NamedTuple, Optional

import pytest
from support.threads import promptly, wait_until
from testing.test_fake_server import ADAM, DATA, new_run, train

from tinkex import ServiceClient
from tinkex.errors import BadRequestError, InvalidInputError, ResultExpiredError, SessionLostError
from tinkex.testing import Exchange, FakeServer, Reply, faults

HEALTH = "/api/v1/healthz"


class Received(NamedTuple):
    """The outcome of one request."""

    status: int
    content_type: Optional[str]
    retry_after: Optional[str]
    body: bytes


class Raw:
    """Plain HTTP, with a new connection for each request."""

    def __init__(self, server: FakeServer) -> None:
        self._address = server.url.rpartition("/")[2]

    def get(self, path: str = HEALTH) -> Received:
        connection = http.client.HTTPConnection(self._address, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            header = response.getheader
            return Received(
                response.status, header("Content-Type"), header("Retry-After"), response.read()
            )
        finally:
            connection.close()


@pytest.fixture
def raw(fake: FakeServer) -> Iterator[Raw]:
    return Raw(fake)


@pytest.fixture
def healthy(raw: Raw) -> Received:
    """The response without a fault."""
    received = raw.get()
    assert received.status == 200
    return received


# Which request


def test_a_fault_strikes_only_the_intended_calls(fake: FakeServer, raw: Raw) -> None:
    injection = fake.inject("healthz", faults.Status(503), call=2, times=2)
    assert [raw.get().status for _ in range(4)] == [200, 503, 503, 200]
    assert len(injection.struck) == 2


def test_calls_are_counted_from_the_injection_on(fake: FakeServer, raw: Raw) -> None:
    raw.get()
    fake.inject("healthz", faults.Status(503))
    assert [raw.get().status for _ in range(2)] == [503, 200]


def test_the_first_of_several_faults_strikes(fake: FakeServer, raw: Raw) -> None:
    fake.inject("healthz", faults.Status(501))
    fake.inject("healthz", faults.Status(502), times=2)
    assert [raw.get().status for _ in range(3)] == [501, 502, 200]


def test_a_fault_without_a_count_strikes_until_it_is_removed(fake: FakeServer, raw: Raw) -> None:
    injection = fake.inject("healthz", faults.Status(503), times=None)
    assert [raw.get().status for _ in range(3)] == [503] * 3
    injection.remove()
    injection.remove()
    assert raw.get().status == 200


@pytest.mark.parametrize(
    "route",
    ["healthz", "GET healthz", "/api/v1/healthz", "GET /api/v1/healthz", "*", "GET *", "health*"],
)
def test_patterns_that_match_a_route(fake: FakeServer, raw: Raw, route: str) -> None:
    fake.inject(route, faults.Status(503))
    assert raw.get().status == 503


@pytest.mark.parametrize("route", ["GET optim_step", "optim_steps", "POST healthz", "/healthz", ""])
def test_a_route_that_the_server_lacks_is_an_error(fake: FakeServer, route: str) -> None:
    with pytest.raises(InvalidInputError, match="no route"):
        fake.inject(route, faults.Drop())


@pytest.mark.parametrize(
    "route",
    [
        "optim_step",
        "sessions/*/finish",
        "sessions/abc/finish",
        "DELETE *",
        "POST /v1/*",
        "DELETE training_runs/*:train:0/checkpoints/weights/mine",
        "training_runs/*",
    ],
)
def test_routes_that_the_server_has(fake: FakeServer, route: str) -> None:
    fake.inject(route, faults.Drop())


@pytest.mark.parametrize("wrong", [{"call": 0}, {"times": 0}, {"call": -1}])
def test_calls_count_from_one(fake: FakeServer, wrong: Any) -> None:
    with pytest.raises(InvalidInputError, match="count from 1"):
        fake.inject("healthz", faults.Drop(), **wrong)


# What it does


def test_statuses(fake: FakeServer, raw: Raw) -> None:
    fake.inject("healthz", faults.Status(503))
    fake.inject("healthz", faults.Status(429, {"detail": "slow down"}, retry_after=1.5), call=2)
    fake.inject("healthz", faults.Status(502, "<html>Bad</html>", retry_after="soon"), call=3)
    fake.inject("healthz", faults.Status(500, b""), call=4)
    assert [raw.get() for _ in range(4)] == [
        (503, "application/json", None, b'{"detail": "injected"}'),
        (429, "application/json", "1.5", b'{"detail": "slow down"}'),
        (502, "text/html; charset=utf-8", "soon", b"<html>Bad</html>"),
        (500, None, None, b""),
    ]


def test_a_dropped_connection(fake: FakeServer, raw: Raw) -> None:
    fake.inject("healthz", faults.Drop())
    with pytest.raises(http.client.RemoteDisconnected):
        raw.get()


def test_a_connection_cut_midway(fake: FakeServer, raw: Raw, healthy: Received) -> None:
    fake.inject("healthz", faults.Cut())
    with pytest.raises(http.client.IncompleteRead) as caught:
        raw.get()
    assert caught.value.partial == healthy.body[: len(healthy.body) // 2]


def test_a_truncated_body(fake: FakeServer, raw: Raw, healthy: Received) -> None:
    fake.inject("healthz", faults.Truncate())
    assert raw.get().body == healthy.body[: len(healthy.body) // 2]


def test_a_garbled_body(fake: FakeServer, raw: Raw, healthy: Received) -> None:
    fake.inject("healthz", faults.Garble())
    assert bytes(byte ^ 0xFF for byte in raw.get().body) == healthy.body


def test_a_slow_trickle(fake: FakeServer, raw: Raw, healthy: Received) -> None:
    fake.inject("healthz", faults.Trickle(pause_s=0.002))
    before = time.monotonic()
    assert raw.get() == healthy
    assert time.monotonic() - before > 0.002 * 10


def test_latency(fake: FakeServer, raw: Raw, healthy: Received) -> None:
    fake.inject("healthz", faults.Latency(0.05))
    before = time.monotonic()
    assert raw.get() == healthy
    assert time.monotonic() - before > 0.045


@pytest.mark.parametrize("after_work", [False, True])
def test_a_held_request_waits_for_its_release(
    fake: FakeServer, service: ServiceClient, after_work: bool
) -> None:
    trainer = new_run(service)
    hold = fake.inject("optim_step", faults.Hold(after_work))
    step = trainer.optim_step(ADAM)
    request = hold.wait()
    assert request.path == "/api/v1/optim_step"
    if after_work:
        wait_until(lambda: fake.journal.executed_steps(trainer) == 1, "the step is done")
    else:
        assert fake.journal.executed_steps(trainer) == 0
    assert not step.done()
    hold.release()
    step.result()
    assert fake.journal.executed_steps(trainer) == 1


def test_waiting_for_a_fault_that_does_not_strike(fake: FakeServer) -> None:
    injection = fake.inject("optim_step", faults.Hold(), call=3)
    with pytest.raises(TimeoutError, match=r"call 3 of 'optim_step' has not arrived; 0 have"):
        injection.wait(0.01)


def test_a_lost_response_is_noticed_only_by_the_timeout(
    fake: FakeServer, service: ServiceClient
) -> None:
    trainer = new_run(service)
    lost = fake.inject("optim_step", faults.LoseResponse())
    before = time.monotonic()
    trainer.optim_step(ADAM).result()
    assert time.monotonic() - before > 0.9  # the client's read timeout is 1 s
    assert len(lost.struck) == 1
    assert fake.journal.executed_steps(trainer) == 1


def test_an_expired_result(fake: FakeServer, service: ServiceClient) -> None:
    trainer = new_run(service)
    train(trainer, 1)
    fake.inject("retrieve_future", faults.ExpireResult())
    with pytest.raises(ResultExpiredError):
        trainer.forward(DATA, "cross_entropy").result()
    train(trainer, 1)


def test_a_session_that_expires_at_a_call(fake: FakeServer, service: ServiceClient) -> None:
    trainer = new_run(service)
    fake.inject("optim_step", faults.ExpireSessions(), call=2)
    trainer.optim_step(ADAM).result()
    with pytest.raises(SessionLostError):
        trainer.optim_step(ADAM).result()


@pytest.mark.parametrize("keep_state", [True, False])
def test_a_restart_at_a_call(fake: FakeServer, service: ServiceClient, keep_state: bool) -> None:
    trainer = new_run(service)
    trainer.save_state("saved").result()
    fake.inject("optim_step", faults.Restart(keep_state=keep_state))
    with pytest.raises(SessionLostError):
        trainer.optim_step(ADAM).result()
    with ServiceClient(base_url=fake.url) as again:
        found = again.create_rest_client().list_user_checkpoints().result().checkpoints
        assert len(found) == keep_state


def test_a_restart_while_a_result_is_polled(fake: FakeServer, service: ServiceClient) -> None:
    trainer = new_run(service)
    train(trainer, 1)
    fake.inject("retrieve_future", faults.Restart(after_work=True))
    with pytest.raises(SessionLostError, match="no longer on the server"):
        trainer.optim_step(ADAM).result()


def test_a_refusal_by_a_gateway_leaves_the_run_usable(
    fake: FakeServer, service: ServiceClient
) -> None:
    trainer = new_run(service)
    fake.inject("optim_step", faults.Status(400))  # by a gateway: the server never saw it
    refused = trainer.optim_step(ADAM)
    with pytest.raises(BadRequestError, match="injected"):
        refused.result(10)
    passed, stepped = trainer.forward_backward(DATA, "cross_entropy"), trainer.optim_step(ADAM)
    passed.result(20)
    stepped.result(20)
    assert fake.journal.executed(trainer) == ["create", "forward_backward", "optim_step"]
    assert fake.journal.duplicates() == []


def test_failing_heartbeats(fake: FakeServer) -> None:
    with ServiceClient(base_url=fake.url, heartbeat_interval_s=0.02) as service:
        dead = fake.inject("session_heartbeat", faults.Drop(), times=None)
        wait_until(lambda: len(dead.struck) >= 3, "heartbeats go on")
        dead.remove()
        assert fake.live_sessions() == [service.session_id]


@pytest.mark.parametrize("fault", [faults.Hold(), faults.LoseResponse(), faults.Latency(60.0)])
def test_the_server_stops_promptly_while_it_holds_a_request(fault: Any) -> None:
    with FakeServer() as server:
        held = server.inject("healthz", fault)
        outcome: List[Any] = []

        def request() -> None:
            try:
                outcome.append(Raw(server).get())
            except (http.client.HTTPException, OSError) as error:
                outcome.append(error)

        thread = threading.Thread(target=request, daemon=True)
        thread.start()
        held.wait()
        with promptly():
            server.close()
    thread.join(10)
    assert isinstance(outcome[0], Exception)


# Faults of one's own


def test_a_function_is_a_fault(fake: FakeServer, raw: Raw, healthy: Received) -> None:
    def twice(exchange: Exchange) -> Reply:
        assert exchange.server is fake
        assert exchange.request.path == HEALTH
        reply = exchange.work()
        return dataclasses.replace(reply, body=reply.body * 2)

    fake.inject("healthz", twice)
    assert raw.get().body == healthy.body * 2


def test_a_fault_that_fails_is_reported_to_the_client_and_logged(
    fake: FakeServer, raw: Raw, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(exchange: Exchange) -> Reply:
        raise RuntimeError("a typo")

    fake.inject("healthz", broken)
    received = raw.get()
    assert received.status == 500
    assert b"RuntimeError: a typo" in received.body
    assert "a typo" in caplog.text


@pytest.mark.parametrize("fault", [503, None, "drop"])
def test_a_fault_must_be_callable(fake: FakeServer, fault: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"tinkex\.testing\.faults"):
        fake.inject("healthz", fault)


# Training through each of them

HARMLESS: List[Callable[[Exchange], Optional[Reply]]] = [
    faults.Latency(0.01),
    faults.Status(503, retry_after=0.01),
    faults.Status(429, retry_after=0.01),
    faults.Status(502, "<html></html>", after_work=True, retry_after=0.01),
    faults.Drop(),
    faults.Drop(after_work=True),
    faults.Cut(),
    faults.Trickle(0.001),
]


@pytest.mark.parametrize("fault", HARMLESS, ids=repr)
@pytest.mark.parametrize("route", ["optim_step", "forward_backward", "retrieve_future"])
def test_training_is_the_same_with_the_fault(
    fake: FakeServer, service: ServiceClient, route: str, fault: Any
) -> None:
    expected = train(new_run(service), 3)
    trainer = new_run(service)
    injection = fake.inject(route, fault, call=2)
    assert train(trainer, 3) == expected
    assert len(injection.struck) == 1
    assert fake.journal.executed_steps(trainer) == 3
