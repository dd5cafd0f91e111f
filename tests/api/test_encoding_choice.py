"""The encoding of batches, settled once from the server's responses."""

from __future__ import annotations

import dataclasses
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Iterator, List

import pytest
import zstandard
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.transports import open_transport

from tinkex import retry
from tinkex._api.encoding_choice import (
    batch_codec,
    server_dialect,
    submit_batch,
)
from tinkex._api.sampling import get_sampler
from tinkex._runtime import late_import
from tinkex._transport.server_state import ServerDialect
from tinkex._transport.transport import Transport
from tinkex.errors import (
    APIConnectionError,
    APIStatusError,
    BadRequestError,
    ClientClosedError,
    ConflictError,
    InternalServerError,
    NotFoundError,
    RouteMissingError,
)
from tinkex.types import Datum, ForwardBackwardRequest, ModelInput, PromptProvenanceSpan
from tinkex.wire.codec import can_compress
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

ROUTE = "POST /api/v1/forward_backward"
FORWARD = "POST /api/v1/forward"
ACCEPTED = Answer(body={"request_id": "r-1"})
PLAIN_500 = Answer(500, b"Internal Server Error", content_type="text/plain")


DATUM = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})


def batch(seq_id: int = 7, forward_only: bool = False) -> ForwardBackwardRequest:
    return ForwardBackwardRequest("m", seq_id, [DATUM], "cross_entropy", {}, forward_only)


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
    """Script a server that reads one encoding and answers *refusal* to the other."""

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


def test_protobuf_is_tried_first_and_remembered(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, ACCEPTED)
    assert batch_codec(transport) is None
    assert submit_batch(transport, batch(1)).request_id == "r-1"
    submit_batch(transport, batch(2))
    assert encodings(server) == ["x-protobuf", "x-protobuf"]
    assert batch_codec(transport) is PROTOBUF  # remembered for the base URL, not the object


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
    assert submit_batch(transport, batch(7)).request_id == "r-1"
    assert encodings(server) == ["x-protobuf", "json"]
    assert seq_ids(server) == [7, 7]
    assert batch_codec(transport) is JSON
    submit_batch(transport, batch(8))
    assert encodings(server) == ["x-protobuf", "json", "json"]  # settled once


def test_a_forward_pass_has_its_own_route_in_json_only(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, Answer(415))
    server.on(FORWARD, ACCEPTED)
    submit_batch(transport, batch(1, forward_only=True))
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
        assert batch_codec(transport) is not None
        with pytest.raises(BadRequestError):
            submit_batch(transport, batch())
    assert encodings(server) == [expected]


def test_if_both_encodings_are_refused_both_refusals_are_reported(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, Answer(400, {"detail": "first: no JSON"}), Answer(422, {"detail": "second"}))
    with pytest.raises(APIStatusError, match="second") as caught:
        submit_batch(transport, batch())
    assert "first" in str(caught.value)
    assert isinstance(caught.value.__cause__, BadRequestError)
    assert batch_codec(transport) is None  # nothing is settled


@pytest.mark.parametrize(
    "refusal",
    [
        Answer(400, {"detail": "loss 'x' is unknown"}),
        Answer(400, {"detail": "datum 3: target_tokens is a sparse tensor of 2 rows"}),
        Answer(422, {"detail": [{"type": "literal_error", "loc": ["body", "loss_fn"]}]}),
    ],
)
def test_a_refusal_of_the_contents_of_a_batch_is_final(
    transport: Transport, server: ScriptedServer, refusal: Answer
) -> None:
    server.on(ROUTE, refusal, ACCEPTED)
    with pytest.raises(APIStatusError) as caught:
        submit_batch(transport, batch(1))
    assert caught.value.status == refusal.status
    assert caught.value.hint is None
    assert caught.value.__cause__ is None
    assert batch_codec(transport) is None  # a proxy may have refused it
    submit_batch(transport, batch(2))
    assert encodings(server) == ["x-protobuf", "x-protobuf"]
    assert batch_codec(transport) is PROTOBUF


def test_a_bad_batch_on_a_server_without_protobuf_is_reported_as_such(
    transport: Transport, server: ScriptedServer
) -> None:
    bad = Answer(400, {"detail": "loss 'x' is unknown"})
    server.on(ROUTE, Answer(415, {"detail": "protobuf"}), bad)
    with pytest.raises(BadRequestError, match="loss 'x' is unknown"):
        submit_batch(transport, batch(1))
    assert batch_codec(transport) is JSON


def test_a_server_without_json_is_retried_after_a_temporary_500(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, PLAIN_500, Answer(415), PLAIN_500, ACCEPTED)
    assert submit_batch(transport, batch(3)).request_id == "r-1"
    assert encodings(server) == ["x-protobuf", "json", "x-protobuf", "x-protobuf"]
    assert seq_ids(server) == [3] * 4


def test_other_responses_are_not_about_the_encoding(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, Answer(409, {"detail": "conflict"}))
    with pytest.raises(ConflictError):
        submit_batch(transport, batch())
    assert encodings(server) == ["x-protobuf"]


def test_an_outage_is_not_about_the_encoding(transport: Transport, server: ScriptedServer) -> None:
    server.on(ROUTE, Answer(503), Answer(drop=True), ACCEPTED)
    submit_batch(transport, batch())
    assert encodings(server) == ["x-protobuf"] * 3


def test_after_the_encoding_is_settled_a_500_is_an_ordinary_error(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, ACCEPTED, PLAIN_500)
    submit_batch(transport, batch(1))
    with pytest.raises(InternalServerError):
        submit_batch(transport, batch(2))
    assert encodings(server) == ["x-protobuf"] * 5


def test_for_a_batch_without_a_json_form_the_first_response_is_reported(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, Answer(400, {"detail": "the spans cannot be decoded"}))
    span = PromptProvenanceSpan("s", length=3)
    with_spans = dataclasses.replace(batch(), data=[DATUM.with_provenance([span], [span])])
    with pytest.raises(BadRequestError, match="the spans cannot be decoded") as caught:
        submit_batch(transport, with_spans)
    assert "no JSON form" in str(caught.value)
    assert encodings(server) == ["x-protobuf"]


def test_a_server_without_the_forward_route_speaks_protobuf(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, PLAIN_500, ACCEPTED)
    server.on(FORWARD, Answer(404, {"detail": "Not Found"}))
    assert submit_batch(transport, batch(1, forward_only=True)).request_id == "r-1"
    assert batch_codec(transport) is PROTOBUF


def test_two_equal_refusals_are_reported_once(transport: Transport, server: ScriptedServer) -> None:
    server.on(ROUTE, Answer(400, {"detail": "input 'x' is missing"}))
    with pytest.raises(BadRequestError) as caught:
        submit_batch(transport, batch())
    assert encodings(server) == ["x-protobuf", "json"]
    assert caught.value.hint is None
    assert str(caught.value).count("input 'x'") == 1


def test_a_conflict_caused_by_the_search_itself_is_not_reported(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, Answer(400, {"detail": "input 'x' is missing"}), Answer(409), ACCEPTED)
    with pytest.raises(BadRequestError, match="input 'x'") as caught:
        submit_batch(transport, batch())
    assert batch_codec(transport) is PROTOBUF  # the server has read it, so the encoding is settled
    submit_batch(transport, batch(8))
    assert encodings(server) == ["x-protobuf", "json", "x-protobuf"]
    assert caught.value.hint is None
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__  # nor is the conflict shown as context
    assert "ConflictError" not in "".join(
        traceback.format_exception(caught.type, caught.value, caught.tb)
    )


# Many concurrently


def test_concurrent_first_batches_settle_the_encoding_once(
    transport: Transport, server: ScriptedServer
) -> None:
    refusal = Answer(415, hold=threading.Event())
    server.on(ROUTE, only("application/json", refusal))
    arrived = threading.Semaphore(0)

    def submit(seq_id: int) -> str:
        arrived.release()
        return submit_batch(transport, batch(seq_id)).request_id

    with ThreadPoolExecutor(20) as pool:
        ids = [pool.submit(submit, seq_id) for seq_id in range(1, 21)]
        for _ in range(20):
            assert arrived.acquire(timeout=PATIENCE_S)
        server.wait_for(ROUTE, 1)
        assert refusal.hold is not None
        refusal.hold.set()
        assert [f.result(PATIENCE_S) for f in ids] == ["r-1"] * 20
    assert encodings(server) == ["x-protobuf"] + ["json"] * 20
    assert sorted(seq_ids(server)[1:]) == list(range(1, 21))


def test_a_client_that_waits_for_another_ones_first_batch_can_be_closed(
    transport: Transport, server: ScriptedServer
) -> None:
    held = Answer(body={"request_id": "r-1"}, hold=threading.Event())
    server.on(ROUTE, held)
    with open_transport(server) as other, ThreadPoolExecutor(2) as pool:
        first = pool.submit(submit_batch, transport, batch(1))
        server.wait_for(ROUTE, 1)
        second = pool.submit(submit_batch, other, batch(2))
        other.closing.set()
        assert isinstance(second.exception(PATIENCE_S), ClientClosedError)
        assert not first.done()
        assert held.hold is not None
        held.hold.set()
        assert first.result(PATIENCE_S).request_id == "r-1"
    assert len(server.requests(ROUTE)) == 1


def test_the_failure_of_the_first_batch_does_not_fail_the_next(
    transport: Transport, server: ScriptedServer
) -> None:
    bad = Answer(400, {"detail": "loss 'x' is unknown"}, hold=threading.Event())
    server.on(ROUTE, bad, ACCEPTED)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(submit_batch, transport, batch(1))
        server.wait_for(ROUTE, 1)
        second = pool.submit(submit_batch, transport, batch(2))
        assert bad.hold is not None
        bad.hold.set()
        assert isinstance(first.exception(PATIENCE_S), BadRequestError)
        assert second.result(PATIENCE_S).request_id == "r-1"
    assert seq_ids(server) == [1, 2]


# Compression


def test_batches_are_compressed_once_the_encoding_is_settled(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(ROUTE, ACCEPTED)
    for seq_id in (1, 2):
        submit_batch(transport, batch(seq_id), compress=True)
    plain, packed = server.requests(ROUTE)
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "zstd"
    unpacked = zstandard.ZstdDecompressor().decompress(packed.body)
    assert PROTOBUF.decode_forward_backward(unpacked) == batch(2)
    assert server_dialect(transport) == ServerDialect("protobuf", "zstd")
    assert str(server_dialect(transport)) == "batches as protobuf (zstd)"


def test_a_server_that_cannot_decompress_gets_plain_bodies(
    transport: Transport, server: ScriptedServer
) -> None:
    def answer(received: Received) -> Answer:
        return Answer(415) if "content-encoding" in received.headers else ACCEPTED

    server.on(ROUTE, answer)
    for seq_id in (1, 2, 3):
        submit_batch(transport, batch(seq_id), compress=True)
    packed = ["content-encoding" in r.headers for r in server.requests(ROUTE)]
    assert packed == [False, True, False, False]
    assert server_dialect(transport).compression is None


def test_without_zstandard_nothing_is_compressed(
    transport: Transport, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)  # its import fails
    monkeypatch.delitem(late_import._modules, "zstandard", raising=False)
    can_compress.cache_clear()
    server.on(ROUTE, ACCEPTED)
    try:
        for seq_id in (1, 2):
            submit_batch(transport, batch(seq_id), compress=True)
    finally:
        can_compress.cache_clear()
    assert not any("content-encoding" in r.headers for r in server.requests(ROUTE))


def test_json_is_never_compressed(server: ScriptedServer) -> None:
    server.on(ROUTE, ACCEPTED)
    with open_transport(server, wire="json") as transport:
        submit_batch(transport, batch(), compress=True)
    assert "content-encoding" not in server.requests(ROUTE)[0].headers


# What is remembered


def test_a_snapshot_of_the_dialect_is_immutable_and_printable(transport: Transport) -> None:
    before = server_dialect(transport)
    transport.server.note_missing("POST telemetry", 404)
    assert before == ServerDialect()
    assert str(before) == "encoding not known yet"
    assert transport.server.missing_status("POST telemetry") == 404
    assert transport.server.missing_status("POST cancel_future") is None
    after = server_dialect(transport)
    assert after.missing_routes == ("POST telemetry",)
    assert str(after) == "encoding not known yet; without POST telemetry"
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.encoding = "json"  # type: ignore[misc]


def test_a_snapshot_can_be_taken_although_the_lock_is_never_released(transport: Transport) -> None:
    """As in the child of a fork, if another thread of the parent held the lock."""
    transport.server.note_missing("POST telemetry", 404)
    taken: List[ServerDialect] = []
    thread = threading.Thread(target=lambda: taken.append(server_dialect(transport)), daemon=True)
    with transport.server._lock:
        thread.start()
        thread.join(PATIENCE_S)
        assert [dialect.missing_routes for dialect in taken] == [("POST telemetry",)]


def test_a_route_that_has_responded_before_is_not_missing(
    transport: Transport, server: ScriptedServer
) -> None:
    route = "GET /api/v1/samplers/s"
    known = Answer(body={"sampler_id": "s", "base_model": "m"})
    nothing = Answer(404, {"detail": "Not Found"})
    server.on(route, Answer(404, {"detail": "sampler 's' is unknown"}), known, nothing)
    with pytest.raises(NotFoundError):  # about the sampler, not about the route
        get_sampler(transport, "s")
    assert get_sampler(transport, "s").base_model == "m"
    for _ in range(2):
        with pytest.raises(RouteMissingError):
            get_sampler(transport, "s")
    assert len(server.requests(route)) == 4
    assert transport.server.missing_status("GET samplers/{id}") is None


def test_a_missing_route_is_tried_once(transport: Transport, server: ScriptedServer) -> None:
    route = "GET /api/v1/samplers/s"
    server.on(route, Answer(404, {"detail": "Not Found"}))
    for _ in range(2):
        with pytest.raises(RouteMissingError) as caught:
            get_sampler(transport, "s")
        assert caught.value.status == 404
    assert len(server.requests(route)) == 1
    assert server_dialect(transport).missing_routes == ("GET samplers/{id}",)


def test_an_unreachable_server_settles_nothing(server: ScriptedServer) -> None:
    server.close()
    with open_transport(server, max_outage_s=0.05) as transport:
        with pytest.raises(APIConnectionError):
            submit_batch(transport, batch())
    assert batch_codec(transport) is None
