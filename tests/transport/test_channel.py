"""Channel: a connection pool that another thread can abort."""

from __future__ import annotations

import importlib
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Iterator, List, Optional, Tuple
from urllib.parse import urlsplit

import pytest
import requests
from support.scripted_server import PATIENCE_S, Answer, ScriptedServer
from support.threads import promptly, wait_until
from support.transports import quick_config

from tinkex._transport.channel import Channel


@pytest.fixture
def channel(server: ScriptedServer) -> Iterator[Channel]:
    opened = Channel(quick_config(server), pool_size=4)
    yield opened
    opened.abort()


def post(channel: Channel, server: ScriptedServer, path: str = "/x") -> requests.Response:
    return channel.request(
        "POST", server.url + path, headers={}, body=b"{}", timeout=(PATIENCE_S, PATIENCE_S)
    )


def test_a_connection_is_reused(channel: Channel, server: ScriptedServer) -> None:
    server.on("POST /x", Answer())
    for _ in range(5):
        assert post(channel, server).status == 200
    assert server.connections == 1


def test_an_idle_connection_that_the_server_closed_is_replaced(
    channel: Channel, server: ScriptedServer
) -> None:
    server.on("POST /x", Answer())
    post(channel, server)
    server.drop_connections()
    assert post(channel, server).status == 200
    assert server.connections == 2


def test_redirects_are_not_followed(channel: Channel, server: ScriptedServer) -> None:
    server.on("POST /x", Answer(302, headers={"Location": "/y"}))
    server.on("POST /y", Answer())
    server.on("GET /y", Answer())
    assert post(channel, server).status == 302
    assert [r.path for r in server.requests()] == ["/x"]


def test_cookies_are_refused(channel: Channel, server: ScriptedServer) -> None:
    server.on("POST /x", Answer(headers={"Set-Cookie": "session=another-callers; Path=/"}))
    post(channel, server)
    post(channel, server)
    assert "cookie" not in server.requests()[1].headers


def test_responses_may_be_compressed(channel: Channel, server: ScriptedServer) -> None:
    server.on("POST /x", Answer(body={"a": 1}, use_gzip=True))
    assert post(channel, server).json() == {"a": 1}


def test_nothing_is_read_from_the_environment(
    channel: Channel, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.on("POST /x", Answer())
    assert post(channel, server).status == 200
    assert "authorization" not in server.requests()[0].headers


HOLDS = {
    "before the answer": Answer(hold=threading.Event()),
    "in the middle of a body": Answer(body=b"x" * 100, cut_after=10, hold=threading.Event()),
    # http.client releases the socket here while the body is still being read.
    "in the body of a last answer": Answer(
        body=b"x" * 100, cut_after=10, hold=threading.Event(), headers={"Connection": "close"}
    ),
}


@pytest.mark.parametrize("where", HOLDS)
def test_abort_interrupts_a_read_immediately(
    channel: Channel, server: ScriptedServer, where: str
) -> None:
    server.on("POST /x", HOLDS[where])
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(post, channel, server)
        server.wait_for("POST /x")
        with promptly():
            channel.abort()
            with pytest.raises(requests.RequestException):
                request.result(PATIENCE_S)


def test_requests_after_an_abort_fail(channel: Channel, server: ScriptedServer) -> None:
    server.on("POST /x", Answer())
    post(channel, server)
    channel.abort()
    for _ in range(3):
        with pytest.raises(requests.RequestException):
            post(channel, server)
    assert len(server.requests("POST /x")) == 1


def test_abort_races_requests_and_none_hangs(server: ScriptedServer) -> None:
    server.on("POST /x", Answer(hold=threading.Event()))

    def attempt(channel: Channel) -> Optional[Exception]:
        try:
            post(channel, server)
        except requests.RequestException as error:
            return error
        return None

    with ThreadPoolExecutor(4) as pool:
        for _ in range(25):
            channel = Channel(quick_config(server), pool_size=4)
            attempts = [pool.submit(attempt, channel) for _ in range(4)]
            channel.abort()
            assert all(a.result(PATIENCE_S) is not None for a in attempts)


def test_close_closes_idle_connections(channel: Channel, server: ScriptedServer) -> None:
    server.on("POST /x", Answer())
    post(channel, server)
    assert server.open_connections() == 1
    channel.close()
    server.wait_until_idle()


def test_a_proxy_is_used_and_its_connections_can_be_aborted(server: ScriptedServer) -> None:
    # The scripted server acts as the proxy: it gets requests for absolute URLs.
    channel = Channel(quick_config(server, base_url="http://far.example", proxy=server.url), 1)
    server.on("POST http://far.example/x", Answer(), Answer(hold=threading.Event()))
    first = channel.request("POST", "http://far.example/x", headers={}, body=b"", timeout=(5, 5))
    assert first.status == 200
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(
            channel.request, "POST", "http://far.example/x", headers={}, body=b"", timeout=(5, 60)
        )
        server.wait_for("POST http://far.example/x", 2)
        channel.abort()
        with pytest.raises(requests.RequestException):
            second.result(PATIENCE_S)
    assert server.connections == 1


def test_a_socks_proxy_is_used_and_its_connections_can_be_aborted(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PySocks is an extra of requests; this stands in for it.  The server acts as server and proxy.
    proxies: List[Tuple[Any, Any]] = []

    def connect(target: Any, **options: Any) -> socket.socket:
        proxies.append((target, (options["proxy_addr"], options["proxy_port"])))
        return socket.create_connection((options["proxy_addr"], options["proxy_port"]))

    socks = ModuleType("socks")
    socks.__spec__ = ModuleSpec("socks", None)
    vars(socks).update(
        PROXY_TYPE_SOCKS4=1, PROXY_TYPE_SOCKS5=2, ProxyError=OSError, create_connection=connect
    )
    monkeypatch.setitem(sys.modules, "socks", socks)
    monkeypatch.delitem(sys.modules, "urllib3.contrib.socks", raising=False)
    manager = importlib.import_module("urllib3.contrib.socks").SOCKSProxyManager
    monkeypatch.delitem(sys.modules, "urllib3.contrib.socks")
    monkeypatch.setattr("requests.adapters.SOCKSProxyManager", manager)
    host, port = urlsplit(server.url).hostname, urlsplit(server.url).port
    proxy = f"socks5h://{host}:{port}"
    channel = Channel(quick_config(server, base_url="http://far.example", proxy=proxy), 1)
    server.on("GET /x", Answer(body={"a": 1}))
    limit = (PATIENCE_S, PATIENCE_S)
    reply = channel.request("GET", "http://far.example/x", headers={}, body=None, timeout=limit)
    assert reply.json() == {"a": 1}
    assert proxies == [(("far.example", 80), (host, port))]
    channel.abort()
    wait_until(lambda: server.open_connections() == 0, "the connection is closed")
