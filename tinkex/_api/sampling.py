"""Sampling (docs/protocol.md, "Sampling")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Optional, Union

from tinkex import types
from tinkex._api._call import call, get, post, read, segment
from tinkex._api._optional import optional_route

if TYPE_CHECKING:
    from tinkex._transport.fast_connection import AnyChannel
    from tinkex._transport.transport import Sender


def create_sampling_session(
    transport: Sender,
    *,
    session_id: str,
    sampling_session_seq_id: int,
    base_model: Optional[str] = None,
    model_path: Optional[str] = None,
) -> Union[types.CreateSamplingSessionResponse, types.UntypedFuture]:
    """``POST create_sampling_session``; some servers return a future for the response."""
    body: Dict[str, Any] = {
        "session_id": session_id,
        "sampling_session_seq_id": sampling_session_seq_id,
        "type": "create_sampling_session",
    }
    if base_model is not None:
        body["base_model"] = base_model
    if model_path is not None:
        body["model_path"] = model_path
    route = "/api/v1/create_sampling_session"
    reply = call(transport, "POST", route, body)
    body = reply.json()
    if isinstance(body, dict) and "request_id" in body and "sampling_session_id" not in body:
        return read(types.UntypedFuture, reply, f"POST {route}")
    return read(types.CreateSamplingSessionResponse, reply, f"POST {route}")


def join_sampling_session(
    transport: Sender, sampling_session_id: str
) -> types.JoinSamplingSessionResponse:
    """``POST join_sampling_session``: registers another client of the same sampler."""
    body = {"sampling_session_id": sampling_session_id, "type": "join_sampling_session"}
    return post(
        transport,
        "/api/v1/join_sampling_session",
        body,
        types.JoinSamplingSessionResponse,
        traffic="control",
    )


def asample(
    transport: Sender,
    *,
    sampling_session_id: str,
    seq_id: int,
    request: types.SampleRequest,
    channel: Optional[AnyChannel] = None,
) -> types.UntypedFuture:
    """``POST asample`` -> future of SampleResponse."""
    body = request.to_json()
    body["sampling_session_id"] = sampling_session_id
    body["seq_id"] = seq_id
    return post(
        transport,
        "/api/v1/asample",
        body,
        types.UntypedFuture,
        channel=channel,
        # Tells the server that it may send 429, after which we slow down.
        headers={"X-Tinker-Sampling-Backpressure": "1"},
    )


def get_sampler(transport: Sender, sampler_id: str) -> types.GetSamplerResponse:
    """``GET samplers/{id}``.  Raises RouteMissingError if the server lacks the route."""
    path = f"/api/v1/samplers/{segment('the sampler id', sampler_id)}"
    with optional_route(transport, "GET samplers/{id}", ask_once=True):
        return get(transport, path, types.GetSamplerResponse)
