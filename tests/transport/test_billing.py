"""BillingPause: while the account cannot pay, all callers wait, but not forever."""

from __future__ import annotations

import logging
import threading
from typing import Any, Callable, List, Optional

import pytest
from support.clocks import ManualClock
from support.scripted_server import PATIENCE_S, Answer, ScriptedServer
from support.threads import race

from tinkex import ServiceClient
from tinkex._transport import billing
from tinkex._transport.billing import DEFAULT_LIMIT_S, PAUSE_S, BillingPause
from tinkex._transport.server_flags import ServerFlags
from tinkex.errors import APIConnectionError, BillingError


class Flags:
    """A sender whose server's flags give the limit that *find* returns."""

    def __init__(self, find: Callable[[], float]) -> None:
        self.find = find


@pytest.fixture(autouse=True)
def flags(monkeypatch: pytest.MonkeyPatch) -> None:
    real = billing.flags_for

    def flags_for(sender: Any) -> ServerFlags:
        if isinstance(sender, Flags):
            return ServerFlags(billing_exception_max_pause_duration_sec=sender.find())
        return real(sender)

    monkeypatch.setattr(billing, "flags_for", flags_for)


class Pause(BillingPause):
    """A pause whose limit *find* returns."""

    def __init__(self, clock: ManualClock, find: Callable[[], float]) -> None:
        super().__init__("host:80", clock)
        self.sender = Flags(find)

    def again(self) -> Optional[float]:
        return self.after_402(self.sender)  # type: ignore[arg-type]


def pause(clock: ManualClock, limit_s: float = 1000.0) -> Pause:
    return Pause(clock, lambda: limit_s)


def levels(caplog: pytest.LogCaptureFixture) -> List[str]:
    return [record.levelname for record in caplog.records]


def test_the_pause_lasts_until_the_limit_and_is_reported_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = ManualClock()
    found = pause(clock, limit_s=150.0)
    for _ in range(31):  # 0, 5, ... 150 seconds
        assert found.again() == PAUSE_S
        clock.advance(5.0)
    assert levels(caplog) == ["WARNING"] * 3  # at 0, 60 and 120 seconds
    assert found.again() is None
    assert found.again() is None
    clock.advance(60.0)
    assert found.again() is None
    assert levels(caplog)[3:] == ["ERROR"]


def test_a_402_long_after_the_last_one_begins_a_new_pause(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    found = pause(clock, limit_s=10.0)
    assert found.again() == PAUSE_S
    clock.advance(20.0)
    assert found.again() is None
    clock.advance(301.0)
    assert found.again() == PAUSE_S
    assert levels(caplog) == ["WARNING", "WARNING"]


def test_the_limit_is_requested_once_even_if_that_request_gets_402() -> None:
    clock = ManualClock()
    asked: List[int] = []

    def ask() -> float:
        asked.append(1)
        assert found.again() == PAUSE_S  # the request for the flags gets 402, too
        return 7.0

    found = Pause(clock, ask)
    assert found.after_402(None) == PAUSE_S
    assert asked == []
    race(*[found.again] * 8)
    clock.advance(8.0)
    assert found.again() is None
    assert asked == [1]


def test_without_a_response_the_limit_is_an_hour() -> None:
    clock = ManualClock()

    def fail() -> float:
        raise APIConnectionError("no answer")

    found = Pause(clock, fail)
    for _ in range(int(DEFAULT_LIMIT_S) // 60):
        assert found.again() == PAUSE_S
        clock.advance(60.0)
    assert found.again() == PAUSE_S
    clock.advance(1.0)
    assert found.again() is None


def test_submissions_and_polls_share_the_servers_limit(
    server: ScriptedServer, routes: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(billing, "PAUSE_S", 0.002)
    server.on(
        "POST /api/v1/client/config",
        Answer(body={"billing_exception_max_pause_duration_sec": 0.05}),
    )
    server.on("POST /api/v1/create_sampling_session", Answer(402, {"detail": "top up"}))
    with ServiceClient(base_url=server.url, on_billing="wait") as client:
        with pytest.raises(BillingError, match="top up"):
            client.create_sampling_client(base_model="base")
    assert len(server.requests("POST /api/v1/create_sampling_session")) > 2
    assert len(server.requests("POST /api/v1/client/config")) == 1


def test_a_close_ends_the_pause(
    server: ScriptedServer, routes: object, caplog: pytest.LogCaptureFixture
) -> None:
    server.on("POST /api/v1/create_sampling_session", Answer(402))
    with caplog.at_level(logging.ERROR):
        with ServiceClient(base_url=server.url, on_billing="wait") as client:
            future = client.create_sampling_client_future(base_model="base")
            server.wait_for("POST /api/v1/create_sampling_session")
            closer = threading.Thread(target=client.close)
            closer.start()
            assert future.exception(PATIENCE_S) is not None
            closer.join(PATIENCE_S)
