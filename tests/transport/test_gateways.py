"""Answers from something between client and server count as an outage, never as the server's."""

from __future__ import annotations

from typing import Any, Iterator, Tuple

import pytest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.tinker_routes import TinkerRoutes

from tinkex import ServiceClient, TrainingClient, types
from tinkex._transport.request import Reply, Request
from tinkex._transport.request_errors import describe, is_from_gateway
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.errors import APIConnectionError, NotFoundError, ResponseDecodeError
from tinkex.futures import APIFuture
from tinkex.retry import RetryPolicy

API = "/api/v1/"
HTML = b"<html><body>Please sign in</body></html>"
SOON = {"Retry-After": "0.001"}
ANY = Request("POST", "/api/v1/x")
#: Clients that give up on gateway-like answers only at their time limit.
RIDES_OUT_LONG = RetryPolicy(
    base_s=0.001, cap_s=0.001, max_elapsed_s=PATIENCE_S, max_gateway_answers=None
)
RIDES_OUT = RetryPolicy(base_s=0.001, cap_s=0.001, max_elapsed_s=0.05, max_gateway_answers=None)
QUICK = RetryPolicy(base_s=0.001, cap_s=0.001, max_elapsed_s=PATIENCE_S)


def reply(status: int, kind: str, body: bytes) -> Reply:
    return Reply(status, {"content-type": kind} if kind else {}, body)


@pytest.mark.parametrize("status", [200, 201, 302, 400, 401, 403, 404, 405, 409, 410, 422, 501])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/html", HTML),
        ("text/html; charset=utf-8", b"\r\n <!DOCTYPE html>"),
        ("application/json", HTML),
        ("", HTML),
        ("application/json", b""),
        ("", b""),
        ("application/xml", b"<?xml version='1.0'?><Error/>"),
        ("text/plain", b"default backend - 404"),
        ("text/plain; charset=utf-8", b"404 page not found\n"),
    ],
)
def test_a_web_page_or_an_empty_body_is_from_a_gateway(status: int, kind: str, body: bytes) -> None:
    assert is_from_gateway(ANY, reply(status, kind, body))


@pytest.mark.parametrize("status", [200, 202, 400, 401, 404, 410, 422])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("application/json; charset=utf-8", b"null"),
        ("application/problem+json", b'{"detail": "x"}'),
        ("application/x-protobuf", b"\x0a\x01x"),
        ("application/x-protobuf", b"<\x12 of sixty bytes"),
        ("application/x-protobuf", b""),
        ("", b' {"detail": "x"}'),
        ("text/plain", b"[1]"),
    ],
)
def test_json_and_protobuf_are_from_the_server(status: int, kind: str, body: bytes) -> None:
    assert not is_from_gateway(ANY, reply(status, kind, body))


@pytest.mark.parametrize("status", [404, 410, 422])
def test_the_plain_text_of_a_web_framework_is_from_the_server(status: int) -> None:
    assert not is_from_gateway(ANY, reply(status, "text/plain; charset=utf-8", b"Not Found"))
    assert is_from_gateway(ANY, reply(200, "text/plain", b"OK"))  # results are never plain text


@pytest.mark.parametrize("status", [408, 413, 414, 429, 431, 500, 502, 503, 504])
def test_an_unambiguous_status_is_not_questioned(status: int) -> None:
    assert not is_from_gateway(ANY, reply(status, "text/html", HTML))


def test_some_answers_are_legitimately_empty() -> None:
    assert not is_from_gateway(ANY, reply(204, "", b""))
    unread = Request("DELETE", "/api/v1/x", empty_response_ok=True)
    assert not is_from_gateway(unread, reply(200, "", b""))
    assert is_from_gateway(unread, reply(200, "text/html", HTML))
    redirected = Request("GET", "/api/v1/x", follow_redirects=False)
    assert not is_from_gateway(redirected, reply(302, "", b""))


def test_a_response_is_described_in_one_bounded_line() -> None:
    long = reply(403, "text/html; charset=utf-8", b"<html>\r\n\t<body>" + b"x" * 9999)
    text = describe(ANY, long)
    assert text.startswith("status 403, text/html, '<html> <body>xxx")
    assert len(text) < 250
    assert describe(ANY, reply(200, "", b"")) == "status 200, no content type, empty body"
    secret = Request("POST", "/api/v1/auth/token", secret_reply=True)
    assert "sign in" not in describe(secret, reply(403, "text/html", HTML))


# Requests


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        yield scripted


@pytest.fixture
def transport(server: ScriptedServer) -> Iterator[Transport]:
    made = Transport(Config.resolve(environ={}, base_url=server.url, api_key="tml-secret"))
    yield made
    made.abort()


@pytest.mark.parametrize("status", [200, 400, 404, 409, 410, 422])
def test_a_request_is_sent_again_until_the_server_answers(
    server: ScriptedServer, transport: Transport, status: int
) -> None:
    page = Answer(status, HTML, SOON, content_type="text/html")
    server.on("POST /api/v1/x", *[page] * 6, Answer(body={"done": True}))
    assert transport.send(ANY, RIDES_OUT_LONG).json() == {"done": True}
    sent = server.requests("POST /api/v1/x")
    assert len(sent) == 7
    assert len({one.headers["x-idempotency-key"] for one in sent}) == 1
    assert len({one.connection for one in sent}) == 7  # a gateway may reject a connection


@pytest.mark.parametrize("status", [200, 404])
def test_the_error_of_a_persistent_outage_shows_status_type_and_start_of_the_body(
    server: ScriptedServer, transport: Transport, status: int
) -> None:
    page = HTML.replace(b"sign in", b"sign in with tml-secret")
    server.on("POST /api/v1/x", Answer(status, page, content_type="text/html"))
    with pytest.raises(APIConnectionError) as caught:
        transport.send(ANY, RIDES_OUT)
    error = caught.value
    assert f"status {status}, text/html, '<html><body>Please sign in with" in error.message
    assert "tml-secret" not in str(error)
    assert error.status == status
    assert error.retryable
    assert error.maybe_taken is (status == 200)


@pytest.mark.parametrize(("status", "kind"), [(404, NotFoundError), (200, ResponseDecodeError)])
def test_a_persistent_page_is_believed_if_a_wrong_guess_costs_nothing(
    server: ScriptedServer, transport: Transport, status: int, kind: Any
) -> None:
    server.on("POST /api/v1/x", Answer(status, HTML, content_type="text/html"))
    with pytest.raises(kind, match="Please sign in") as caught:
        transport.send(ANY, QUICK)
    assert caught.value.attempts == len(server.requests("POST /api/v1/x")) == 4


# A run

ADAM = types.AdamParams(learning_rate=0.01)


#: Outages short enough for a test, in which a request is sent once or twice.
SHORT = pytest.mark.parametrize("run", [0.3], indirect=True)


@pytest.fixture
def run(
    server: ScriptedServer, request: pytest.FixtureRequest
) -> Iterator[Tuple[TrainingClient, TinkerRoutes]]:
    routes = TinkerRoutes(server)
    outage_s = getattr(request, "param", PATIENCE_S)
    with ServiceClient(base_url=server.url, max_outage_s=outage_s, api_key="tml-x") as service:
        yield service.create_lora_training_client("base", rank=8), routes


@pytest.mark.usefixtures("short_backoff")
@pytest.mark.parametrize("status", [200, 400, 404, 409, 410, 422])
def test_a_submission_keeps_its_number_in_spite_of_a_gateways_page(
    server: ScriptedServer, run: Tuple[TrainingClient, TinkerRoutes], status: int
) -> None:
    trainer, routes = run
    routes.serve("retrieve_future", Answer(body={"metrics": {}}))
    page = Answer(status, HTML, SOON, content_type="text/html")
    routes.serve("optim_step", page, page, Answer(body={"request_id": "r-1"}))
    trainer.optim_step(ADAM).result(PATIENCE_S)
    numbers = [one.json()["seq_id"] for one in server.requests(f"POST {API}optim_step")]
    assert len(numbers) == 3
    assert len(set(numbers)) == 1


@SHORT
@pytest.mark.parametrize("status", [400, 404, 409, 410, 422])
def test_a_number_that_no_server_has_seen_is_given_to_the_next_request(
    server: ScriptedServer, run: Tuple[TrainingClient, TinkerRoutes], status: int
) -> None:
    trainer, routes = run
    routes.serve("retrieve_future", Answer(body={"metrics": {}}))
    routes.serve("optim_step", Answer(status, HTML, content_type="text/html"))
    with pytest.raises(APIConnectionError, match=f"status {status}, text/html"):
        trainer.optim_step(ADAM).result(PATIENCE_S)
    routes.serve("optim_step", Answer(body={"request_id": "r-1"}))
    trainer.optim_step(types.AdamParams(learning_rate=0.5)).result(PATIENCE_S)
    numbers = {one.json()["seq_id"] for one in server.requests(f"POST {API}optim_step")}
    assert len(numbers) == 1


@pytest.mark.usefixtures("short_backoff")
@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 409, 410, 422])
@pytest.mark.parametrize(("kind", "body"), [("text/html", HTML), ("application/json", b"")])
def test_a_poll_that_meets_a_page_is_repeated(
    run: Tuple[TrainingClient, TinkerRoutes], status: int, kind: str, body: bytes
) -> None:
    trainer, routes = run
    page = Answer(status, body, content_type=kind)
    routes.serve("retrieve_future", page, Answer(body={"metrics": {"a:mean": 1.5}}))
    assert trainer.optim_step(ADAM).result(PATIENCE_S).metrics == {"a:mean": 1.5}


@SHORT
def test_a_poll_that_always_meets_a_page_fails_after_the_outage_limit(
    run: Tuple[TrainingClient, TinkerRoutes],
) -> None:
    trainer, routes = run
    routes.serve("retrieve_future", Answer(200, HTML, content_type="text/html"))
    with pytest.raises(APIConnectionError, match=r"status 200, text/html, '<html>.*sign in"):
        trainer.optim_step(ADAM).result(PATIENCE_S)


@pytest.mark.usefixtures("short_backoff")
@pytest.mark.parametrize("status", [200, 403, 404])
def test_a_batch_poll_that_meets_a_page_is_repeated(server: ScriptedServer, status: int) -> None:
    routes = TinkerRoutes(server)
    routes.serve("client/config", Answer(body={"sample_use_retrieve_futures": True}))

    def completed(received: Received) -> Answer:
        done = [{"request_id": name} for name in routes.results]
        return Answer(body={"completions": done, "cursor": len(done)})

    page = Answer(status, HTML, content_type="text/html")
    routes.serve("retrieve_futures", page, completed)
    with ServiceClient(base_url=server.url, api_key="tml-x") as service:
        sampler = service.create_sampling_client(base_model="base")
        sampled = sampler.sample(types.ModelInput.from_ints([1])).result(PATIENCE_S)
    assert sampled.sequences[0].tokens == [5]
    assert len(server.requests(f"POST {API}retrieve_futures")) >= 2


def test_a_heartbeat_that_meets_a_page_keeps_the_session(server: ScriptedServer) -> None:
    routes = TinkerRoutes(server)
    page = Answer(404, HTML, content_type="text/html")
    routes.serve("session_heartbeat", page, Answer(403, b""), Answer(200, HTML), Answer(body={}))
    with ServiceClient(base_url=server.url, heartbeat_interval_s=0.02) as service:
        server.wait_for(f"POST {API}session_heartbeat", 5)
        (snapshot,) = [
            one
            for one in service._runtime.session.manager.snapshot()
            if one.session_id == service.session_id
        ]
        assert snapshot.state == "alive"
        assert service._runtime.session.manager.lost_reason(service.session_id) is None


def test_a_notice_of_a_long_wait_shows_what_the_server_waits_for() -> None:
    future: APIFuture[None] = APIFuture("optim_step")
    future.queue_state, future.queue_state_reason = "active", "waits for seq_id 2 of m"
    assert "the server reports: waits for seq_id 2 of m" in str(future.status())
