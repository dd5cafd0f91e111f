"""Transport: the only retry loop, typed errors, and no key in any output."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import pickle
import socket
import threading
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Iterator, List

import numpy as np
import pytest
from support.clocks import ManualClock
from support.raw_server import RawServer
from support.scripted_server import CERTIFICATE, PATIENCE_S, Answer, Received, ScriptedServer
from support.threads import promptly, wait_until
from support.transports import open_transport, quick_config

from tinkex import errors
from tinkex._transport import billing, channel as channel_module, response_reading
from tinkex._transport.attempts import RequestAttempts
from tinkex._transport.request import Reply, Request
from tinkex._transport.transport import Sender, ThreadTransport, Transport
from tinkex.config import Config
from tinkex.errors import (
    APIConnectionError,
    APITimeoutError,
    ClientClosedError,
    InternalServerError,
    RateLimitError,
    ResponseDecodeError,
)
from tinkex.retry import MAX_DAMAGED, RetryPolicy
from tinkex.wire.codec import Parts

KEY = "tml-secret-4711"
SUBMIT = Request("POST", "/api/v1/asample", b'{"a":1}')
QUICK = RetryPolicy(base_s=0.001, cap_s=0.002, max_elapsed_s=5.0)
ONCE = RetryPolicy(max_elapsed_s=0.0)


@pytest.fixture
def transport(server: ScriptedServer) -> Iterator[Transport]:
    with open_transport(server, api_key=KEY) as opened:
        yield opened


@pytest.fixture
def pauses(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> List[float]:
    """Record the waits between attempts, without waiting."""
    waited: List[float] = []

    def wait(attempts: RequestAttempts, delay_s: float) -> None:
        if delay_s > 0:
            waited.append(delay_s)

    monkeypatch.setattr(RequestAttempts, "_pause", wait)
    return waited


def route(request: Request = SUBMIT) -> str:
    return f"{request.method} {request.path}"


def sent(server: ScriptedServer) -> List[Received]:
    """Return the requests, without the one for flags that precedes a first request with a key."""
    return [r for r in server.requests() if not r.path.endswith("/client/config")]


def test_the_headers_of_a_post(transport: Transport, server: ScriptedServer) -> None:
    server.on(route(), Answer())
    transport.send(SUBMIT, QUICK)
    headers = sent(server)[0].headers
    assert headers["x-api-key"] == KEY
    assert headers["content-type"] == "application/json"
    assert headers["accept"] == "application/json"
    assert headers["user-agent"].startswith("tinkex/")
    assert len(headers["x-idempotency-key"]) == 36
    assert "cookie" not in headers


def test_a_get_has_neither_content_type_nor_idempotency_key(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on("GET /a", Answer())
    transport.send(Request("GET", "/a"), QUICK)
    headers = sent(server)[0].headers
    assert "content-type" not in headers
    assert "x-idempotency-key" not in headers


def test_extra_headers_win(server: ScriptedServer) -> None:
    server.on(route(), Answer())
    with open_transport(server, extra_headers={"X-Team": "a", "User-Agent": "mine"}) as transport:
        transport.send(SUBMIT, QUICK)
    headers = sent(server)[0].headers
    assert headers["x-team"] == "a"
    assert headers["user-agent"] == "mine"
    assert "x-api-key" not in headers


def test_a_path_prefix_of_the_base_url_is_kept(server: ScriptedServer) -> None:
    server.on("POST /services/prod/api/v1/asample", Answer())
    with open_transport(server, base_url=f"{server.url}/services/prod/") as transport:
        assert transport.send(SUBMIT, QUICK).status == 200


@pytest.mark.parametrize("of_a_thread", [False, True])
def test_a_base_url_of_capitals_and_blanks_is_escaped_on_every_connection(
    server: ScriptedServer, of_a_thread: bool
) -> None:
    server.on("POST /a%20b/%C3%A9/api/v1/asample", Answer())
    base_url = f"{server.url}/a b/\u00e9".replace("http", "Http")
    with open_transport(server, base_url=base_url) as transport:
        channel = transport.open_connection() if of_a_thread else None
        assert transport.send(SUBMIT, QUICK, channel=channel).status == 200


def test_any_2xx_is_success(transport: Transport, server: ScriptedServer) -> None:
    server.on(route(), Answer(202, {"request_id": "r"}))
    assert transport.send(SUBMIT, QUICK).json() == {"request_id": "r"}


def test_all_attempts_carry_the_same_body_and_idempotency_key(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(route(), Answer(503), Answer(reset=True), Answer(429), Answer(drop=True), Answer())
    assert transport.send(SUBMIT, QUICK).status == 200
    attempts = sent(server)
    assert len(attempts) == 5
    assert {a.body for a in attempts} == {SUBMIT.body}
    assert len({a.headers["x-idempotency-key"] for a in attempts}) == 1
    transport.send(SUBMIT, QUICK)
    assert sent(server)[5].headers["x-idempotency-key"] not in {
        a.headers["x-idempotency-key"] for a in attempts
    }


@pytest.mark.parametrize("own_connection", [False, True])
def test_a_retry_sends_the_same_bytes_even_if_its_arrays_were_written_to(
    transport: Transport,
    server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    own_connection: bool,
) -> None:
    array = np.arange(100_000)
    body = Parts([[b"head", array], [b"tail"]], 8 + array.nbytes)
    sent_first = bytes(body)
    sender: Sender = transport
    if own_connection:
        sender = ThreadTransport(transport, lambda request: request)

    def write(attempts: RequestAttempts, delay_s: float) -> None:
        if delay_s > 0:
            array[:] = -1

    monkeypatch.setattr(RequestAttempts, "_pause", write)
    server.on(route(), Answer(503), Answer(drop=True), Answer())
    sender.send(dataclasses.replace(SUBMIT, body=body), QUICK)
    assert [received.body for received in sent(server)] == [sent_first] * 3
    assert array[0] == -1


def test_the_client_survives_a_plain_500_and_a_reset_of_the_kept_connection(
    transport: Transport, server: ScriptedServer
) -> None:
    # Current servers do this: after an unhandled 500 they close the connection.
    server.on(
        route(),
        Answer(500, b"Internal Server Error", content_type="text/plain", close_after=True),
        Answer(),
    )
    assert transport.send(SUBMIT, QUICK).status == 200


def test_a_500_is_final_after_four_attempts(
    transport: Transport, server: ScriptedServer, pauses: List[float]
) -> None:
    server.on(route(), Answer(500, {"detail": "broken for good"}))
    with pytest.raises(InternalServerError, match="broken for good") as caught:
        transport.send(SUBMIT, RetryPolicy())
    assert len(sent(server)) == 4
    assert caught.value.attempts == 4
    assert caught.value.status == caught.value.status_code == 500
    assert [round(p, 2) >= low for p, low in zip(pauses, (0.25, 0.5, 1.0))] == [True] * 3


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 409, 410, 415, 422, 501])
def test_a_final_response_is_not_retried(
    transport: Transport, server: ScriptedServer, status: int
) -> None:
    server.on(route(), Answer(status, {"detail": f"because of {status}"}))
    with pytest.raises(errors.APIStatusError, match=f"because of {status}") as caught:
        transport.send(SUBMIT, QUICK)
    assert type(caught.value) is errors.status_error_type(status)
    assert caught.value.status == status
    assert caught.value.body == {"detail": f"because of {status}"}
    assert len(sent(server)) == 1


def test_a_redirect_that_would_change_the_method_is_an_error(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(route(), Answer(303, headers={"Location": "/elsewhere"}))
    with pytest.raises(errors.APIStatusError) as caught:
        transport.send(SUBMIT, QUICK)
    assert caught.value.status == 303
    assert "redirects" in str(caught.value)
    assert len(sent(server)) == 1


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "0.25"}, 0.25),
        ({"Retry-After-Ms": "30"}, 0.03),
    ],
)
def test_retry_after_sets_the_pause(
    transport: Transport, server: ScriptedServer, pauses: List[float], headers: Any, pause: float
) -> None:
    server.on(route(), Answer(503, headers=headers), Answer())
    transport.send(SUBMIT, RetryPolicy())
    assert pauses == [pause]


def test_a_retry_after_date_is_compared_with_the_wall_clock(server: ScriptedServer) -> None:
    clock = ManualClock(wall=784111777.0)  # Sun, 06 Nov 1994 08:49:37 GMT
    transport = Transport(quick_config(server), clock=clock)
    reply = Reply(503, {"retry-after": "Sun, 06 Nov 1994 08:49:57 GMT"}, b"")
    error = transport.status_error(SUBMIT, reply)
    assert isinstance(error, InternalServerError)
    assert error.retry_after_s == 20.0


def test_the_server_can_forbid_and_demand_retries(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(route(), Answer(503, headers={"X-Should-Retry": "false"}))
    with pytest.raises(InternalServerError):
        transport.send(SUBMIT, QUICK)
    assert len(sent(server)) == 1
    server.on(route(), Answer(409, headers={"X-Should-Retry": "true"}), Answer())
    assert transport.send(SUBMIT, QUICK).status == 200


def test_retries_end_at_the_time_limit_of_the_policy(server: ScriptedServer) -> None:
    clock = ManualClock()
    transport = Transport(quick_config(server), clock=clock)

    def slow(received: Any) -> Answer:
        clock.advance(40.0)
        return Answer(503, {"error": "overloaded"})

    server.on(route(), slow)
    with pytest.raises(InternalServerError, match="overloaded") as caught:
        transport.send(SUBMIT, RetryPolicy(base_s=0.001, max_elapsed_s=100.0))
    assert caught.value.attempts == 3
    assert caught.value.elapsed_s == 120.0
    transport.abort()


# 429: one limiter for all


def test_a_429_holds_back_every_submitter_of_the_same_server_and_key(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(route(), Answer(429, headers={"Retry-After": "0.2"}), Answer())
    with open_transport(server, api_key=KEY) as other, ThreadPoolExecutor(1) as pool:
        first = pool.submit(transport.send, SUBMIT, QUICK)
        limited = server.wait_for(route())[0]
        wait_until(
            lambda: transport.server.limiter.wait_s() > 0 or first.done(), "the answer was read"
        )
        other.send(SUBMIT, QUICK)
        assert first.result(PATIENCE_S).status == 200
    for attempt in sent(server)[1:]:
        assert attempt.at - limited.at >= 0.19


def test_another_key_is_not_held_back(transport: Transport, server: ScriptedServer) -> None:
    transport.server.limiter.back_off(60.0)
    server.on(route(), Answer())
    with open_transport(server, api_key="another") as other:
        assert other.send(SUBMIT, QUICK).status == 200
    transport.server.limiter._not_before = 0.0


def test_a_persistent_429_is_a_rate_limit_error(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(route(), Answer(429, {"detail": "slow down"}, headers={"Retry-After": "9"}))
    with pytest.raises(RateLimitError, match="slow down") as caught:
        transport.send(SUBMIT, ONCE)
    assert caught.value.retry_after_s == 9.0
    assert caught.value.retryable


# 402


def test_a_402_raises_at_once(transport: Transport, server: ScriptedServer) -> None:
    server.on(route(), Answer(402, {"detail": "card expired"}))
    with pytest.raises(errors.BillingError, match="card expired") as caught:
        transport.send(SUBMIT, QUICK)
    assert "billing" in str(caught.value)


def test_a_402_is_waited_out_if_requested(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(billing, "PAUSE_S", 0.001)
    server.on(route(), *[Answer(402)] * 3, Answer())
    with open_transport(server, on_billing="wait") as transport:
        assert transport.send(SUBMIT, QUICK).status == 200
    assert len(sent(server)) == 4


# No response


def test_a_closed_port(server: ScriptedServer) -> None:
    port = server.port
    server.close()
    with open_transport(server) as transport, pytest.raises(APIConnectionError) as caught:
        transport.send(SUBMIT, ONCE)
    text = str(caught.value)
    assert f"127.0.0.1:{port}" in text
    assert "POST /api/v1/asample" in text
    assert "Connection refused" in text
    assert f"http://127.0.0.1:{port}" in text
    assert caught.value.retryable
    assert caught.value.__cause__ is not None


def test_a_host_name_that_does_not_resolve(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with open_transport(server, base_url="http://nowhere.example") as transport:
        with pytest.raises(APIConnectionError) as caught:
            transport.send(SUBMIT, ONCE)
    text = str(caught.value)
    assert "nowhere.example:80" in text
    assert "POST /api/v1/asample" in text
    assert "Name or service not known" in text


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(Answer(reset=True), "Connection reset"), (Answer(drop=True), "closed connection")],
)
def test_a_broken_connection(
    transport: Transport, server: ScriptedServer, answer: Answer, reason: str
) -> None:
    server.on(route(), answer)
    with pytest.raises(APIConnectionError) as caught:
        transport.send(SUBMIT, ONCE)
    text = str(caught.value)
    assert f"127.0.0.1:{server.port}" in text
    assert "POST /api/v1/asample" in text
    assert reason in text


def test_a_truncated_body(transport: Transport, server: ScriptedServer) -> None:
    server.on(route(), Answer(body=b'{"request_id": "r"}', cut_after=5), Answer())
    assert transport.send(SUBMIT, QUICK).status == 200
    assert len(sent(server)) == 2


@pytest.mark.parametrize("cut_after", [None, 5])
def test_a_silent_server_is_a_timeout(server: ScriptedServer, cut_after: Any) -> None:
    hold = threading.Event()
    server.on(route(), Answer(body=b'{"request_id": "r"}', hold=hold, cut_after=cut_after))
    with open_transport(server, read_timeout_s=0.1) as transport:
        with pytest.raises(APITimeoutError) as caught:
            transport.send(SUBMIT, ONCE)
    text = str(caught.value)
    assert f"127.0.0.1:{server.port}" in text
    assert "POST /api/v1/asample" in text
    assert "0.1 s" in text
    hold.set()


def test_tls_with_a_trusted_certificate() -> None:
    with ScriptedServer(tls=True) as server:
        server.on(route(), Answer())
        with open_transport(server, ca_bundle=str(CERTIFICATE)) as transport:
            for _ in range(3):
                assert transport.send(SUBMIT, QUICK).status == 200
        assert server.connections == 1


def test_tls_with_an_unknown_certificate() -> None:
    with ScriptedServer(tls=True) as server, open_transport(server) as transport:
        with pytest.raises(APIConnectionError, match="certificate") as caught:
            transport.send(SUBMIT, QUICK)
        assert f"127.0.0.1:{server.port}" in str(caught.value)
        assert caught.value.attempts == 1  # a retry would not know it either


def test_closing_aborts_a_tls_request_in_flight() -> None:
    with ScriptedServer(tls=True) as server, ThreadPoolExecutor(1) as pool:
        server.on(route(), Answer(hold=threading.Event()))
        with open_transport(server, ca_bundle=str(CERTIFICATE)) as transport:
            sending = pool.submit(transport.send, SUBMIT, RetryPolicy())
            server.wait_for(route())
            with promptly():
                transport.closing.set()
                transport.abort()
                with pytest.raises(ClientClosedError, match="POST /api/v1/asample"):
                    sending.result(PATIENCE_S)


def test_tls_to_a_plain_port(server: ScriptedServer) -> None:
    with open_transport(server, base_url=f"https://127.0.0.1:{server.port}") as transport:
        with pytest.raises(APIConnectionError) as caught:
            transport.send(SUBMIT, QUICK)
    text = str(caught.value)
    assert f"127.0.0.1:{server.port}" in text
    assert "SSL" in text or "TLS" in text
    assert not caught.value.retryable


def test_an_absent_proxy_is_named_without_its_password(server: ScriptedServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    proxy = f"http://me:hunter2@127.0.0.1:{port}"
    for url in ("http://far.example", "https://far.example"):
        with open_transport(server, base_url=url, proxy=proxy) as transport:
            with pytest.raises(APIConnectionError) as caught:
                transport.send(SUBMIT, ONCE)
        text = str(caught.value)
        assert "far.example" in text
        assert f"the proxy 127.0.0.1:{port}" in text
        assert "Connection refused" in text
        assert "hunter2" not in "".join(traceback.format_exception(caught.type, caught.value, None))


def test_a_response_that_is_not_http() -> None:
    with RawServer(b"SSH-2.0-OpenSSH_9.2\r\n") as server, open_transport(server) as other:
        with pytest.raises(APIConnectionError, match=f"127.0.0.1:{server.port}"):
            other.send(SUBMIT, ONCE)


# Closing


def test_closing_wakes_a_waiting_retry(transport: Transport, server: ScriptedServer) -> None:
    server.on(route(), Answer(503, headers={"Retry-After": "50"}))
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(transport.send, SUBMIT, RetryPolicy())
        server.wait_for(route())
        with promptly():
            transport.closing.set()
            with pytest.raises(ClientClosedError, match="POST /api/v1/asample"):
                sending.result(PATIENCE_S)


def test_closing_wakes_callers_that_wait_for_the_limiter(transport: Transport) -> None:
    transport.server.limiter.back_off(50.0)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(transport.send, SUBMIT, RetryPolicy())
        transport.closing.set()
        with pytest.raises(ClientClosedError):
            sending.result(PATIENCE_S)


def test_closing_aborts_a_request_in_flight(transport: Transport, server: ScriptedServer) -> None:
    server.on(route(), Answer(hold=threading.Event()))
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(transport.send, SUBMIT, RetryPolicy())
        server.wait_for(route())
        transport.closing.set()
        transport.abort()
        with pytest.raises(ClientClosedError, match="POST /api/v1/asample"):
            sending.result(PATIENCE_S)


def test_a_channel_opened_after_closing_does_not_work(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(route(), Answer())
    transport.closing.set()
    transport.abort()
    with pytest.raises(ClientClosedError):
        transport.send_once(SUBMIT, channel=transport.open_channel())
    assert sent(server) == []


# The key


def echoing(received: Any) -> Answer:
    return Answer(400, {"detail": f"bad key {received.headers['x-api-key']}", "x": [KEY]})


def long_echo(received: Any) -> Answer:
    # The key crosses every position at which a text might be cut.
    text = "".join(f"{'x' * 40}{received.headers['x-api-key']}" for _ in range(40))
    return Answer(500, text.encode(), content_type="text/plain")


def decodable_echo(received: Any) -> Answer:
    return Answer(200, f"<html>{received.headers['x-api-key']}</html>".encode())


@pytest.mark.parametrize("answer", [echoing, long_echo, decodable_echo])
def test_an_echoed_key_is_never_shown(
    transport: Transport, server: ScriptedServer, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    server.on(route(), answer)
    caplog.set_level(logging.DEBUG)
    with pytest.raises((errors.APIStatusError, ResponseDecodeError)) as caught:
        transport.send(SUBMIT, QUICK).json()
    shown = "".join(traceback.format_exception(caught.type, caught.value, caught.tb))
    shown += repr(vars(caught.value)) + caplog.text + repr(pickle.dumps(caught.value))
    assert KEY not in shown
    assert KEY[:12] not in shown  # nor a large part of it
    assert "<api key>" in shown


def test_the_key_is_not_in_a_connection_error(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.on(route(), Answer(reset=True))
    caplog.set_level(logging.DEBUG)
    with (
        open_transport(server, api_key=KEY) as transport,
        pytest.raises(APIConnectionError) as caught,
    ):
        transport.send(SUBMIT, RetryPolicy(base_s=0.001, max_elapsed_s=0.01))
    shown = "".join(traceback.format_exception(caught.type, caught.value, caught.tb))
    assert KEY not in shown + caplog.text + repr(caught.value) + repr(pickle.dumps(caught.value))
    assert KEY not in repr(transport) + repr(SUBMIT)


def test_binary_answers_are_not_redacted(transport: Transport, server: ScriptedServer) -> None:
    body = b"\x00" + KEY.encode() + b"\xff"
    server.on(route(), Answer(body=body, content_type="application/x-protobuf"))
    assert transport.send(SUBMIT, QUICK).body == body


# Errors


@pytest.mark.parametrize(
    ("body", "content_type", "shown"),
    [
        ({"detail": "the detail"}, "application/json", "the detail"),
        ({"error": "the error"}, "application/json", "the error"),
        ({"message": "the message"}, "application/json", "the message"),
        (
            {"detail": [{"loc": ["body", "x"], "msg": "field required"}]},
            "application/json",
            "field required",
        ),
        (b"plain words", "text/plain", "plain words"),
        (b"\xff\xfe", "text/plain", "\ufffd"),
        (b"", "text/plain", "returned 422"),
    ],
)
def test_the_servers_words_are_in_the_message(
    transport: Transport, server: ScriptedServer, body: Any, content_type: str, shown: str
) -> None:
    server.on(route(), Answer(422, body, content_type=content_type))
    with pytest.raises(errors.UnprocessableEntityError) as caught:
        transport.send(SUBMIT, QUICK)
    assert shown in str(caught.value)
    assert "POST /api/v1/asample returned 422" in str(caught.value)


def test_a_huge_error_body_is_truncated(transport: Transport, server: ScriptedServer) -> None:
    server.on(route(), Answer(400, {"detail": "x" * 100_000}))
    with pytest.raises(errors.BadRequestError) as caught:
        transport.send(SUBMIT, QUICK)
    assert len(str(caught.value)) < 700
    assert len(repr(caught.value.body)) < 700


def test_the_error_about_a_response_that_is_not_json_shows_it(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(route(), Answer(body=b"<html>hello</html>", content_type="text/html"))
    with pytest.raises(ResponseDecodeError) as caught:
        transport.send(SUBMIT, QUICK).json()
    assert "hello" in str(caught.value)
    assert "text/html" in str(caught.value)
    assert "base_url" in str(caught.value)


def test_errors_pickle_with_their_facts(transport: Transport, server: ScriptedServer) -> None:
    server.on(route(), Answer(429, {"detail": "slow"}, headers={"Retry-After": "3"}))
    with pytest.raises(RateLimitError) as caught:
        transport.send(SUBMIT, ONCE)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is RateLimitError
    assert str(again) == str(caught.value)
    assert (again.status, again.attempts, again.retry_after_s) == (429, 1, 3.0)


def test_retries_are_reported_in_the_log(
    transport: Transport, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.on(route(), Answer(503, {"detail": "starting"}), Answer())
    with caplog.at_level(logging.INFO, "tinkex._transport.attempts"):
        transport.send(SUBMIT, QUICK)
    assert "starting; attempt 1, next in" in caplog.text


# Connections


def test_traffic_classes_do_not_share_connections(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(route(), Answer())
    for traffic in ("control", "work", "poll", "work", "poll"):
        transport.send(Request("POST", SUBMIT.path, b"{}", traffic=traffic), QUICK)
    assert server.connections == 3


def test_a_private_channel_is_reused_and_closed_when_dropped(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(route(), Answer())
    transport.send(SUBMIT, QUICK)  # requests the flags on a shared channel
    others = server.connections
    channel = transport.open_channel()
    for _ in range(3):
        transport.send(SUBMIT, QUICK, channel=channel)
    assert server.connections == others + 1
    transport.drop_idle()
    del channel
    gc.collect()
    server.wait_until_idle()


# Other habits of servers and gateways


@pytest.mark.parametrize("frames", [1, 3])
def test_a_zstd_answer_is_read(transport: Transport, server: ScriptedServer, frames: int) -> None:
    zstandard = pytest.importorskip("zstandard")
    text = b'{"request_id": "r"}'
    size = -(-len(text) // frames)
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    packed = b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)
    server.on(route(), Answer(body=packed, headers={"Content-Encoding": "zstd"}))
    assert transport.send(SUBMIT, QUICK).json() == {"request_id": "r"}
    assert "zstd" in sent(server)[0].headers["accept-encoding"]


def test_a_gzip_answer_is_read(transport: Transport, server: ScriptedServer) -> None:
    server.on(route(), Answer(body={"request_id": "r"}, use_gzip=True))
    assert transport.send(SUBMIT, QUICK).json() == {"request_id": "r"}


@pytest.mark.parametrize("encoding", ["zstd", "gzip"])
def test_a_broken_compressed_answer_is_a_connection_error(
    transport: Transport, server: ScriptedServer, encoding: str
) -> None:
    server.on(route(), Answer(body=b"not compressed", headers={"Content-Encoding": encoding}))
    with pytest.raises(APIConnectionError):
        transport.send(SUBMIT, ONCE)


@pytest.mark.parametrize("body", [b'{"request_id": "r', b"\x84\xdd\xff"])
def test_a_success_damaged_in_transit_is_requested_again(
    transport: Transport, server: ScriptedServer, body: bytes
) -> None:
    server.on(route(), Answer(body=body), Answer(body={"request_id": "r"}))
    assert transport.send(SUBMIT, QUICK).json() == {"request_id": "r"}
    first, second = sent(server)
    assert first.headers["x-idempotency-key"] == second.headers["x-idempotency-key"]
    assert first.body == second.body


def test_a_response_that_is_damaged_each_time_is_an_error_soon(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(route(), Answer(body=b'{"request_id": "r'))
    with pytest.raises(ResponseDecodeError, match="asample: the response is not JSON") as caught:
        transport.send(SUBMIT, QUICK)
    assert caught.value.maybe_taken
    assert caught.value.attempts == len(sent(server)) == MAX_DAMAGED


def test_ignored_responses_may_contain_anything(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(route(), Answer(body=b"ok{"))
    request = dataclasses.replace(SUBMIT, empty_response_ok=True)
    assert transport.send(request, ONCE).body == b"ok{"


def test_without_zstandard_a_zstd_response_is_reported_immediately(
    transport: Transport, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(response_reading, "_HAVE_ZSTD", False)
    monkeypatch.setattr(channel_module, "_URLLIB3_DECODES_ZSTD", False)
    server.on(route(), Answer(body=b"\x28\xb5\x2f\xfd", headers={"Content-Encoding": "zstd"}))
    with pytest.raises(ResponseDecodeError, match=r"tinkex\[zstd\]"):
        transport.send(SUBMIT, QUICK)
    assert len(sent(server)) == 1


def test_an_empty_400_is_retried_on_a_new_connection(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(route(), Answer(400, b""), Answer(400, b""), Answer())
    assert transport.send(SUBMIT, QUICK).status == 200
    assert len({attempt.connection for attempt in sent(server)}) == 3


def test_a_persistent_empty_400_is_reported(transport: Transport, server: ScriptedServer) -> None:
    server.on(route(), Answer(400, b""))
    with pytest.raises(errors.BadRequestError) as caught:
        transport.send(SUBMIT, QUICK)
    assert caught.value.attempts == len(sent(server)) == 4
    with pytest.raises(APIConnectionError, match=r"gateway.*status 400, .*empty body"):
        transport.send_once(SUBMIT)


def test_a_400_with_a_text_is_final(transport: Transport, server: ScriptedServer) -> None:
    server.on(route(), Answer(400, b"{}"))
    with pytest.raises(errors.BadRequestError):
        transport.send(SUBMIT, QUICK)
    assert len(sent(server)) == 1


@pytest.mark.parametrize(("level", "expected"), [(None, logging.WARNING), ("error", logging.ERROR)])
def test_a_deprecation_is_reported_once(
    transport: Transport,
    server: ScriptedServer,
    caplog: pytest.LogCaptureFixture,
    level: Any,
    expected: int,
) -> None:
    note = {"X-Deprecation-Note": f"asample goes away, {level}"}
    if level:
        note["X-Deprecation-Level"] = level
    server.on(route(), Answer(headers=note), Answer(404, headers=note), Answer(headers=note))
    transport.send(SUBMIT, QUICK)
    with pytest.raises(errors.NotFoundError):
        transport.send(SUBMIT, QUICK)
    transport.send(SUBMIT, QUICK)
    notes = [r for r in caplog.records if f"goes away, {level}" in r.getMessage()]
    assert [(r.levelno, route() in r.getMessage()) for r in notes] == [(expected, True)]


def test_headers_for_an_access_proxy_come_from_the_environment(
    server: ScriptedServer,
) -> None:
    server.on(route(), Answer())
    environ = {"CLOUDFLARE_ACCESS_CLIENT_ID": "i", "CLOUDFLARE_ACCESS_CLIENT_SECRET": "s\n"}
    transport = Transport(Config.resolve(environ=environ, base_url=server.url))
    transport.send(SUBMIT, QUICK)
    transport.abort()
    headers = sent(server)[0].headers
    assert (headers["cf-access-client-id"], headers["cf-access-client-secret"]) == ("i", "s")


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("last", [Answer(), Answer(404, {"detail": "no"})], ids=["sent", "failed"])
def test_a_retried_request_keeps_no_connection_open(
    transport: Transport, server: ScriptedServer, last: Answer, no_collector: None
) -> None:
    server.on(route(), Answer(drop=True), Answer(503), last)
    channel = transport.open_connection()
    kept = weakref.ref(channel)
    with contextlib.suppress(errors.APIError):
        transport.send(SUBMIT, QUICK, channel=channel)
    del channel
    assert kept() is None  # even without the garbage collector
