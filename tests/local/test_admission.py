"""Who may use the server: no web page, and no client without the key."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import tracemalloc
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

import pytest
from servers.profiles import ProfiledServer

from tinkex import ServiceClient
from tinkex.errors import LocalServerError
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.errors import HTTPError
from tinkex.local.http.admission import Admission, Head, host_name, is_loopback, read_hosts
from tinkex.local.settings import ServerSettings
from tinkex.wire.proto_codec import PROTOBUF

JSON = "application/json"
PATH = "/api/v1/create_session"
MODELS = "/api/v1/get_server_capabilities"


def status_of(
    method: str = "POST",
    path: str = PATH,
    *,
    settings: Optional[ServerSettings] = None,
    size: Optional[int] = 2,
    bearer: bool = False,
    **headers: str,
) -> int:
    sent = {"HOST": "127.0.0.1:8642", "CONTENT_TYPE": JSON, **headers}
    admission = Admission(settings or ServerSettings(), bearer=bearer)
    try:
        admission.check(Head(method, path, sent, size))
    except HTTPError as problem:
        return problem.status
    return 200


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8642",
        "LOCALHOST:1",
        "LocalHost.",
        "localhost.:8642",
        "localhost:",
        "127.0.0.1",
        "127.0.0.1:8642",
        "127.1.2.3:9",
        "[::1]",
        "[::1]:8642",
        "[0:0:0:0:0:0:0:1]:8642",
    ],
)
def test_a_server_without_a_key_answers_to_the_names_of_loopback(host: str) -> None:
    assert status_of("GET", HOST=host) == status_of(HOST=host) == 200


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8642",
        "evil.example.",
        "localhost.evil.example",
        "evil-localhost",
        "127.0.0.1.evil.example",
        "127.0.0.1.nip.io:8642",
        "127.0.0.1:8642@evil.example",
        "evil.example@127.0.0.1",
        "evil.example, localhost",
        "localhost, evil.example",
        "localhost:8642:8642",
        "localhost:x",
        "localhost..",
        "localhost/",
        "local host",
        "0.0.0.0:8642",
        "192.168.1.7:8642",
        "[::]:8642",
        "[fe80::1]",
        "[::1",
        "::1",
        "[localhost]",
        "2130706433",
        "ⓛocalhost",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT", "OPTIONS", "HEAD"])
def test_a_server_without_a_key_answers_to_no_other_name(host: str, method: str) -> None:
    assert status_of(method, HOST=host) == 421
    assert status_of(method, "/api/v1/healthz", HOST=host) == 421
    assert status_of(method, "/signed/archive/x", HOST=host) == 421


def test_names_that_the_server_was_started_with_are_accepted_too() -> None:
    settings = ServerSettings(allowed_hosts=("Tinker.Example.com:8642", "10.0.0.7", "fe80::1"))
    for host in ("tinker.example.com", "TINKER.example.com.:80", "10.0.0.7:1", "[FE80::1]:8642"):
        assert status_of(settings=settings, HOST=host) == 200
    for host in ("a.tinker.example.com", "example.com", "10.0.0.8"):
        assert status_of(settings=settings, HOST=host) == 421
    assert status_of(settings=settings) == 200


def test_a_server_with_a_key_may_be_reached_by_any_name() -> None:
    settings = ServerSettings(api_key="tml-k")
    assert status_of(settings=settings, HOST="gpu-box:8642", X_API_KEY="tml-k") == 200
    assert status_of(settings=settings, HOST="gpu-box:8642") == 401


@pytest.mark.parametrize("name", ["http://x", "a/b", "a b", "", ":80", "*", "a,b", "[x]"])
def test_only_host_names_can_be_allowed(name: str) -> None:
    with pytest.raises(LocalServerError, match="not the name of a host"):
        LocalServer(DeterministicEngine(), settings=ServerSettings(allowed_hosts=(name,)))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize(
    "headers",
    [
        {"ORIGIN": "http://evil.example"},
        {"ORIGIN": "http://evil.example:8642"},
        {"ORIGIN": "null"},
        {"ORIGIN": "http://localhost:3000"},
        {"ORIGIN": "https://127.0.0.1"},
        {"ORIGIN": "http://127.0.0.1:8642.evil.example"},
        {"ORIGIN": "http://127.0.0.1:8642@evil.example"},
        {"ORIGIN": "file://"},
        {"ORIGIN": "chrome-extension://127.0.0.1:8642"},
        {"ORIGIN": "http://[::1"},
        {"SEC_FETCH_SITE": "cross-site"},
        {"SEC_FETCH_SITE": "same-site"},
        {"SEC_FETCH_SITE": "Cross-Site"},
        {"ORIGIN": "http://evil.example", "SEC_FETCH_SITE": "same-origin"},
    ],
)
def test_a_page_of_another_site_changes_nothing(method: str, headers: Dict[str, str]) -> None:
    assert status_of(method, **headers) == status_of(method, size=0, **headers) == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"ORIGIN": "http://127.0.0.1:8642"},
        {"ORIGIN": "http://127.0.0.1:8642", "SEC_FETCH_SITE": "same-origin"},
        {"ORIGIN": "HTTP://LOCALHOST", "HOST": "localhost:80"},
        {"ORIGIN": "https://localhost", "HOST": "localhost:443"},
        {"SEC_FETCH_SITE": "none"},
        {"SEC_FETCH_SITE": "same-origin"},
    ],
)
def test_the_server_is_open_to_its_own_origin(headers: Dict[str, str]) -> None:
    assert status_of(**headers) == 200


def test_a_page_behind_a_proxy_is_admitted_by_the_name_of_the_proxy() -> None:
    settings = ServerSettings(allowed_hosts=("tinker.example.com",))
    origin = "https://tinker.example.com"
    for host in ("tinker.example.com", "127.0.0.1:8642"):  # proxies may pass the Host on
        assert status_of(settings=settings, HOST=host, ORIGIN=origin) == 200
    assert status_of(settings=settings, ORIGIN="https://tinker.example.com.evil.example") == 403


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "text/plain; application/json", "application/x-www-form-urlencoded",
     "multipart/form-data; boundary=x", "application/jsonx", "application/json, text/plain"],
)  # fmt: skip
def test_a_body_that_a_browser_would_send_anywhere_is_refused(kind: str) -> None:
    assert status_of(CONTENT_TYPE=kind) == status_of(CONTENT_TYPE=kind, size=None) == 415
    assert status_of("PUT", CONTENT_TYPE=kind) == 415
    assert status_of(CONTENT_TYPE=kind, size=0) == 200  # an empty body cannot be misread


@pytest.mark.parametrize(
    "kind", [JSON, "Application/JSON; charset=utf-8", PROTOBUF.content_type, "application/protobuf"]
)
def test_bodies_are_json_or_protobuf(kind: str) -> None:
    assert status_of(CONTENT_TYPE=kind) == 200


def test_every_route_but_health_and_signed_urls_requires_the_key() -> None:
    settings = ServerSettings(api_key="tml-k\u00e9y")
    for path, method in itertools.product((PATH, "/api/v1/checkpoints", "/x"), ("GET", "POST")):
        assert status_of(method, path, settings=settings) == 401
        assert status_of(method, path, settings=settings, X_API_KEY="tml-k") == 401
        assert status_of(method, path, settings=settings, X_API_KEY="tml-k\u00e9y") == 200
    for path in ("/api/v1/healthz", "/signed/archive/a/weights/b"):
        assert status_of("GET", path, settings=settings) == 200


def test_a_bearer_key_counts_only_if_the_server_accepts_it() -> None:
    settings = ServerSettings(api_key="tml-k")
    given = {"AUTHORIZATION": "Bearer tml-k"}
    assert status_of(settings=settings, **given) == 401
    assert status_of(settings=settings, bearer=True, **given) == 200


def test_host_headers_are_parsed() -> None:
    assert host_name(" LOCALHOST.:1 ") == "localhost"
    assert host_name("[::1]:5") == "::1"
    assert host_name(".") is None
    assert read_hosts(["[::1]:5", "::2"]) == {"::1", "::2"}
    assert not is_loopback("8.8.8.8")


# Over a socket


@pytest.fixture
def open_server() -> Iterator[LocalServer]:
    with LocalServer(DeterministicEngine()) as server:
        yield server


def port_of(server: LocalServer) -> int:
    return int(server.url.rpartition(":")[2])


def send(
    server: LocalServer, method: str, path: str, headers: Mapping[str, str], body: bytes = b""
) -> Tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    if body:
        headers = {**headers, "Content-Length": str(len(body))}
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    try:
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_a_page_whose_name_was_rebound_neither_reads_nor_deletes(open_server: LocalServer) -> None:
    with ServiceClient(base_url=open_server.url) as service:
        trainer = service.create_lora_training_client("deterministic", rank=4)
        path = trainer.save_state("precious").result().path
        run = path.split("/")[2]
        evil = {"Host": "evil.example:8642", "Origin": "http://evil.example:8642"}
        for method, route in [
            ("GET", "checkpoints"),
            ("GET", "healthz"),
            ("GET", f"training_runs/{run}/checkpoints/weights/precious/archive"),
            ("DELETE", f"training_runs/{run}/checkpoints/weights/precious"),
            ("POST", "create_session"),
            ("GET", "nothing"),
        ]:
            status, reply = send(open_server, method, f"/api/v1/{route}", evil)
            assert status == 421
            assert "--allow-host" in reply["detail"]
        left = service.create_rest_client().list_checkpoints(run).result().checkpoints
        assert [checkpoint.checkpoint_id for checkpoint in left] == ["weights/precious"]


def test_a_page_of_another_site_cannot_have_the_browser_send_requests(
    open_server: LocalServer,
) -> None:
    host = {"Host": f"127.0.0.1:{port_of(open_server)}"}
    before = open_server._backend.store.all_sessions()
    for headers, status in [
        ({"Content-Type": "text/plain", "Origin": "http://evil.example"}, 403),
        ({"Content-Type": "text/plain", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({}, 415),
    ]:
        found, reply = send(open_server, "POST", PATH, {**host, **headers}, b"{}")
        assert (found, set(reply)) == (status, {"detail"})
    assert open_server._backend.store.all_sessions() == before
    assert send(open_server, "POST", PATH, {**host, "Content-Type": JSON}, b"{}")[0] == 200


def test_two_host_headers_are_refused(open_server: LocalServer) -> None:
    with socket.create_connection(("127.0.0.1", port_of(open_server)), timeout=20) as raw:
        raw.sendall(
            b"GET /api/v1/healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n"
            b"Connection: close\r\n\r\n"
        )
        with raw.makefile("rb") as stream:
            assert b" 421 " in stream.readline()


def test_a_profile_keeps_web_pages_out_too() -> None:
    for profile in ("hosted", "skyrl-0.4", "tuft-0.2"):
        with ProfiledServer(DeterministicEngine(), profile=profile) as server:
            evil = {"Host": "evil.example", "X-API-Key": "tml-x", "Content-Type": JSON}
            assert send(server, "POST", PATH, evil, b"{}")[0] == 421
            evil["Host"] = f"127.0.0.1:{port_of(server)}"
            assert send(server, "POST", PATH, {**evil, "Origin": "http://evil"}, b"{}")[0] == 403
            assert send(server, "GET", MODELS, evil)[0] == 200


@pytest.mark.parametrize("profile", [None, "tuft-0.2", "hatchery-0.3"])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_of_requests_without_the_key_are_not_kept(
    profile: Optional[str], chunked: bool
) -> None:
    """40 bodies of 8 MB, sent except for their last bytes, would take 320 MB if they were kept."""
    part = b"x" * (8 << 20)
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: tml-wrong\r\n"
    head += f"Content-Type: {JSON}\r\n"
    last = b"y"
    if chunked:
        head += "Transfer-Encoding: chunked\r\n\r\n"
        part, last = b"%x\r\n%b\r\n" % (len(part), part), b"1\r\ny\r\n0\r\n\r\n"
    else:
        head += f"Content-Length: {len(part) + 1}\r\n\r\n"
    with ProfiledServer(DeterministicEngine(), api_key="tml-right", profile=profile) as server:
        address = ("127.0.0.1", port_of(server))
        streams = [socket.create_connection(address, timeout=20) for _ in range(40)]
        tracemalloc.start()
        try:
            for stream in streams:
                stream.sendall(head.encode() + part)
            for stream in streams:
                stream.sendall(last)
                with stream.makefile("rb") as file:
                    assert file.readline().split()[1] in (b"401", b"403")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            for stream in streams:
                stream.close()
        assert peak < 100 << 20
        key = {"Host": "localhost", "X-API-Key": "tml-right"}
        assert send(server, "GET", MODELS, key)[0] == 200
