"""Over real HTTP, any response soon becomes a typed error or a result of the public client."""

from __future__ import annotations

import gzip
import threading
import zlib
from typing import Any, Iterator

import pytest
from api.any_reply import bodies
from api.endpoint import KEY, Clients, Endpoint
from api.rest_endpoints import REST
from api.work_endpoints import SAMPLE, TRAIN
from hypothesis import given, strategies as st
from support.properties import several
from support.raw_server import RawServer
from support.scripted_server import Answer, ScriptedServer
from support.threads import PATIENCE_S, wait_until
from support.tinker_routes import API, TinkerRoutes

import tinkex
from tinkex.errors import APIConnectionError, TinkexError

POLL = f"POST {API}retrieve_future"


@pytest.fixture(scope="module", autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Check for threads once, after the module: all its tests share these clients."""
    yield
    wait_until(
        lambda: not [t for t in threading.enumerate() if t.name.startswith("tinkex-")],
        "the clients' threads end",
    )


@pytest.fixture(scope="module")
def clients(no_thread_is_left: None) -> Iterator[Clients]:  # the check comes last
    with ScriptedServer() as server:
        TinkerRoutes(server)
        made = Clients(server, max_outage_s=0.05)
        try:
            assert made.trainer
            assert made.sampler
            yield made
        finally:
            made.close()


answers = st.builds(
    Answer,
    status=st.sampled_from([200, 200, 200, 201, 400, 404, 409, 422, 501]),
    body=bodies.filter(lambda body: b"try_again" not in body),
    content_type=st.sampled_from(["application/json", "application/x-protobuf", "text/html"]),
)


def outcome_of(endpoint: Endpoint, clients: Clients) -> Any:
    """Return the result or the error of the call, which must end soon."""
    found: Any = None

    def run() -> None:
        nonlocal found
        try:
            found = endpoint.do(clients)
        except BaseException as error:
            found = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), f"{endpoint} hangs"
    return found


def check(found: Any) -> None:
    if isinstance(found, BaseException):
        assert isinstance(found, TinkexError), repr(found)
        assert KEY not in str(found)


@several(60)
@given(endpoint=st.sampled_from(REST), answer=answers)
def test_facts(clients: Clients, endpoint: Endpoint, answer: Answer) -> None:
    clients.server.on(f"{endpoint.method} {endpoint.path}", answer)
    check(outcome_of(endpoint, clients))


@several(40)
@given(endpoint=st.sampled_from(TRAIN + SAMPLE), answer=answers)
def test_acceptance(clients: Clients, endpoint: Endpoint, answer: Answer) -> None:
    clients.server.on(f"{endpoint.method} {endpoint.path}", answer)
    clients.server.on(POLL, Answer(body={"metrics": {}}))
    check(outcome_of(endpoint, clients))


@several(60)
@given(endpoint=st.sampled_from(TRAIN + SAMPLE), answer=answers)
def test_results(clients: Clients, endpoint: Endpoint, answer: Answer) -> None:
    TinkerRoutes(clients.server)
    clients.server.on(f"{endpoint.method} {endpoint.path}", Answer(body={"request_id": "r"}))
    clients.server.on(POLL, answer)
    check(outcome_of(endpoint, clients))


# What is not even HTTP, or not quite

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
PLAIN = b'{"training_run_ids": [], "sampler_ids": []}'
BROKEN = {
    "nothing": b"",
    "no http": b"\x16\x03\x01\x02\x00garbage",
    "half a status line": b"HTTP/1.",
    "a status that is no number": b"HTTP/1.1 abc OK\r\n\r\n",
    "headers without end": OK + b"X-A: " + b"a" * 200_000,
    "a thousand headers": OK + b"X-A: a\r\n" * 1000 + b"\r\n",
    "too short a body": OK + b"Content-Length: 1000\r\n\r\n{}",
    "a length that is no number": OK + b"Content-Length: x\r\n\r\n{",
    "a broken chunk": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "chunks without end": OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
    "gzip that is none": OK + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "gzip cut off": OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(PLAIN)[:-12],
    "zstd that is none": OK + b"Content-Encoding: zstd\r\nContent-Length: 2\r\n\r\n{}",
    "an unknown encoding": OK + b"Content-Encoding: rot13\r\nContent-Length: 2\r\n\r\n{}",
    "an endless redirect": b"HTTP/1.1 302 Found\r\nLocation: /api/v1/sessions/s\r\n\r\n",
    "a redirect to nowhere": b"HTTP/1.1 302 Found\r\n\r\n",
    "a redirect elsewhere": b"HTTP/1.1 302 Found\r\nLocation: ftp://x.test/\r\n\r\n",
    "an unknown status": b"HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n",
    "only early hints": b"HTTP/1.1 103 Early Hints\r\n\r\n",
}
FINE = {
    "no length": OK + b"\r\n" + PLAIN,
    "deflate": OK + b"Content-Encoding: deflate\r\n\r\n" + zlib.compress(PLAIN),
    "gzip": OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(PLAIN),
    "no content type": b"HTTP/1.1 200 OK\r\n\r\n" + PLAIN,
    "HTTP 1.0": OK.replace(b"1.1", b"1.0") + b"\r\n" + PLAIN,
}


def get_session(url: str) -> Any:
    rest = tinkex.RestClient(
        base_url=url, api_key=KEY, max_outage_s=0.05, startup_timeout_s=0.05, read_timeout_s=2.0
    )
    with rest:
        return rest.get_session("s").result(PATIENCE_S)


@pytest.mark.parametrize("bytes_", BROKEN.values(), ids=BROKEN.keys())
def test_bytes_that_are_not_a_response(bytes_: bytes) -> None:
    with RawServer(bytes_) as server, pytest.raises(TinkexError) as failure:
        get_session(server.url)
    assert KEY not in str(failure.value)
    assert isinstance(failure.value, APIConnectionError) or failure.value.status is not None


@pytest.mark.parametrize("bytes_", FINE.values(), ids=FINE.keys())
def test_odd_but_complete_responses_are_read(bytes_: bytes) -> None:
    with RawServer(bytes_) as server:
        assert get_session(server.url).sampler_ids == []
