"""Every endpoint, through the public client: the exact request, and the results of the answers."""

from __future__ import annotations

import json
import threading
from typing import Any, Iterator
from urllib.parse import parse_qsl

import pytest
from api.endpoint import KEY, Clients, Endpoint, with_strangers
from api.rest_endpoints import REST
from api.work_endpoints import WORK
from support.scripted_server import Answer, Received, ScriptedServer
from support.threads import wait_until
from support.tinker_routes import TinkerRoutes

import tinkex
from tinkex.errors import ResponseDecodeError

ALL = REST + WORK
ANSWERED = [one for one in ALL if one.least is not None]
FULLER = [one for one in ALL if one.most is not None]

every = pytest.mark.parametrize("endpoint", ALL, ids=str)


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
        made = Clients(server)
        try:
            yield made
        finally:
            made.close()


def call(clients: Clients, endpoint: Endpoint, answer: Any) -> Any:
    """Make the call of *endpoint* with *answer* as its response; return what the user gets."""
    server = clients.server
    warm = (clients.trainer, clients.sampler, clients.rest, clients.admin)
    assert all(warm)
    found = Answer(body=answer) if answer is not None else Answer(204, b"")
    routes = [f"{endpoint.method} {endpoint.path}"]
    if endpoint.polled:
        accepted = Answer(body={"request_id": "r-1"})
        server.on(routes[0], accepted)
        routes.append("POST /api/v1/retrieve_future")
        server.on(routes[1], found)
    else:
        server.on(routes[0], found)
    try:
        return endpoint.do(clients)
    finally:
        TinkerRoutes(server)  # restores the routes


def sent(clients: Clients, endpoint: Endpoint, answer: Any) -> Received:
    """Return the only request that the call sends to its route."""
    before = len(clients.server.requests(f"{endpoint.method} {endpoint.path}"))
    call(clients, endpoint, answer)
    requests = clients.server.requests(f"{endpoint.method} {endpoint.path}")[before:]
    assert len(requests) == 1
    return requests[0]


@every
def test_the_request(clients: Clients, endpoint: Endpoint) -> None:
    request = sent(clients, endpoint, endpoint.least)
    path, _, query = request.path.partition("?")
    assert path == endpoint.path
    assert dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))) == dict(
        endpoint.query
    )
    if endpoint.body is None:
        assert request.body == b""
    else:
        assert json.loads(request.body) == endpoint.body
    headers = request.headers
    assert headers["x-api-key"] == KEY
    assert "authorization" not in headers
    assert headers["accept"].split(", ")[-1] == "application/json"
    assert headers["user-agent"].startswith("tinkex/")
    for name, value in endpoint.headers.items():
        assert headers[name] == value
    if endpoint.method == "GET":
        assert "x-idempotency-key" not in headers
        assert "content-type" not in headers
    else:
        assert headers["x-idempotency-key"]
        assert headers["content-type"] == "application/json"


@pytest.mark.parametrize("endpoint", ANSWERED, ids=str)
def test_a_response_with_the_required_fields_only(clients: Clients, endpoint: Endpoint) -> None:
    assert call(clients, endpoint, endpoint.least) == endpoint.least_gives


@pytest.mark.parametrize("endpoint", FULLER, ids=str)
def test_a_response_with_every_field(clients: Clients, endpoint: Endpoint) -> None:
    assert call(clients, endpoint, endpoint.most) == endpoint.most_gives


@pytest.mark.parametrize("endpoint", ANSWERED, ids=str)
def test_fields_of_a_newer_server_are_ignored(clients: Clients, endpoint: Endpoint) -> None:
    stranger = with_strangers(endpoint.least, endpoint.maps)
    assert call(clients, endpoint, stranger) == endpoint.least_gives
    if endpoint.most is not None:
        stranger = with_strangers(endpoint.most, endpoint.maps)
        assert call(clients, endpoint, stranger) == endpoint.most_gives


@pytest.mark.parametrize("endpoint", FULLER, ids=str)
def test_a_null_is_the_same_as_a_missing_field(clients: Clients, endpoint: Endpoint) -> None:
    optional = {key: None for key in endpoint.most if key not in endpoint.least}
    assert call(clients, endpoint, {**optional, **endpoint.least}) == endpoint.least_gives


@pytest.mark.parametrize("endpoint", ANSWERED, ids=str)
def test_a_response_without_a_required_field_is_refused(
    clients: Clients, endpoint: Endpoint
) -> None:
    for missing in set(endpoint.least) - set(endpoint.spare):
        rest = {key: value for key, value in endpoint.least.items() if key != missing}
        with pytest.raises(ResponseDecodeError, match=missing):
            call(clients, endpoint, rest)


@pytest.mark.parametrize("body", [b"null", b"[]", b'"text"', b"{"])
@pytest.mark.parametrize("endpoint", ANSWERED, ids=str)
def test_a_response_that_is_not_an_object_is_refused(
    clients: Clients, endpoint: Endpoint, body: bytes
) -> None:
    with pytest.raises(ResponseDecodeError):
        call(clients, endpoint, body)


@pytest.mark.parametrize("endpoint", [one for one in ALL if one.least is None], ids=str)
@pytest.mark.parametrize("body", [b"", b"null", b"not json"])
def test_if_no_response_is_expected_any_response_is_accepted(
    clients: Clients, endpoint: Endpoint, body: bytes
) -> None:
    assert call(clients, endpoint, body) is None


# Nothing is forgotten

#: Public methods that send no request of their own, or whose requests other tests check.
ELSEWHERE = {
    "close": "test_session_requests",
    "create_future": "behind create_sampling_client",
    "create_custom_loss": "tests/training/test_custom_loss.py",
    "create_rest_client": "sends nothing",
    "download_checkpoint": "tests/downloads/test_downloads.py",
    "forward": "test_passes",
    "forward_backward": "test_passes",
    "forward_backward_custom": "tests/training/test_custom_loss.py",
    "from_sampler_handle": "sends nothing",
    "get_base_model": "get_sampler",
    "get_console_url": "sends nothing",
    "get_sampler_handle": "sends nothing",
    "open_run": "tests/runs/test_runs.py",
    "get_telemetry": "sends nothing",
    "get_tokenizer": "get_sampler and get_info",
    "inflight": "sends nothing",
    "local": "tests/clients/test_local_service.py",
    "metrics": "sends nothing",
    "pipeline": "forward_backward and optim_step",
    "push_to_hub": "tests/downloads/test_downloads.py",
    "result": "sends nothing",
    "sample_many": "sample",
    "train_step": "forward_backward and optim_step",
    "usage": "sends nothing",
    "whoami": "test_session_requests",
    "coroutine": "test_awaiting",
    "get_session_id": "sends nothing",
}
CLIENTS = (
    tinkex.ServiceClient,
    tinkex.TrainingClient,
    tinkex.SamplingClient,
    tinkex.RestClient,
    tinkex.AdminClient,
)


def test_every_public_method_has_a_row() -> None:
    methods = {
        name
        for client in CLIENTS
        for name in dir(client)
        if not name.startswith("_") and callable(getattr(client, name))
    }
    methods -= {name for name in methods if name.endswith(("_future", "_async"))}  # twins
    rows = {one.name.partition(" ")[0] for one in ALL}
    assert methods - rows - set(ELSEWHERE) == set(), "give it a row, or say where it is tested"
    assert rows - methods == set()
