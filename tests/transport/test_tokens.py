"""Tokens: exchanged, renewed, resent once, shared; and no secret is shown."""

from __future__ import annotations

import base64
import itertools
import json
import logging
import math
import os
import pickle
import stat
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from hypothesis import given, strategies as st
from support.clocks import ManualClock
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.threads import promptly, wait_until
from support.tinker_routes import TinkerRoutes
from support.transports import open_transport, quick_config

import tinkex
from tinkex import auth
from tinkex._api.training import submit
from tinkex._runtime.clock import SystemClock
from tinkex._transport import credential_command
from tinkex._transport.credential_command import run_command
from tinkex._transport.request import Request
from tinkex._transport.server_state import state_of
from tinkex._transport.tokens import Token, TokenSource
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.credentials import CredentialsFile, StoredKey, read_claims
from tinkex.errors import (
    APIConnectionError,
    APIError,
    AuthenticationError,
    ClientClosedError,
    CredentialError,
    ResponseDecodeError,
    TinkexError,
)
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.settings import ServerSettings
from tinkex.retry import RetryPolicy

KEY = "tml-secret-4711"
CONFIG = "POST /api/v1/client/config"
TOKEN = "POST /api/v1/auth/token"
WORK = "POST /api/v1/asample"
SUBMIT = Request("POST", "/api/v1/asample", b'{"a":1}')
QUICK = RetryPolicy(base_s=0.001, cap_s=0.002, max_elapsed_s=5.0)
ONCE = RetryPolicy(max_elapsed_s=0.0)
INVALID = {"WWW-Authenticate": 'Bearer error="invalid_token", error_description="old"'}


def jwt(issued_at: float = 0.0, life_s: Optional[float] = 3600.0, **claims: Any) -> str:
    if life_s is not None:
        claims.update(iat=issued_at, exp=issued_at + life_s)
    parts = [json.dumps({"alg": "none"}), json.dumps(claims), "signature"]
    return ".".join(base64.urlsafe_b64encode(p.encode()).decode().rstrip("=") for p in parts)


class TokenServer:
    """Issues numbered tokens, and accepts them unless set to refuse them."""

    def __init__(self, server: ScriptedServer, clock: ManualClock) -> None:
        self.server = server
        self.clock = clock
        self.life_s: Optional[float] = 3600.0
        self.made: List[str] = []
        self.refused: List[str] = []
        self._numbers = itertools.count()
        server.on(CONFIG, Answer(body={"pjwt_auth_enabled": True}))
        server.on(TOKEN, self.exchange)
        server.on(WORK, self.work)

    def exchange(self, received: Received) -> Answer:
        number = next(self._numbers)
        self.made.append(jwt(self.clock.wall(), self.life_s, sub="me", n=number))
        return Answer(body={"jwt": self.made[-1]})

    def work(self, received: Received) -> Answer:
        given = received.headers["x-api-key"]
        if given in self.made and given not in self.refused:
            return Answer(body={"request_id": "r"})
        return Answer(401, {"detail": "not valid"}, headers=INVALID)

    def keys_of_work(self) -> List[str]:
        return [r.headers["x-api-key"] for r in self.server.requests(WORK)]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def mint(server: ScriptedServer, clock: ManualClock) -> TokenServer:
    return TokenServer(server, clock)


@pytest.fixture
def transport(server: ScriptedServer, clock: ManualClock) -> Iterator[Transport]:
    transport = Transport(quick_config(server, api_key=KEY), clock=clock)
    yield transport
    transport.closing.set()
    transport.abort()


def send(transport: Transport) -> None:
    assert transport.send(SUBMIT, QUICK).status == 200


# The exchange


def test_the_key_is_exchanged_once_and_the_token_sent_from_then_on(
    transport: Transport, mint: TokenServer
) -> None:
    for _ in range(3):
        send(transport)
    assert [r.headers["x-api-key"] for r in mint.server.requests(CONFIG)] == [KEY]
    (exchange,) = mint.server.requests(TOKEN)
    assert exchange.headers["x-api-key"] == KEY
    assert exchange.json() == {}
    assert mint.keys_of_work() == mint.made * 3


def test_without_the_flag_the_key_itself_is_sent(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(CONFIG, Answer(body={"pjwt_auth_enabled": False}))
    server.on(WORK, Answer())
    send(transport)
    assert server.requests(TOKEN) == []
    assert server.requests(WORK)[0].headers["x-api-key"] == KEY


def test_without_a_key_no_flags_are_requested_and_no_key_is_sent(server: ScriptedServer) -> None:
    server.on(WORK, Answer())
    with open_transport(server) as transport:
        send(transport)
    assert [r.path for r in server.requests()] == [SUBMIT.path]
    assert "x-api-key" not in server.requests()[0].headers


def test_a_server_that_sets_the_flag_but_lacks_the_token_route_gets_the_key(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(CONFIG, Answer(body={"pjwt_auth_enabled": True}))
    server.on(WORK, Answer())
    send(transport)
    send(transport)
    assert len(server.requests(TOKEN)) == 1
    assert {r.headers["x-api-key"] for r in server.requests(WORK)} == {KEY}


def test_fifty_threads_at_once_make_one_exchange(
    mint: TokenServer, server: ScriptedServer, clock: ManualClock
) -> None:
    hold = threading.Event()

    def slowly(received: Received) -> Answer:
        hold.wait(PATIENCE_S)
        return mint.exchange(received)

    server.on(TOKEN, slowly)
    barrier = threading.Barrier(51)
    transports = [Transport(quick_config(server, api_key=KEY), clock=clock) for _ in range(5)]

    def work(number: int) -> int:
        barrier.wait(PATIENCE_S)
        return transports[number % 5].send(SUBMIT, QUICK).status

    with ThreadPoolExecutor(50) as pool:
        working = [pool.submit(work, number) for number in range(50)]
        barrier.wait(PATIENCE_S)
        server.wait_for(TOKEN)
        hold.set()
        assert {future.result(PATIENCE_S) for future in working} == {200}
    assert len(server.requests(TOKEN)) == len(server.requests(CONFIG)) == 1
    for transport in transports:
        transport.abort()


def test_another_key_has_its_own_token(
    transport: Transport, mint: TokenServer, server: ScriptedServer
) -> None:
    send(transport)
    with open_transport(server, api_key="tml-another") as other:
        send(other)
    assert len(mint.made) == 2
    assert mint.keys_of_work() == mint.made


@pytest.mark.parametrize("trouble", [Answer(503), Answer(429), Answer(500), Answer(reset=True)])
def test_a_temporary_failure_of_the_exchange_counts_as_a_failed_attempt(
    transport: Transport, mint: TokenServer, server: ScriptedServer, trouble: Answer
) -> None:
    server.on(TOKEN, trouble, trouble, mint.exchange)
    send(transport)
    assert len(server.requests(TOKEN)) == 3
    assert len(server.requests(WORK)) == 1


def test_an_outage_of_the_exchange_is_a_connection_error_for_single_attempts(
    transport: Transport, mint: TokenServer, server: ScriptedServer
) -> None:
    server.on(TOKEN, Answer(503, {"detail": "busy"}))
    with pytest.raises(APIConnectionError, match=r"auth/token returned 503: busy") as caught:
        transport.send_once(SUBMIT)
    assert caught.value.retryable
    assert caught.value.status == 503


def test_a_refused_exchange_is_reported_unchanged(
    transport: Transport, mint: TokenServer, server: ScriptedServer
) -> None:
    server.on(TOKEN, Answer(401, {"detail": "unknown key"}))
    with pytest.raises(AuthenticationError, match=r"auth/token returned 401: unknown key"):
        transport.send(SUBMIT, QUICK)
    assert len(server.requests(TOKEN)) == 1
    assert server.requests(WORK) == []


@pytest.mark.parametrize(
    "body",
    [{}, {"jwt": ""}, {"jwt": 3}, {"jwt": None}, [], b"eyJ.not.json", {"jwt": "a\nb: c"}],
)
def test_a_response_without_a_token_is_a_typed_error_that_does_not_show_it(
    transport: Transport, mint: TokenServer, server: ScriptedServer, body: Any
) -> None:
    server.on(TOKEN, Answer(body=body))
    with pytest.raises(ResponseDecodeError, match="no token") as caught:
        transport.send(SUBMIT, QUICK)
    assert "eyJ" not in everything_about(caught.value)


def test_a_token_damaged_in_transit_is_requested_again(
    transport: Transport, mint: TokenServer, server: ScriptedServer
) -> None:
    server.on(TOKEN, Answer(body=b'{"jwt": "eyJ'), mint.exchange)
    send(transport)
    assert mint.keys_of_work() == mint.made


def test_a_token_that_is_not_a_jwt_is_valid_until_it_is_refused(
    transport: Transport, mint: TokenServer, server: ScriptedServer, clock: ManualClock
) -> None:
    server.on(TOKEN, Answer(body={"jwt": "opaque-1"}), Answer(body={"jwt": "opaque-2"}))
    mint.made += ["opaque-1", "opaque-2"]
    send(transport)
    clock.advance(1e9)
    send(transport)
    mint.refused.append("opaque-1")
    send(transport)
    assert mint.keys_of_work() == ["opaque-1"] * 3 + ["opaque-2"]


# A token's life


def test_when_a_token_is_renewed() -> None:
    for rand, renewed in ((0.0, 450.0), (0.5, 500.0), (1.0, 550.0)):
        token = Token.received(jwt(1000.0, 1000.0), 1003.0, rand)
        assert token.renew_at == pytest.approx(1000.0 + renewed)
        assert (token.urgent_at, token.expires_at) == (1940.0, 2000.0)


def test_a_short_lived_token_is_renewed_in_proportion_to_its_lifetime() -> None:
    token = Token.received(jwt(1000.0, 8.0), 1000.0, 0.5)
    assert (token.renew_at, token.urgent_at, token.expires_at) == (1004.0, 1006.0, 1008.0)


@pytest.mark.parametrize("skew_s", [-7200.0, 7200.0])
def test_a_wrong_clock_does_not_shorten_the_life_of_a_token(skew_s: float) -> None:
    now = 10_000.0 + skew_s
    token = Token.received(jwt(10_000.0, 3600.0), now, 0.5)
    assert token.expires_at is not None
    assert now < token.renew_at < token.expires_at == now + 3600.0


INSTANTS = st.floats(-1e12, 1e12) | st.integers(0, 2 * 10**9)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(
    st.text()
    | st.builds(
        lambda claims: jwt(life_s=None, **claims),
        st.fixed_dictionaries({}, optional=dict.fromkeys(("iat", "exp", "sub"), json_values)),
    )
    | st.builds(lambda iat, exp: jwt(life_s=None, iat=iat, exp=exp), INSTANTS, INSTANTS),
    st.floats(0, 1e10),
    st.floats(0, 1, exclude_max=True),
)
def test_any_text_may_be_a_token(text: str, now: float, rand: float) -> None:
    token = Token.received(text, now, rand)
    assert token.text == text
    assert token.renew_at <= token.urgent_at <= token.expires_at


def test_a_token_of_endless_depth_is_a_token() -> None:
    payload = base64.urlsafe_b64encode(b"[" * 100_000).decode()
    assert read_claims(f"eyJ.{payload}.s") is None


@pytest.mark.parametrize("text", [jwt(life_s=None), "opaque", "eyJ.x.y", "eyJ..", "a.b.c"])
def test_a_token_without_an_expiry_never_expires(text: str) -> None:
    token = Token.received(text, 5.0, 0.5)
    assert (token.renew_at, token.urgent_at, token.expires_at) == (math.inf, math.inf, math.inf)


def test_after_half_of_its_life_the_first_request_renews_the_token(
    transport: Transport, mint: TokenServer, clock: ManualClock
) -> None:
    send(transport)
    clock.advance(0.44 * 3600)
    send(transport)
    assert len(mint.made) == 1
    clock.advance(0.12 * 3600)
    send(transport)
    send(transport)
    first, second = mint.made
    assert mint.keys_of_work() == [first, first, second, second]


def test_other_requests_use_the_old_token_during_a_renewal(
    transport: Transport, mint: TokenServer, server: ScriptedServer, clock: ManualClock
) -> None:
    send(transport)
    hold = threading.Event()
    server.on(TOKEN, Answer(body={"jwt": jwt(clock.wall(), n="slow")}, hold=hold))
    clock.advance(0.6 * 3600)
    with ThreadPoolExecutor(1) as pool:
        renewing = pool.submit(transport.send, SUBMIT, QUICK)
        server.wait_for(TOKEN, 2)
        for _ in range(5):
            send(transport)  # while the renewal is still held up
        assert mint.keys_of_work() == mint.made * 6
        mint.made.append(jwt(clock.wall() - 0.6 * 3600, n="slow"))
        hold.set()
        assert renewing.result(PATIENCE_S).status == 200
    assert len(server.requests(TOKEN)) == 2


def test_a_failed_renewal_is_tried_again_after_a_minute(
    transport: Transport,
    mint: TokenServer,
    server: ScriptedServer,
    clock: ManualClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    send(transport)
    server.on(TOKEN, Answer(503, {"detail": "busy"}))
    clock.advance(0.6 * 3600)
    for _ in range(3):
        send(transport)
    assert len(server.requests(TOKEN)) == 2
    assert caplog.text.count("could not be renewed") == 1
    clock.advance(59.0)
    send(transport)
    assert len(server.requests(TOKEN)) == 2
    server.on(TOKEN, mint.exchange)
    clock.advance(1.0)
    send(transport)
    assert mint.keys_of_work() == mint.made[:1] * 5 + mint.made[1:]


def test_a_request_just_after_a_renewal_does_not_repeat_it(
    transport: Transport,
    mint: TokenServer,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send(transport)
    clock.advance(0.6 * 3600)
    flight = transport.server.tokens._flight
    run = flight.run

    def run_after_another(*args: Any) -> Any:
        monkeypatch.setattr(flight, "run", run)
        send(transport)  # also finds the token old, and renews it
        return run(*args)

    monkeypatch.setattr(flight, "run", run_after_another)
    send(transport)
    assert len(mint.made) == 2
    assert mint.keys_of_work() == [mint.made[0], mint.made[1], mint.made[1]]


def test_the_server_may_issue_the_same_token_again(
    transport: Transport, mint: TokenServer, server: ScriptedServer, clock: ManualClock
) -> None:
    send(transport)
    server.on(TOKEN, Answer(body={"jwt": mint.made[0]}))
    clock.advance(0.6 * 3600)
    send(transport)
    send(transport)
    assert mint.keys_of_work() == mint.made * 3


def test_in_the_last_minute_of_a_token_all_requests_wait_for_the_new_one(
    transport: Transport, mint: TokenServer, server: ScriptedServer, clock: ManualClock
) -> None:
    send(transport)
    clock.advance(3600 - 30)
    hold = threading.Event()

    def slowly(received: Received) -> Answer:
        hold.wait(PATIENCE_S)
        return mint.exchange(received)

    server.on(TOKEN, slowly)
    with ThreadPoolExecutor(8) as pool:
        working = [pool.submit(transport.send, SUBMIT, QUICK) for _ in range(8)]
        server.wait_for(TOKEN, 2)
        hold.set()
        assert {future.result(PATIENCE_S).status for future in working} == {200}
    assert mint.keys_of_work() == [mint.made[0]] + [mint.made[1]] * 8


@pytest.mark.parametrize("trouble", [Answer(503), Answer(403), Answer(body={})])
def test_in_the_last_minute_of_a_token_a_failed_renewal_keeps_the_old_one(
    transport: Transport,
    mint: TokenServer,
    server: ScriptedServer,
    clock: ManualClock,
    trouble: Answer,
) -> None:
    send(transport)
    server.on(TOKEN, trouble)
    clock.advance(3600 - 30)
    send(transport)
    send(transport)
    assert mint.keys_of_work() == mint.made * 3
    assert len(server.requests(TOKEN)) == 2  # not one for each request
    clock.advance(5.0)
    send(transport)
    assert len(server.requests(TOKEN)) == 3


def test_in_the_last_minute_of_a_token_a_rejected_key_is_reported(
    transport: Transport, mint: TokenServer, server: ScriptedServer, clock: ManualClock
) -> None:
    send(transport)
    server.on(TOKEN, Answer(401, {"detail": "revoked"}))
    clock.advance(0.6 * 3600)
    send(transport)  # the old token is still valid
    clock.advance(0.4 * 3600 - 30)
    with pytest.raises(AuthenticationError, match="revoked"):
        transport.send(SUBMIT, QUICK)


def test_an_expired_token_is_not_sent(
    transport: Transport, mint: TokenServer, server: ScriptedServer, clock: ManualClock
) -> None:
    send(transport)
    server.on(TOKEN, Answer(503))
    clock.advance(3601.0)
    with pytest.raises(APIConnectionError):
        transport.send(SUBMIT, ONCE)
    assert len(server.requests(WORK)) == 1
    server.on(TOKEN, mint.exchange)
    send(transport)
    assert mint.keys_of_work() == mint.made


def test_a_request_at_exit_does_not_renew_a_valid_token(
    transport: Transport, mint: TokenServer, server: ScriptedServer, clock: ManualClock
) -> None:
    send(transport)
    server.on(TOKEN, Answer(hold=threading.Event()))
    clock.advance(3600 - 30)
    farewell = Request("POST", SUBMIT.path, b"{}", read_timeout_s=2.0)
    with promptly():
        assert transport.send_once(farewell).status == 200
    assert len(server.requests(TOKEN)) == 1


def test_closing_wakes_a_client_that_waits_for_the_exchange_of_another(
    transport: Transport, mint: TokenServer, server: ScriptedServer
) -> None:
    hold = threading.Event()
    server.on(TOKEN, Answer(body={"jwt": jwt()}, hold=hold))
    with open_transport(server, api_key=KEY) as leader, ThreadPoolExecutor(2) as pool:
        leading = pool.submit(leader.send_once, SUBMIT)
        server.wait_for(TOKEN)
        waiting = pool.submit(transport.send, SUBMIT, QUICK)
        transport.closing.set()
        with pytest.raises(ClientClosedError):
            waiting.result(PATIENCE_S)
        assert not leading.done()
        hold.set()
        leading.result(PATIENCE_S)


# Refused tokens


def test_an_invalid_token_is_renewed_and_the_request_resent_once(
    transport: Transport, mint: TokenServer, server: ScriptedServer
) -> None:
    send(transport)
    mint.refused.append(mint.made[0])
    send(transport)
    _, refused, replayed = server.requests(WORK)
    assert (refused.body, refused.headers["x-idempotency-key"]) == (
        replayed.body,
        replayed.headers["x-idempotency-key"],
    )
    assert mint.keys_of_work() == [mint.made[0], mint.made[0], mint.made[1]]


def test_if_the_resent_request_is_refused_too_the_refusal_is_reported(
    transport: Transport, mint: TokenServer, server: ScriptedServer
) -> None:
    server.on(WORK, Answer(401, {"detail": "never"}, headers=INVALID))
    with pytest.raises(AuthenticationError, match="never"):
        transport.send(SUBMIT, QUICK)
    assert len(server.requests(WORK)) == 2
    assert len(server.requests(TOKEN)) == 2


@pytest.mark.parametrize(
    "headers", [{}, {"WWW-Authenticate": "Bearer"}, {"WWW-Authenticate": 'error="other"'}]
)
def test_any_other_401_is_final(
    transport: Transport, mint: TokenServer, server: ScriptedServer, headers: Dict[str, str]
) -> None:
    server.on(WORK, Answer(401, {"detail": "no"}, headers=headers))
    with pytest.raises(AuthenticationError):
        transport.send(SUBMIT, QUICK)
    assert len(server.requests(WORK)) == len(server.requests(TOKEN)) == 1


def test_fifty_refusals_at_once_make_one_exchange(
    transport: Transport, mint: TokenServer, server: ScriptedServer
) -> None:
    send(transport)
    mint.refused.append(mint.made[0])
    barrier = threading.Barrier(50)

    def work() -> int:
        barrier.wait(PATIENCE_S)
        return transport.send(SUBMIT, QUICK).status

    with ThreadPoolExecutor(50) as pool:
        working = [pool.submit(work) for _ in range(50)]
        assert {future.result(PATIENCE_S) for future in working} == {200}
    assert len(mint.made) == 2


def test_a_failed_exchange_after_a_refusal_is_reported(
    transport: Transport, mint: TokenServer, server: ScriptedServer
) -> None:
    send(transport)
    mint.refused.append(mint.made[0])
    server.on(TOKEN, Answer(403, {"detail": "suspended"}))
    with pytest.raises(TinkexError, match="suspended") as caught:
        transport.send(SUBMIT, QUICK)
    assert caught.value.status == 403


# A key that is a token


def test_a_token_given_as_the_key_is_sent_unchanged(
    server: ScriptedServer, clock: ManualClock
) -> None:
    given = jwt(clock.wall(), 60.0)
    TokenServer(server, clock)
    server.on(WORK, Answer())
    transport = Transport(quick_config(server, api_key=given), clock=clock)
    send(transport)
    assert [r.headers["x-api-key"] for r in server.requests()] == [given]
    clock.advance(60.0)
    with pytest.raises(CredentialError, match="expired") as caught:
        transport.send(SUBMIT, QUICK)
    assert len(server.requests()) == 1
    assert given not in everything_about(caught.value)
    transport.abort()


# Credential commands


def command_in(folder: Path, script: str) -> str:
    """Return a command that runs *script*, which may count its runs in the file ``runs``."""
    path = folder / "credential.py"
    path.write_text(f"import sys, os\nopen({str(folder / 'runs')!r}, 'a').write('x')\n{script}\n")
    return f'"{sys.executable}" "{path}"'


def runs(folder: Path) -> int:
    path = folder / "runs"
    return len(path.read_text()) if path.exists() else 0


def test_a_command_supplies_the_key_for_each_exchange(
    mint: TokenServer, server: ScriptedServer, clock: ManualClock, tmp_path: Path
) -> None:
    command = command_in(tmp_path, f"print('{KEY}')")
    transport = Transport(quick_config(server, credential_cmd=command), clock=clock)
    for _ in range(3):
        send(transport)
    assert {r.headers["x-api-key"] for r in server.requests(TOKEN)} == {KEY}
    before = runs(tmp_path)
    assert before == 2  # one for the flags, one for the exchange
    clock.advance(0.6 * 3600)
    send(transport)
    assert runs(tmp_path) == before + 1
    assert len(mint.made) == 2
    transport.abort()


def test_for_a_server_without_tokens_a_command_is_run_again_only_if_its_key_is_refused(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.on(WORK, Answer(), Answer(), Answer(401), Answer())
    command = command_in(tmp_path, "print('  tml-from-command  ')")
    with open_transport(server, credential_cmd=command) as transport:
        send(transport)
        before = runs(tmp_path)
        send(transport)
        with pytest.raises(AuthenticationError):
            transport.send(SUBMIT, QUICK)
        assert runs(tmp_path) == before
        send(transport)
        assert runs(tmp_path) == before + 1
    assert {r.headers["x-api-key"] for r in server.requests(WORK)} == {"tml-from-command"}


def test_a_flag_can_prefer_the_command_to_the_key(
    mint: TokenServer, server: ScriptedServer, tmp_path: Path
) -> None:
    flags = {"pjwt_auth_enabled": True, "credential_default_source": "credential_cmd"}
    server.on(CONFIG, Answer(body=flags))
    command = command_in(tmp_path, "print('tml-from-command')")
    with open_transport(server, api_key=KEY, credential_cmd=command) as transport:
        send(transport)
    assert server.requests(CONFIG)[0].headers["x-api-key"] == KEY
    assert server.requests(TOKEN)[0].headers["x-api-key"] == "tml-from-command"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('tml-half'); sys.exit(3)", "exit code 3"),
        ("pass", "printed nothing"),
        ("print('   ')", "printed nothing"),
        ("print('tml-one\\ntml-two')", "is not a key or token"),
        ("os.kill(os.getpid(), 9)", "exit code"),
    ],
)
def test_a_failing_command_is_reported_without_its_output(
    server: ScriptedServer,
    tmp_path: Path,
    script: str,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    command = command_in(tmp_path, f"print('tml-on-stderr', file=sys.stderr)\n{script}")
    with open_transport(server, credential_cmd=command) as transport:
        with pytest.raises(CredentialError, match=message) as caught:
            transport.send(SUBMIT, QUICK)
    assert server.requests() == []
    shown = everything_about(caught.value) + caplog.text
    assert "tml-" not in shown
    assert str(tmp_path) not in shown


def test_a_hanging_command_is_ended_with_its_child_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credential_command, "COMMAND_TIMEOUT_S", 0.3)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)

    def all_writers_are_gone() -> bool:
        try:
            return os.read(reader, 1) == b""
        except BlockingIOError:
            return False

    try:
        with promptly():
            with pytest.raises(CredentialError, match="longer than"):
                run_command(f"exec 9>'{fifo}'; sleep 60; echo tml-late", threading.Event())
            wait_until(all_writers_are_gone, "the shell and its sleep have ended")
    finally:
        os.close(reader)


def test_closing_ends_a_running_command() -> None:
    closing = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_command, "sleep 60", closing)
        closing.set()
        with pytest.raises(ClientClosedError):
            running.result(PATIENCE_S)


def test_an_expired_token_of_a_command_is_not_used(
    server: ScriptedServer, tmp_path: Path, clock: ManualClock
) -> None:
    old = jwt(clock.wall() - 100.0, 60.0)
    command = command_in(tmp_path, f"print('{old}')")
    transport = Transport(quick_config(server, credential_cmd=command), clock=clock)
    with pytest.raises(CredentialError, match="expired"):
        transport.send(SUBMIT, QUICK)
    assert server.requests() == []


# Where a key comes from


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TINKER_API_KEY", "TINKER_CREDENTIAL_CMD", "TINKER_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_order_of_the_sources(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config.resolve().api_key is None
    assert not auth.tinker_has_credentials()
    CredentialsFile().store_default("1", StoredKey("stored", "laptop"))
    assert Config.resolve().api_key == "stored"
    assert auth.get_tinker_token() == "stored"
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", "print-a-key")
    config = Config.resolve()
    assert (config.api_key, config.credential_cmd) == (None, "print-a-key")
    assert auth.tinker_has_credentials()
    monkeypatch.setenv("TINKER_API_KEY", "environment\n")
    assert Config.resolve().api_key == "environment"
    assert auth.get_tinker_token() == "environment"
    assert Config.resolve(api_key="argument").api_key == "argument"


def test_a_command_alone_counts_as_a_credential_and_is_not_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", command_in(home, "print('k')"))
    assert auth.tinker_has_credentials()
    assert auth.get_tinker_token() is None
    assert runs(home) == 0


def test_the_credentials_file_is_readable_by_its_owner_only_and_replaced_atomically(
    home: Path,
) -> None:
    file = CredentialsFile()
    file.store_default("1", StoredKey("first", "one"))
    file.store_default(
        "2", StoredKey("second", "two", "generated", "a note", {"user_details": {"email": "e"}})
    )
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700
    assert [path.name for path in file.path.parent.iterdir()] == ["credentials.json"]
    assert json.loads(file.path.read_text()) == {
        "version": 1,
        "default": "2",
        "keys": {
            "1": {"type": "manual", "key": "first", "name": "one"},
            "2": {
                "type": "generated",
                "key": "second",
                "name": "two",
                "note": "a note",
                "details": {"user_details": {"email": "e"}},
            },
        },
    }
    found = file.default()
    assert found == StoredKey(
        "second", "two", "generated", "a note", {"user_details": {"email": "e"}}
    )
    assert "second" not in repr(found)
    file.forget_default()
    assert file.default() is None
    assert list(json.loads(file.path.read_text())["keys"]) == ["1"]
    file.forget_default()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"keys": []}',
        '{"version": 2, "keys": {}}',
        '{"keys": {}, "default": "1"}',
        '{"keys": {"1": {}}, "default": "1"}',
        '{"keys": {"1": {"key": 3}}, "default": "1"}',
        '{"keys": {}, "default": 1}',
        "\udcff",
    ],
)
def test_a_broken_credentials_file_is_named_and_not_shown(home: Path, content: str) -> None:
    path = CredentialsFile().path
    path.parent.mkdir()
    path.write_bytes((content + " tml-hidden").encode("utf-8", "surrogateescape"))
    if content.endswith("}"):
        path.write_text(content)
    with pytest.raises(CredentialError, match=r"credentials\.json") as caught:
        Config.resolve()
    assert "tml-hidden" not in everything_about(caught.value)
    with pytest.raises(CredentialError):
        auth.get_tinker_token()
    assert Config.resolve(api_key="given").api_key == "given"


def test_an_explicit_environment_has_its_own_home(tmp_path: Path) -> None:
    assert Config.resolve(environ={}).api_key is None
    CredentialsFile(tmp_path / ".tinker" / "credentials.json").store_default("1", StoredKey("k"))
    assert Config.resolve(environ={"HOME": str(tmp_path)}).api_key == "k"


# The public functions


def test_whether_the_service_is_accessible(
    home: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    capabilities = "GET /api/v1/get_server_capabilities"
    server.on(capabilities, Answer(body={"supported_models": []}))
    tinkex.auth.raise_if_tinker_not_accessible()
    server.on(capabilities, Answer(503))
    with pytest.raises(APIError):
        auth.raise_if_tinker_not_accessible()
    assert len(server.requests(capabilities)) == 2
    server.on(capabilities, Answer(401))
    with pytest.raises(AuthenticationError):
        auth.raise_if_tinker_not_accessible()


def test_whoami_reads_the_tokens_claims(
    transport: Transport, mint: TokenServer, server: ScriptedServer
) -> None:
    text = jwt(mint.clock.wall(), sub="tml:user:7", org_id="9", email="a@b.c")
    server.on(TOKEN, Answer(body={"jwt": text}))
    found = auth.whoami(transport)
    assert (found.user_urn, found.org_urn, found.email) == (
        "tml:user:7",
        "tml:organization:9",
        "a@b.c",
    )
    assert len(server.requests()) == 2  # for flags and token; whoami sent nothing


def test_whoami_without_tokens_says_that_it_is_unknown(
    transport: Transport, server: ScriptedServer
) -> None:
    with pytest.raises(CredentialError, match="does not report who"):
        auth.whoami(transport)


# Against the embedded server


class Shifted:
    """Shifts the wall clock of the whole process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_s = 0.0
        monkeypatch.setattr(SystemClock, "wall", lambda _: time.time() + self.by_s)


@pytest.fixture
def shifted(monkeypatch: pytest.MonkeyPatch) -> Shifted:
    return Shifted(monkeypatch)


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """Record the tokens that clients got, in order."""
    got: List[str] = []
    exchange = TokenSource._exchange

    def counted(self: TokenSource, *args: Any) -> str:
        got.append(exchange(self, *args))
        return got[-1]

    monkeypatch.setattr(TokenSource, "_exchange", counted)
    return got


def test_a_training_loop_outlives_many_tokens(shifted: Shifted, exchanges: List[str]) -> None:
    settings = ServerSettings(api_key=KEY, jwt=True, jwt_lifetime_s=6.0)
    datum = tinkex.Datum(
        tinkex.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4], "weights": [1.0] * 3}
    )
    with LocalServer(DeterministicEngine(), settings=settings) as server:
        with tinkex.ServiceClient(base_url=server.url, api_key=KEY) as service:
            trainer = service.create_lora_training_client("deterministic", rank=4)
            for _ in range(8):
                shifted.by_s += 2.5
                step = trainer.forward_backward([datum], "cross_entropy")
                trainer.optim_step(tinkex.AdamParams(learning_rate=0.1))
                assert step.result(PATIENCE_S).metrics["loss:sum"] > 0
            shifted.by_s += 60.0  # as if the machine had slept
            sampler = trainer.save_weights_and_get_sampling_client()
            drawn = sampler.sample(
                tinkex.ModelInput.from_ints([1]), 4, tinkex.SamplingParams(max_tokens=2)
            )
            assert len(drawn.result(PATIENCE_S).sequences) == 4
    assert 4 <= len(exchanges) <= 20
    assert len(set(exchanges)) == len(exchanges)


def test_the_tokens_of_the_server_name_their_owner_and_expire(
    shifted: Shifted, exchanges: List[str]
) -> None:
    settings = ServerSettings(api_key=KEY, jwt=True, jwt_lifetime_s=100.0, org_id="mine")
    with LocalServer(DeterministicEngine(), settings=settings) as server:
        transport = Transport(Config.resolve(environ={}, base_url=server.url, api_key=KEY))
        assert auth.whoami(transport).org_urn == "tml:organization:mine"
        (token,) = exchanges
        claims = read_claims(token)
        assert claims is not None
        assert claims.subject == settings.owner_urn
        config = Config.resolve(environ={}, base_url=server.url, api_key=token)
        auth.check_access(config)
        shifted.by_s = 101.0
        with pytest.raises(CredentialError, match="expired"):
            auth.check_access(config)
        transport.abort()


@pytest.mark.parametrize("given", [jwt(0.0, 1e12, sub="x"), "eyJ.a.b", "eyJ", "tml-wrong", ""])
def test_the_server_refuses_tokens_that_it_did_not_issue(given: str) -> None:
    settings = ServerSettings(api_key=KEY, jwt=True)
    with LocalServer(DeterministicEngine(), settings=settings) as server:
        headers = {"X-API-Key": given}
        config = Config.resolve(environ={}, base_url=server.url, extra_headers=headers)
        transport = Transport(config)
        reply = transport.send_once(Request("GET", "/api/v1/get_server_capabilities"))
        assert reply.status == 401
        is_token = given.startswith("eyJ")
        assert ("invalid_token" in reply.headers.get("www-authenticate", "")) is is_token
        transport.abort()


# Secrets


def everything_about(error: BaseException) -> str:
    """Return all that an error shows: its chain, facts, pickle, and the objects it refers to."""
    texts = ["".join(traceback.format_exception(type(error), error, error.__traceback__))]
    seen: List[BaseException] = []
    inner: Optional[BaseException] = error
    while inner is not None and inner not in seen:
        seen.append(inner)
        texts += [repr(inner), str(inner), repr(vars(inner)), repr(inner.args)]
        for name in ("request", "response", "doc", "output", "cmd"):
            found = getattr(inner, name, None)
            texts += [repr(found), repr(getattr(found, "headers", None))]
        inner = inner.__cause__ or inner.__context__
    texts.append(repr(pickle.dumps(error)))
    return "\n".join(texts)


SECRETS = {
    "api_key": "tml-key-11111111",
    "cloudflare": "cf-secret-22222222",
    "authorization": "Bearer auth-33333333",
    "weights_token": "weights-44444444",
    "command": "tml-command-55555555",
}


@pytest.mark.parametrize("source", ["key", "command"])
@pytest.mark.parametrize("behaviour", ["echo", "html", "plain", "reset", "redirect"])
def test_no_secret_appears_in_any_output(
    mint: TokenServer,
    server: ScriptedServer,
    clock: ManualClock,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    behaviour: str,
    source: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    command = command_in(tmp_path, f"print('{SECRETS['command']}')")
    credential = {"api_key": SECRETS["api_key"]} if source == "key" else {"credential_cmd": command}
    config = Config.resolve(
        environ={
            "CLOUDFLARE_ACCESS_CLIENT_ID": "cf-id",
            "CLOUDFLARE_ACCESS_CLIENT_SECRET": SECRETS["cloudflare"],
        },
        base_url=server.url,
        extra_headers={"Authorization": SECRETS["authorization"]},
        **credential,
    )
    transport = Transport(config, clock=clock)
    body = json.dumps({"weights_access_token": SECRETS["weights_token"]}).encode()
    request = Request(
        "POST",
        SUBMIT.path,
        body,
        headers={"X-Tinker-Weights-Access-Token": SECRETS["weights_token"]},
        secrets=(SECRETS["weights_token"],),
    )

    def answer(received: Received) -> Answer:
        echo = {"detail": {**received.headers, "body": received.body.decode()}}
        return {
            "echo": Answer(403, echo),
            "html": Answer(200, f"<html>{json.dumps(echo)}</html>".encode()),
            "plain": Answer(500, json.dumps(echo).encode() * 30, content_type="text/plain"),
            "reset": Answer(reset=True),
            "redirect": Answer(307, echo, headers={"Location": "gopher://elsewhere/"}),
        }[behaviour]

    server.on(WORK, answer)
    with pytest.raises(TinkexError) as caught:
        transport.send(request, RetryPolicy(base_s=0.001, max_elapsed_s=0.01)).json()
    (sent, *_) = server.requests(WORK)
    assert sent.headers["x-api-key"] in mint.made  # the tokens were indeed sent
    assert sent.headers["authorization"] == SECRETS["authorization"]
    assert sent.headers["cf-access-client-secret"] == SECRETS["cloudflare"]
    source_state = transport.server.tokens.token_for(transport, SUBMIT)
    shown = "\n".join(
        [
            everything_about(caught.value),
            caplog.text,
            repr(transport),
            repr(vars(transport)["config"]),
            repr(request),
            repr(source_state),
            repr(config),
            repr(pickle.dumps(config)),
            str(transport.server.tokens),
        ]
    )
    hidden = [*SECRETS.values(), *mint.made]
    assert [secret for secret in hidden if secret in shown] == []
    transport.abort()


def test_a_config_is_pickled_without_its_credentials(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.resolve(base_url="http://h", api_key=KEY, tags=["a"], read_timeout_s=7.0)
    monkeypatch.setenv("TINKER_API_KEY", "the-receivers-own")
    there = pickle.loads(pickle.dumps(config))
    assert (there.base_url, there.tags, there.read_timeout_s) == ("http://h", ("a",), 7.0)
    assert there.api_key == "the-receivers-own"


def test_an_echoed_weights_access_token_is_not_shown(
    transport: Transport, mint: TokenServer, server: ScriptedServer
) -> None:
    token = SECRETS["weights_token"]

    def echo(received: Received) -> Answer:
        return Answer(400, {"detail": f"cannot load with {received.body.decode()}"})

    server.on("POST /api/v1/load_weights", echo)
    with pytest.raises(APIError, match="cannot load with") as caught:
        submit(
            transport,
            "load_weights",
            model_id="m",
            seq_id=1,
            path="tinker://a/weights/b",
            optimizer=False,
            weights_access_token=token,
        )
    assert server.requests("POST /api/v1/load_weights")[0].json()["weights_access_token"] == token
    assert token not in everything_about(caught.value)


# The complete client


def test_everything_a_client_sends_carries_the_token(
    server: ScriptedServer, clock: ManualClock
) -> None:
    routes = TinkerRoutes(server)
    mint = TokenServer(server, ManualClock(wall=time.time()))
    server.on(WORK, routes.accept)
    with tinkex.ServiceClient(
        base_url=server.url, api_key=KEY, heartbeat_interval_s=0.05
    ) as service:
        trainer = service.create_lora_training_client("base", rank=4)
        trainer.optim_step(tinkex.AdamParams()).result(PATIENCE_S)
        sampler = service.create_sampling_client(base_model="base")
        prompt = tinkex.ModelInput.from_ints([1])
        sampler.sample(prompt, 1, tinkex.SamplingParams(max_tokens=1)).result(PATIENCE_S)
        server.wait_for("POST /api/v1/session_heartbeat")
    with_key = {r.path for r in server.requests() if r.headers["x-api-key"] == KEY}
    assert with_key == {"/api/v1/client/config", "/api/v1/auth/token"}
    others = [r for r in server.requests() if r.path not in with_key]
    assert {r.headers["x-api-key"] for r in others} == set(mint.made)
    assert len(mint.made) == 1
    seen = {r.path.rpartition("/")[2] for r in others}
    assert {"create_session", "session_heartbeat", "finish", "retrieve_future"} <= seen


def test_the_child_of_a_fork_shares_no_object_that_may_be_locked(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick_config(server, api_key=KEY)
    parents = state_of(config)
    assert state_of(config) is parents
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    childs = state_of(config)
    assert childs is not parents
    assert childs.tokens is not parents.tokens
    assert childs.limiter is not parents.limiter
