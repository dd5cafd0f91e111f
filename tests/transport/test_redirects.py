"""Redirects: where they are followed, and what is not sent along."""

from __future__ import annotations

from typing import Any, Iterator, Optional

import pytest
from support.scripted_server import CERTIFICATE, Answer, ScriptedServer
from support.transports import open_transport

from tinkex._transport.request import MAX_HOPS, Request, next_hop, same_origin
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.errors import APIStatusError
from tinkex.retry import RetryPolicy

KEY = "tml-secret-4711"
TOKEN = "weights-token-815"
ONCE = RetryPolicy(max_elapsed_s=0.0)
ALL = (301, 302, 303, 307, 308)
PRIVATE = (
    "x-api-key",
    "authorization",
    "x-team",
    "cf-access-client-id",
    "cf-access-client-secret",
    "x-tinker-weights-access-token",
)


@pytest.fixture
def other() -> Iterator[ScriptedServer]:
    """A server at another port: another origin."""
    with ScriptedServer() as scripted:
        yield scripted


@pytest.fixture
def transport(server: ScriptedServer) -> Iterator[Transport]:
    config = Config.resolve(
        environ={
            "CLOUDFLARE_ACCESS_CLIENT_ID": "cf-id",
            "CLOUDFLARE_ACCESS_CLIENT_SECRET": "cf-secret",
        },
        base_url=server.url,
        api_key=KEY,
        extra_headers={"Authorization": "Bearer x", "X-Team": "a"},
    )
    opened = Transport(config)
    yield opened
    opened.closing.set()
    opened.abort()


def request(method: str, path: str = "/a", **fields: Any) -> Request:
    body = None if method == "GET" else b'{"n":1}'
    return Request(method, path, body, headers={"X-Tinker-Weights-Access-Token": TOKEN}, **fields)


def to(location: str, status: int = 307) -> Answer:
    return Answer(status, headers={"Location": location})


@pytest.mark.parametrize("status", ALL)
def test_a_get_is_followed_with_everything_on_the_same_origin(
    transport: Transport, server: ScriptedServer, status: int
) -> None:
    server.on("GET /a", to("/b?c=1", status))
    server.on("GET /b", Answer(body={"at": "b"}))
    assert transport.send(request("GET"), ONCE).json() == {"at": "b"}
    (landed,) = server.requests("GET /b")
    assert landed.path == "/b?c=1"
    assert [name for name in PRIVATE if name not in landed.headers] == []


@pytest.mark.parametrize("status", ALL)
def test_nothing_that_authenticates_goes_to_another_origin(
    transport: Transport, server: ScriptedServer, other: ScriptedServer, status: int
) -> None:
    server.on("GET /a", to(f"{other.url}/b", status))
    other.on("GET /b", Answer(body={"at": "b"}))
    assert transport.send(request("GET"), ONCE).json() == {"at": "b"}
    (first,) = server.requests("GET /a")
    (landed,) = other.requests()
    assert [name for name in PRIVATE if name not in first.headers] == []
    assert [name for name in PRIVATE if name in landed.headers] == []
    assert KEY not in repr(landed)
    assert TOKEN not in repr(landed)
    assert landed.headers["user-agent"].startswith("tinkex/")


def test_dropped_credentials_are_not_sent_again(
    transport: Transport, server: ScriptedServer, other: ScriptedServer
) -> None:
    server.on("GET /a", to(f"{other.url}/b"))
    other.on("GET /b", to(f"{server.url}/c"))
    server.on("GET /c", Answer())
    transport.send(request("GET"), ONCE)
    (landed,) = server.requests("GET /c")
    assert [name for name in PRIVATE if name in landed.headers] == []


@pytest.mark.parametrize("status", [307, 308])
def test_a_post_is_followed_unchanged(
    transport: Transport, server: ScriptedServer, other: ScriptedServer, status: int
) -> None:
    server.on("POST /a", to(f"{other.url}/b", status))
    other.on("POST /b", Answer())
    transport.send(request("POST"), ONCE)
    (sent,), (landed,) = server.requests("POST /a"), other.requests()
    for field in ("content-type", "x-idempotency-key"):
        assert landed.headers[field] == sent.headers[field]
    assert landed.body == sent.body == b'{"n":1}'
    assert [name for name in PRIVATE if name in landed.headers] == []


def test_a_body_with_a_secret_does_not_go_to_another_origin(
    transport: Transport, server: ScriptedServer, other: ScriptedServer
) -> None:
    server.on("POST /a", to(f"{other.url}/b"))
    other.on("POST /b", Answer())
    with pytest.raises(APIStatusError, match="not followed") as caught:
        transport.send(request("POST", secrets=(TOKEN,)), ONCE)
    assert caught.value.status == 307
    assert other.requests() == []


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_post_is_not_turned_into_a_get(
    transport: Transport, server: ScriptedServer, status: int
) -> None:
    server.on("POST /a", to("/b", status))
    with pytest.raises(APIStatusError) as caught:
        transport.send(request("POST"), ONCE)
    assert caught.value.status == status
    assert server.requests("GET /b") == server.requests("POST /b") == []


def test_a_redirect_loop_ends(transport: Transport, server: ScriptedServer) -> None:
    server.on("GET /a", to("/a"))
    with pytest.raises(APIStatusError) as caught:
        transport.send(request("GET"), ONCE)
    assert caught.value.status == 307
    assert len(server.requests("GET /a")) == MAX_HOPS + 1


def test_redirects_from_https_to_http_are_refused(other: ScriptedServer) -> None:
    other.on("GET /b", Answer())
    with ScriptedServer(tls=True) as secure:
        secure.on("GET /a", to(f"{other.url}/b"))
        with open_transport(secure, ca_bundle=str(CERTIFICATE), api_key=KEY) as transport:
            with pytest.raises(APIStatusError, match="not followed"):
                transport.send(request("GET"), ONCE)
    assert other.requests() == []


@pytest.mark.parametrize("location", ["http://[::1", "\xff", "x" * 5000])
def test_an_invalid_location_is_a_typed_error(
    transport: Transport, server: ScriptedServer, location: str
) -> None:
    server.on("POST /a", to(location, 302))
    with pytest.raises(APIStatusError, match="elsewhere"):
        transport.send(request("POST"), ONCE)


def test_the_error_about_a_refused_redirect_shows_the_target_without_its_signature(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on("POST /a", to("https://far.example/x?signature=abc", 302))
    with pytest.raises(APIStatusError, match=r"https://far\.example") as caught:
        transport.send(request("POST"), ONCE)
    assert "signature" not in str(caught.value)


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/b", "http://h:1/b"),
        ("b", "http://h:1/p/b"),
        ("?q=1", "http://h:1/p/a?q=1"),
        ("//other/b", "http://other/b"),
        ("https://h:1/b", "https://h:1/b"),
        ("", None),
        (None, None),
        ("file:///etc/passwd", None),
        ("gopher://h/", None),
        ("http://h:port/", None),
        ("http://[::1/", None),
        ("javascript:alert(1)", None),
    ],
)
def test_redirect_targets(location: Optional[str], target: Optional[str]) -> None:
    assert next_hop("GET", "http://h:1/p/a", 302, location) == target


@pytest.mark.parametrize("status", [200, 204, 300, 304, 305, 306, 400, 500])
def test_other_responses_are_not_redirects(status: int) -> None:
    assert next_hop("GET", "http://h/a", status, "/b") is None


@pytest.mark.parametrize(
    ("one", "other_url", "same"),
    [
        ("http://h/a", "http://h:80/b", True),
        ("https://h/a", "https://H:443/b", True),
        ("http://h/a", "https://h/a", False),
        ("http://h/a", "http://h:81/a", False),
        ("http://h/a", "http://i/a", False),
        ("http://h/a", "http://h.evil/a", False),
        ("http://h/a", "http://h@evil/a", False),
    ],
)
def test_origins(one: str, other_url: str, same: bool) -> None:
    assert same_origin(one, other_url) is same
