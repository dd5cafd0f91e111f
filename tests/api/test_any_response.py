"""Any response of any server becomes a typed error or a result of the promised type."""

from __future__ import annotations

import typing
from typing import Any, Iterator

import pytest
from api.any_reply import (
    CannedTransport,
    Endpoint,
    conforms,
    endpoint_functions,
    replies,
)
from hypothesis import given, strategies as st
from support.properties import several

from tinkex import types
from tinkex._api._call import read
from tinkex._results.outcomes import Announced, Done, Failed, Pending, Trouble, interpret
from tinkex._transport.fast_connection import AnyChannel
from tinkex._transport.request import Reply, Request
from tinkex._transport.transport import Sender, Transport
from tinkex.errors import TinkexError
from tinkex.wire.codec import codec_for

FUNCTIONS = endpoint_functions()
#: Parameter types of the endpoint functions, which their modules import for type checkers only.
PARAMETERS = {"Transport": Transport, "Sender": Sender, "AnyChannel": AnyChannel}
RESULTS = (
    types.CreateModelResponse,
    types.LoadWeightsResponse,
    types.OptimStepResponse,
    types.SaveWeightsResponse,
    types.SaveWeightsForSamplerResponse,
    types.SaveWeightsExternalResponse,
    types.CreateCustomLossResponse,
)
POLL = Request("POST", "/api/v1/retrieve_future")


@pytest.fixture(scope="module")
def transport() -> Iterator[CannedTransport]:
    canned = CannedTransport()
    yield canned
    canned.closing.set()
    canned.abort()


@pytest.mark.parametrize("endpoint", FUNCTIONS, ids=lambda one: one[0])
@several(50)
@given(reply=replies)
def test_an_endpoint(transport: CannedTransport, endpoint: Endpoint, reply: Reply) -> None:
    _, function, arguments = endpoint
    transport.reply = reply
    try:
        result = function(transport, **arguments)
    except TinkexError:
        return
    promised = typing.get_type_hints(function, localns=PARAMETERS)["return"]
    assert conforms(result, promised), f"{result!r} is not {promised}"


@several(1000)
@given(reply=replies, maybe_lost=st.booleans())
def test_a_poll(transport: CannedTransport, reply: Reply, maybe_lost: bool) -> None:
    check_poll(transport, reply, maybe_lost)


def check_poll(transport: Transport, reply: Reply, maybe_lost: bool) -> None:
    error = None if reply.status < 300 else transport.status_error(POLL, reply)
    try:
        outcome = interpret(reply, error, request_id="r", kind="sample", maybe_lost=maybe_lost)
    except TinkexError:
        return
    if isinstance(outcome, Done):
        decode_everything(outcome.reply)
    elif isinstance(outcome, (Failed, Trouble)):
        assert isinstance(outcome.error, TinkexError)
    elif isinstance(outcome, Pending):
        assert conforms(outcome.queue_state, typing.Optional[str])
    else:
        assert isinstance(outcome, Announced)
        assert outcome.size >= 0


def decode_everything(reply: Reply) -> None:
    """Decode it as the result of each kind of work."""
    codec = codec_for(reply.content_type)
    for decode in (codec.decode_output, codec.decode_samples):
        try:
            result: Any = decode(reply.body)
        except TinkexError:
            continue
        assert conforms(result, type(result)), result
    for answer in RESULTS:
        try:
            result = read(answer, reply, "work")
        except TinkexError:
            continue
        assert conforms(result, answer), result
