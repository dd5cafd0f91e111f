"""Sampling (protocol reference, section 1.5.3)."""

from __future__ import annotations

from typing import Any, Dict, Optional

from tinkex.api._call import get, post, segment
from tinkex.channel import Channel
from tinkex.transport import Transport
from tinkex.types import (
    CreateSamplingSessionResponse,
    GetSamplerResponse,
    SampleRequest,
    UntypedFuture,
)


def create_sampling_session(
    transport: Transport,
    *,
    session_id: str,
    sampling_session_seq_id: int,
    base_model: Optional[str] = None,
    model_path: Optional[str] = None,
) -> CreateSamplingSessionResponse:
    """``POST create_sampling_session``."""
    body: Dict[str, Any] = {
        "session_id": session_id,
        "sampling_session_seq_id": sampling_session_seq_id,
        "type": "create_sampling_session",
    }
    if base_model is not None:
        body["base_model"] = base_model
    if model_path is not None:
        body["model_path"] = model_path
    return post(transport, "/api/v1/create_sampling_session", body, CreateSamplingSessionResponse)


def asample(
    transport: Transport,
    *,
    sampling_session_id: str,
    seq_id: int,
    request: SampleRequest,
    channel: Optional[Channel] = None,
) -> UntypedFuture:
    """``POST asample`` -> future of SampleResponse."""
    body = request.to_json()
    body["sampling_session_id"] = sampling_session_id
    body["seq_id"] = seq_id
    return post(transport, "/api/v1/asample", body, UntypedFuture, channel=channel)


def get_sampler(transport: Transport, sampler_id: str) -> GetSamplerResponse:
    """``GET samplers/{id}``."""
    path = f"/api/v1/samplers/{segment('the sampler id', sampler_id)}"
    return get(transport, path, GetSamplerResponse)
