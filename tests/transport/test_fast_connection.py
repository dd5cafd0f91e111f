"""PrivateChannel: what it sends, accepts and refuses, byte by byte."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
from pathlib import Path
from typing import Any, Iterator, List, Optional

import numpy as np
import pytest
import requests
from hypothesis import given, strategies as st
from support.loopback import PATIENCE_S, LoopbackServer
from support.properties import several
from support.raw_server import RawServer
from support.scripted_server import CERTIFICATE, Answer as Scripted, ScriptedServer

from tinkex._transport.fast_connection import MAX_HEAD_BYTES, PrivateChannel
from tinkex._transport.request import Reply
from tinkex.config import Config
from tinkex.wire.codec import Parts

PATIENCE = (5.0, 5.0)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def ask(connection: PrivateChannel, url: str, body: bytes = b"{}", **headers: str) -> Reply:
    return connection.request(
        "POST", url + "/api/v1/x?y=1", headers=headers, body=body, timeout=PATIENCE
    )


def opened(url: str, **settings: Any) -> PrivateChannel:
    return PrivateChannel(Config(url, **settings))


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        scripted.on("POST /api/v1/x", Scripted(body={"a": 1}))
        yield scripted


def test_the_bytes_of_a_request() -> None:
    with RawServer(OK) as server:
        connection = opened(server.url)
        answer = ask(connection, server.url, b"body", Accept="a/b", X="ü")
        connection.close()
    assert answer == Reply(200, {"content-length": "2"}, b"ok")
    host = server.url.partition("//")[2].encode()
    assert server.requests == [
        b"POST /api/v1/x?y=1 HTTP/1.1\r\nHost: " + host + b"\r\nAccept: a/b\r\nX: \xfc\r\n"
        b"Content-Length: 4\r\n\r\nbody"
    ]


def test_a_post_without_a_body_has_content_length_zero() -> None:
    with RawServer(OK) as server:
        connection = opened(server.url)
        connection.request("POST", server.url + "/p", headers={}, body=None, timeout=PATIENCE)
        connection.close()
    assert server.requests[0].endswith(b"Content-Length: 0\r\n\r\n")


def test_one_connection_serves_many_requests() -> None:
    with RawServer(OK, keep_alive=True) as server:
        connection = opened(server.url)
        for number in range(5):
            assert ask(connection, server.url, b"x" * number * 100_000).body == b"ok"
        connection.close()
        assert server.connections == 1
    assert [len(r.partition(b"\r\n\r\n")[2]) for r in server.requests] == [
        n * 100_000 for n in range(5)
    ]


@pytest.mark.parametrize("first", [0, 10, 100_000])
def test_a_body_in_parts(first: int) -> None:
    array = np.arange(50_000)
    parts = Parts([[b"x" * first], [array, b"y"], []], first + array.nbytes + 1)
    with RawServer(OK) as server:
        connection = opened(server.url)
        connection.request("POST", server.url + "/p", headers={}, body=parts, timeout=PATIENCE)
        connection.close()
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.endswith(b"Content-Length: %d" % (first + 400_001))
    assert body == b"x" * first + array.tobytes() + b"y"


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("piece", [None, 1, 7])
@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (HEAD + b"content-length:2\r\n\r\nok", b"ok"),
        (HEAD + b"Content-Length: 0\r\n\r\n", b""),
        (
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\nA;x=1\r\n0123456789\r\n0\r\n\r\n",
            b"ab0123456789",
        ),
        (HEAD + b"Transfer-Encoding: Chunked\r\n\r\n0\r\nTrailer: 1\r\n\r\n", b""),
        (HEAD + b"\r\nuntil the end", b"until the end"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nold", b"old"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
)
def test_every_kind_of_body_is_sent_completely(
    answer: bytes, body: bytes, piece: Optional[int]
) -> None:
    with RawServer(answer, piece=piece) as server:
        connection = opened(server.url)
        got = ask(connection, server.url)
        connection.close()
    assert got.body == body
    assert got.status in (200, 204)


def test_headers_are_lower_case_and_joined() -> None:
    with RawServer(HEAD + b"X-A: 1\r\nx-a:  2 \r\nContent-Length: 2\r\n\r\nok") as server:
        connection = opened(server.url)
        assert ask(connection, server.url).headers == {"x-a": "1, 2", "content-length": "2"}
        connection.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "begins with b'SSH-2.0-OpenSSH'"),
        (b"HTTP/1.1 abc\r\n\r\n", "begins with"),
        (b"HTTP/2 200 OK\r\n\r\n", "begins with"),
        (HEAD + b"no colon\r\n\r\n", "one of its headers is b'no colon'"),
        (HEAD + b" folded: x\r\n\r\n", "one of its headers"),
        (HEAD + b"Content-Length: -1\r\n\r\n", "Content-Length is '-1'"),
        (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc", "Content-Length is '2, 3'"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "size of a chunk"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", "size of a chunk"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", "longer than its size"),
        (HEAD + b"X: " + b"x" * (MAX_HEAD_BYTES + 65536), "longer than"),
        (b"", "without a response"),
        (b"HTTP/1.1 200", "in the middle of a response"),
        (HEAD + b"Content-Length: 10\r\n\r\nabc", "after 3 of 10 bytes"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab", "after 2 of 5 bytes"),
    ],
)
def test_a_broken_answer_is_an_error_with_the_reason(answer: bytes, words: str) -> None:
    with RawServer(answer, OK) as server:
        connection = opened(server.url)
        with pytest.raises(requests.RequestException) as caught:
            ask(connection, server.url)
        assert words in str(caught.value)
        assert ask(connection, server.url).body == b"ok"  # on a new connection
        connection.close()
        assert server.connections == 2


@several(60)
@given(garbage=st.binary(max_size=200))
def test_arbitrary_bytes_never_crash(garbage: bytes) -> None:
    with RawServer(garbage) as server:
        connection = opened(server.url)
        with contextlib.suppress(requests.RequestException):
            assert isinstance(ask(connection, server.url).body, bytes)
        connection.close()


def test_a_kept_connection_that_the_server_closed_is_replaced(server: ScriptedServer) -> None:
    connection = opened(server.url)
    assert ask(connection, server.url).status == 200
    server.drop_connections()
    assert ask(connection, server.url).status == 200
    assert server.connections == 2
    connection.close()


def test_connection_close_is_obeyed(server: ScriptedServer) -> None:
    server.on("POST /api/v1/x", Scripted(headers={"Connection": "close"}, close_after=True))
    connection = opened(server.url)
    for _ in range(2):
        ask(connection, server.url)
        server.wait_until_idle()
    assert server.connections == 2


def test_unsolicited_bytes_are_not_the_next_response() -> None:
    smuggled = OK + b"HTTP/1.1 500 Smuggled\r\nContent-Length: 2\r\n\r\nok"
    with RawServer(smuggled, OK, keep_alive=True) as server:
        connection = opened(server.url)
        assert ask(connection, server.url).status == 200
        assert ask(connection, server.url).status == 200
        connection.close()
        assert server.connections == 2


def test_the_answer_to_a_body_refused_unread_is_received() -> None:
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig"

    def refuse(connection: socket.socket, index: int) -> None:
        connection.recv(1000)
        connection.sendall(refusal)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):
            pass  # otherwise an RST could overtake the answer

    with LoopbackServer(refuse) as server:
        answer = ask(opened(server.url), server.url, b"x" * 5_000_000)
    assert (answer.status, answer.body) == (413, b"big")


def test_abort_ends_the_request_in_flight_and_later_ones(server: ScriptedServer) -> None:
    hold = threading.Event()
    server.on("POST /api/v1/x", Scripted(hold=hold))
    connection = opened(server.url)
    caught: List[BaseException] = []

    def request() -> None:
        try:
            ask(connection, server.url)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    server.wait_for("POST /api/v1/x")
    connection.abort()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    hold.set()
    assert isinstance(caught[0], requests.ConnectionError)
    with pytest.raises(requests.ConnectionError, match="aborted"):
        ask(connection, server.url)


def test_abort_closes_an_idle_connection(server: ScriptedServer) -> None:
    connection = opened(server.url)
    ask(connection, server.url)
    sock = connection._state.sock
    connection.abort()
    assert sock is not None
    assert sock.fileno() == -1
    server.wait_until_idle()


def test_timeouts(server: ScriptedServer) -> None:
    hold = threading.Event()
    server.on("POST /api/v1/x", Scripted(hold=hold))
    connection = opened(server.url)
    with pytest.raises(requests.ReadTimeout):
        connection.request(
            "POST", server.url + "/api/v1/x", headers={}, body=b"", timeout=(5.0, 0.05)
        )
    hold.set()
    server.on("POST /api/v1/x", Scripted(body={"late": False}))
    assert ask(connection, server.url).body == b'{"late": false}'  # not the late answer
    connection.close()


def test_a_closed_port_and_an_unknown_host_are_connection_errors() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(requests.ConnectionError, match="refused"):
        ask(opened(f"http://127.0.0.1:{port}"), f"http://127.0.0.1:{port}")
    url = "http://nowhere.invalid"
    with pytest.raises(requests.ConnectionError, match=r"(?i)resolve|name"):
        ask(opened(url), url)


@pytest.mark.parametrize(
    ("headers", "path"),
    [
        ({"X": "a\r\nY: b"}, "/p"),
        ({"X\nY": "a"}, "/p"),
        ({"X": "☃"}, "/p"),
        ({}, "/p\nq"),
        ({}, "/p q"),
    ],
)
def test_a_header_or_path_cannot_smuggle_in_another(headers: Any, path: str) -> None:
    url = "http://127.0.0.1:1"
    with pytest.raises(requests.exceptions.InvalidHeader):
        opened(url).request("GET", url + path, headers=headers, body=None, timeout=PATIENCE)


def test_a_private_channel_connects_to_its_own_server_only() -> None:
    with pytest.raises(requests.exceptions.InvalidURL):
        ask(opened("http://127.0.0.1:1"), "http://127.0.0.2:1")
    with pytest.raises(requests.exceptions.InvalidURL):
        ask(opened("http://127.0.0.1:1"), "http://127.0.0.1:12")


def test_gzip(server: ScriptedServer) -> None:
    server.on("POST /api/v1/x", Scripted(body={"a": [1] * 100}, use_gzip=True))
    connection = opened(server.url)
    assert b"[1, 1, 1" in ask(connection, server.url).body
    broken = gzip.compress(b"abc")[:-6]
    server.on("POST /api/v1/x", Scripted(body=broken, headers={"Content-Encoding": "gzip"}))
    with pytest.raises(requests.exceptions.ContentDecodingError):
        ask(connection, server.url)
    connection.close()


def test_tls_is_checked(tmp_path: Path) -> None:
    with ScriptedServer(tls=True) as server:
        server.on("POST /api/v1/x", Scripted(body={"a": 1}))
        trusting = opened(server.url, ca_bundle=str(CERTIFICATE))
        for _ in range(3):
            assert ask(trusting, server.url).status == 200
        assert server.connections == 1
        trusting.close()
        with pytest.raises(requests.exceptions.SSLError):
            ask(opened(server.url), server.url)


def test_tls_checks_the_name_of_the_server() -> None:
    with ScriptedServer(tls=True) as server:
        another = server.url.replace("127.0.0.1", "127.1")  # the same host, not in the certificate
        with pytest.raises(requests.exceptions.SSLError):
            ask(opened(another, ca_bundle=str(CERTIFICATE)), another)


def test_a_dropped_connection_closes_its_socket(server: ScriptedServer) -> None:
    connection = opened(server.url)
    ask(connection, server.url)
    del connection
    server.wait_until_idle()
