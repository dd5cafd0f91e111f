"""Answers that are truncated, have a wrong length, or arrive a byte at a time."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
import requests
from support.loopback import PATIENCE_S, LoopbackServer
from support.raw_server import RawServer

from tinkex._transport import response_reading
from tinkex._transport.channel import Channel
from tinkex._transport.fast_connection import PrivateChannel
from tinkex._transport.request import Request
from tinkex._transport.response_reading import Pace, chunk_size, content_length
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.errors import APIConnectionError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
KINDS = pytest.mark.parametrize("private", [False, True], ids=["shared", "private"])


def ask(url: str, private: bool, read_timeout_s: float = PATIENCE_S) -> Any:
    config = Config.resolve(environ={}, base_url=url)
    channel: Any = PrivateChannel(config) if private else Channel(config, pool_size=1)
    try:
        return channel.request(
            "POST", url + "/x", headers={}, body=b"{}", timeout=(PATIENCE_S, read_timeout_s)
        )
    finally:
        channel.abort()


@KINDS
@pytest.mark.parametrize(
    "cut",
    [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK", b"HTTP/1.1 200 OK\r\n", HEAD, HEAD + b"Content-Len"],
)
def test_a_response_cut_off_in_its_headers_is_an_error(private: bool, cut: bytes) -> None:
    with RawServer(cut) as server, pytest.raises(requests.ConnectionError):
        ask(server.url, private)


@KINDS
@pytest.mark.parametrize(
    "length",
    [b"-5", b"+2", b"0_2", b"x", b"", b"2, 3", b"\xd9\xa2", b"1e3", b"9" * 16, b"9" * 5000],
)
def test_an_absurd_length_is_an_error(private: bool, length: bytes) -> None:
    answer = HEAD + b"Content-Length: " + length + b"\r\n\r\n{}"
    with RawServer(answer) as server:
        with pytest.raises(requests.RequestException, match="Content-Length is"):
            ask(server.url, private)
        transport = Transport(Config.resolve(environ={}, base_url=server.url))
        with pytest.raises(APIConnectionError, match="Content-Length is"):
            transport.send_once(Request("POST", "/api/v1/x", b"{}", raw_credential=True))
        transport.abort()


@KINDS
@pytest.mark.parametrize("size", [b"", b"-5", b"xyz", b"f" * 16, b"f" * 5000])
def test_an_absurd_size_of_a_chunk_is_an_error(private: bool, size: bytes) -> None:
    answer = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\n{}\r\n0\r\n\r\n"
    with RawServer(answer) as server, pytest.raises(requests.RequestException):
        ask(server.url, private)


@pytest.mark.parametrize("kind", [response_reading.CheckedResponse, response_reading._WatchedRaw])
def test_a_response_that_ctrl_c_left_half_constructed_is_finalized_silently(kind: Any) -> None:
    kind.__new__(kind).close()  # as its finalizer does


def test_sizes_of_chunks() -> None:
    assert [chunk_size(text) for text in (b"0", b"000", b"1F", b"00000000000000002")] == [
        0,
        0,
        31,
        2,
    ]
    for text in (b"", b"-5", b"0x2", b"1_0", b"+1", b"1 2", b"f1g2f", b"f" * 13):
        with pytest.raises(
            ValueError, match=f"the size of a chunk is {text!r}".replace("+", "[+]")
        ):
            chunk_size(text)


@KINDS
def test_a_repeated_length_is_read_once(private: bool) -> None:
    with RawServer(HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}") as server:
        assert ask(server.url, private).body == b"{}"
    assert content_length("7, 7") == 7


def trickling(head: bytes) -> LoopbackServer:
    """Run a server that sends *head* and then a byte every 20 ms, until the client hangs up."""

    def trickle(connection: socket.socket, index: int) -> None:
        connection.recv(65536)
        connection.sendall(head)
        while not server.closing.wait(0.02):
            connection.sendall(b"a")

    server = LoopbackServer(trickle)
    return server


@KINDS
@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 O", HEAD + b"X-A: ", HEAD + b"Content-Length: 100000\r\n\r\n"]
)
def test_a_trickling_response_has_a_total_time_limit(private: bool, head: bytes) -> None:
    with trickling(head) as server, pytest.raises(requests.RequestException, match="too slowly"):
        ask(server.url, private, read_timeout_s=1.0)  # each pause is much shorter


def test_the_time_limit_of_a_response_grows_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(response_reading.time, "monotonic", lambda: now)
    timeouts = []

    class Sock:
        def settimeout(self, seconds: float) -> None:
            timeouts.append(round(seconds, 3))

    pace = Pace(2.0, starts_now=True)
    pace.limit_next(Sock())
    now = 101.0
    pace.note(10 * 1024)  # adds ten seconds
    pace.limit_next(Sock())
    now = 111.5
    pace.limit_next(Sock())
    assert timeouts == [2.0, 2.0, 0.5]
    now = 112.1
    with pytest.raises(ConnectionAbortedError, match=r"10240 bytes in 12\.1 s"):
        pace.limit_next(Sock())


def test_time_before_a_large_body_is_sent_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(response_reading.time, "monotonic", lambda: now)
    pace = Pace(2.0, starts_now=False)
    now = 130.0
    with socket.socket() as sock:
        pace.limit_next(sock)
        assert sock.gettimeout() == 2.0


def test_silence_is_a_timeout_and_not_a_trickle() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for private in (False, True):
            began = time.monotonic()
            with pytest.raises(requests.ReadTimeout):
                ask(url, private, read_timeout_s=0.05)
            assert time.monotonic() - began >= 0.04
