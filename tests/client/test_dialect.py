"""Dialect: the encoding of batches, settled once from the server's answers."""

from __future__ import annotations

from typing import Any, Iterator, List

import pytest
from support.scripted_server import Answer, Received, ScriptedServer
from support.transports import open_transport, quick_config

from tinkex import retry
from tinkex.dialect import Dialect
from tinkex.errors import (
    APIConnectionError,
    APIStatusError,
    BadRequestError,
    ConflictError,
    InternalServerError,
)
from tinkex.transport import Transport
from tinkex.types import Datum, ForwardBackwardRequest, ModelInput
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

ROUTE = "POST /api/v1/forward_backward"
FORWARD = "POST /api/v1/forward"
ACCEPTED = Answer(body={"request_id": "r-1"})
PLAIN_500 = Answer(500, b"Internal Server Error", content_type="text/plain")


def batch(seq_id: int = 7, forward_only: bool = False) -> ForwardBackwardRequest:
    datum = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
    return ForwardBackwardRequest("m", seq_id, [datum], "cross_entropy", {}, forward_only)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    real = retry.RetryPolicy.delay_s
    monkeypatch.setattr(
        retry.RetryPolicy,
        "delay_s",
        lambda *args: None if real(*args) is None else 0.001,
    )


@pytest.fixture
def transport(server: ScriptedServer) -> Iterator[Transport]:
    with open_transport(server) as opened:
        yield opened


def encodings(server: ScriptedServer) -> List[str]:
    return [r.headers["content-type"].rpartition("/")[2] for r in server.requests()]


def only(content_type: str, refusal: Answer) -> Any:
    """A server that reads one encoding and answers *refusal* to the other."""

    def answer(received: Received) -> Answer:
        return ACCEPTED if received.headers["content-type"] == content_type else refusal

    return answer


def seq_ids(server: ScriptedServer) -> List[int]:
    return [
        (JSON if r.headers["content-type"] == JSON.content_type else PROTOBUF)
        .decode_forward_backward(r.body)
        .seq_id
        for r in server.requests()
    ]


def test_protobuf_goes_first_and_is_remembered(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, ACCEPTED)
    dialect = Dialect(transport.config)
    assert dialect.codec is None
    assert dialect.submit(transport, batch(1)).request_id == "r-1"
    dialect.submit(transport, batch(2))
    assert encodings(server) == ["x-protobuf", "x-protobuf"]
    assert Dialect(transport.config).codec is PROTOBUF  # for the base URL, not the object


@pytest.mark.parametrize(
    "refusal",
    [
        Answer(415, {"detail": "Unsupported Media Type"}),
        Answer(422, {"detail": [{"type": "json_invalid"}]}),
        Answer(400, {"detail": "body cannot be decoded"}),
        PLAIN_500,  # SkyRL 0.3, hatchery-core
    ],
)
def test_a_server_that_cannot_read_protobuf_gets_json_under_the_same_number(
    transport: Transport, server: ScriptedServer, refusal: Answer
) -> None:
    server.on(ROUTE, only("application/json", refusal))
    dialect = Dialect(transport.config)
    assert dialect.submit(transport, batch(7)).request_id == "r-1"
    assert encodings(server) == ["x-protobuf", "json"]
    assert seq_ids(server) == [7, 7]
    assert dialect.codec is JSON
    dialect.submit(transport, batch(8))
    assert encodings(server) == ["x-protobuf", "json", "json"]  # settled once


def test_a_forward_pass_has_its_own_route_in_json_only(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, Answer(415))
    server.on(FORWARD, ACCEPTED)
    Dialect(transport.config).submit(transport, batch(1, forward_only=True))
    assert [r.path for r in server.requests()] == [
        "/api/v1/forward_backward",
        "/api/v1/forward",
    ]


@pytest.mark.parametrize(("wire", "expected"), [("json", "json"), ("protobuf", "x-protobuf")])
def test_a_forced_encoding_is_the_only_one_sent(
    server: ScriptedServer, wire: str, expected: str
) -> None:
    server.on(ROUTE, Answer(400, {"detail": "no"}))
    with open_transport(server, wire=wire) as transport:
        dialect = Dialect(transport.config)
        assert dialect.codec is not None
        with pytest.raises(BadRequestError):
            dialect.submit(transport, batch())
    assert encodings(server) == [expected]


def test_if_both_refuse_both_are_reported(transport: Transport, server: ScriptedServer) -> None:
    server.on(ROUTE, Answer(400, {"detail": "first"}), Answer(422, {"detail": "second"}))
    dialect = Dialect(transport.config)
    with pytest.raises(APIStatusError, match="second") as caught:
        dialect.submit(transport, batch())
    assert "first" in str(caught.value)
    assert isinstance(caught.value.__cause__, BadRequestError)
    assert dialect.codec is None  # nothing was learnt


def test_a_bad_batch_on_a_server_without_json_is_reported_as_such(
    transport: Transport, server: ScriptedServer
) -> None:
    bad = Answer(400, {"detail": "loss 'x' is unknown"})
    server.on(ROUTE, bad, Answer(415, {"detail": "json"}), bad, ACCEPTED)
    dialect = Dialect(transport.config)
    with pytest.raises(BadRequestError, match="loss 'x' is unknown"):
        dialect.submit(transport, batch(1))
    assert dialect.codec is PROTOBUF  # the 415 has told
    with pytest.raises(BadRequestError):
        dialect.submit(transport, batch(2))
    assert encodings(server) == ["x-protobuf", "json", "x-protobuf"]


def test_a_bad_batch_on_a_server_without_protobuf_is_reported_as_such(
    transport: Transport, server: ScriptedServer
) -> None:
    bad = Answer(400, {"detail": "loss 'x' is unknown"})
    server.on(ROUTE, Answer(415, {"detail": "protobuf"}), bad)
    dialect = Dialect(transport.config)
    with pytest.raises(BadRequestError, match="loss 'x' is unknown"):
        dialect.submit(transport, batch(1))
    assert dialect.codec is JSON


def test_a_bad_batch_that_used_its_number_up_is_reported_as_such(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(
        ROUTE, Answer(400, {"detail": "too long"}), Answer(409, {"detail": "7 was used"}), ACCEPTED
    )
    dialect = Dialect(transport.config)
    with pytest.raises(BadRequestError, match="too long"):
        dialect.submit(transport, batch())
    assert dialect.codec is PROTOBUF  # which was read, so that is settled
    dialect.submit(transport, batch(8))
    assert encodings(server) == ["x-protobuf", "json", "x-protobuf"]


def test_a_passing_500_on_a_server_without_json_is_ridden_out(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, PLAIN_500, Answer(415), PLAIN_500, ACCEPTED)
    dialect = Dialect(transport.config)
    assert dialect.submit(transport, batch(3)).request_id == "r-1"
    assert encodings(server) == ["x-protobuf", "json", "x-protobuf", "x-protobuf"]
    assert seq_ids(server) == [3] * 4


def test_other_answers_are_not_about_the_encoding(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, Answer(409, {"detail": "conflict"}))
    with pytest.raises(ConflictError):
        Dialect(transport.config).submit(transport, batch())
    assert encodings(server) == ["x-protobuf"]


def test_an_outage_is_not_about_the_encoding(transport: Transport, server: ScriptedServer) -> None:
    server.on(ROUTE, Answer(503), Answer(drop=True), ACCEPTED)
    Dialect(transport.config).submit(transport, batch())
    assert encodings(server) == ["x-protobuf"] * 3


def test_once_settled_a_500_is_only_a_500(transport: Transport, server: ScriptedServer) -> None:
    server.on(ROUTE, ACCEPTED, PLAIN_500)
    dialect = Dialect(transport.config)
    dialect.submit(transport, batch(1))
    with pytest.raises(InternalServerError):
        dialect.submit(transport, batch(2))
    assert encodings(server) == ["x-protobuf"] * 5


def test_a_server_that_is_gone_teaches_nothing(server: ScriptedServer) -> None:
    config = quick_config(server, max_outage_s=0.05)
    server.close()
    with open_transport(server, max_outage_s=0.05) as transport:
        dialect = Dialect(config)
        with pytest.raises(APIConnectionError):
            dialect.submit(transport, batch())
    assert dialect.codec is None
