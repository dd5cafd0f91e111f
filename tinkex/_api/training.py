"""Models and training (docs/protocol.md, "Training runs" and "Submissions")."""

from __future__ import annotations

import time
from typing import Any, Dict, Mapping, Optional, Sequence, Union

from tinkex import types
from tinkex._api._call import post, read
from tinkex._api._optional import optional_route, was_done_before
from tinkex._transport.request import Body
from tinkex._transport.sender import Sender
from tinkex._transport.transport import Request
from tinkex.errors import APIStatusError
from tinkex.retry import RetryPolicy
from tinkex.wire.codec import Codec, compress


def _given(**fields: Any) -> Dict[str, Any]:
    """The fields that are not None: servers of older protocols refuse what they do not know."""
    return {name: value for name, value in fields.items() if value is not None}


def create_model(
    transport: Sender,
    *,
    session_id: str,
    model_seq_id: int,
    base_model: str,
    lora_config: types.LoraConfig,
    user_metadata: Optional[Mapping[str, str]] = None,
    optimizer_config: Optional[Mapping[str, Any]] = None,
) -> types.UntypedFuture:
    """``POST create_model`` -> future of CreateModelResponse."""
    body = _given(
        session_id=session_id,
        model_seq_id=model_seq_id,
        base_model=base_model,
        lora_config=lora_config.to_wire(),
        user_metadata=None if user_metadata is None else dict(user_metadata),
        optimizer_config=optimizer_config,
        type="create_model",
    )
    return post(transport, "/api/v1/create_model", body, types.UntypedFuture)


def create_model_from_weights(
    transport: Sender,
    *,
    session_id: str,
    model_seq_id: int,
    path: str,
    optimizer: bool,
    base_model: Optional[str] = None,
    user_metadata: Optional[Mapping[str, str]] = None,
    weights_access_token: Optional[str] = None,
    optimizer_config: Optional[Mapping[str, Any]] = None,
) -> types.UntypedFuture:
    """``POST load_weights``, form 1: a new model from a checkpoint -> LoadWeightsResponse."""
    body = _given(
        session_id=session_id,
        model_seq_id=model_seq_id,
        path=path,
        optimizer=optimizer,
        base_model=base_model,
        user_metadata=None if user_metadata is None else dict(user_metadata),
        weights_access_token=weights_access_token,
        optimizer_config=optimizer_config,
        type="load_weights",
    )
    return post(transport, "/api/v1/load_weights", body, types.UntypedFuture)


def load_weights(
    transport: Sender,
    *,
    model_id: str,
    seq_id: int,
    path: str,
    optimizer: bool,
    weights_access_token: Optional[str] = None,
) -> types.UntypedFuture:
    """``POST load_weights``, form 2: into an existing model -> LoadWeightsResponse."""
    body = _given(
        model_id=model_id,
        seq_id=seq_id,
        path=path,
        optimizer=optimizer,
        weights_access_token=weights_access_token,
        type="load_weights",
    )
    return post(transport, "/api/v1/load_weights", body, types.UntypedFuture)


def get_info(transport: Sender, model_id: str) -> types.GetInfoResponse:
    """``POST get_info``."""
    body = {"model_id": model_id, "type": "get_info"}
    return post(transport, "/api/v1/get_info", body, types.GetInfoResponse)


def forward_backward(
    transport: Sender,
    codec: Codec,
    request: types.ForwardBackwardRequest,
    policy: RetryPolicy,
    *,
    compressed: bool = False,
) -> types.UntypedFuture:
    """``POST forward_backward`` (or ``forward``, in JSON) -> future of ForwardBackwardOutput.

    *compressed* sends the body as a zstd frame, which needs ``zstandard``.
    """
    route = "forward" if request.forward_only and codec.name == "json" else "forward_backward"
    began = time.perf_counter()
    parts = codec.forward_backward_parts(request)
    body: Body = compress(bytes(parts)) if compressed else parts
    http = Request(
        "POST",
        f"/api/v1/{route}",
        body,
        content_type=codec.content_type,
        headers={"Content-Encoding": "zstd"} if compressed else {},
        encode_s=time.perf_counter() - began,
    )
    return read(types.UntypedFuture, transport.send(http, policy), http.name)


def optim_step(
    transport: Sender, *, model_id: str, seq_id: int, params: Mapping[str, Any]
) -> types.UntypedFuture:
    """``POST optim_step`` -> future of OptimStepResponse.

    *params* is one field with its value, as `types.optimizer.optim_params_to_wire` makes it.
    """
    body = {**params, "model_id": model_id, "seq_id": seq_id, "type": "optim_step"}
    return post(transport, "/api/v1/optim_step", body, types.UntypedFuture)


def save_weights(
    transport: Sender,
    *,
    model_id: str,
    seq_id: int,
    path: str,
    ttl_seconds: Optional[int] = None,
    overwrite: bool = False,
    user_metadata: Optional[Mapping[str, str]] = None,
) -> types.UntypedFuture:
    """``POST save_weights`` -> future of SaveWeightsResponse."""
    body = _given(
        model_id=model_id,
        seq_id=seq_id,
        path=path,
        ttl_seconds=ttl_seconds,
        overwrite=True if overwrite else None,
        user_metadata=None if user_metadata is None else dict(user_metadata),
        type="save_weights",
    )
    return post(transport, "/api/v1/save_weights", body, types.UntypedFuture)


def save_weights_for_sampler(
    transport: Sender,
    *,
    model_id: str,
    seq_id: int,
    path: Optional[str] = None,
    sampling_session_seq_id: Optional[int] = None,
    ttl_seconds: Optional[int] = None,
    user_metadata: Optional[Mapping[str, str]] = None,
    kind: str = "snapshot",
) -> types.UntypedFuture:
    """``POST save_weights_for_sampler``: named by *path*, or ephemeral by seq_id."""
    body = _given(
        model_id=model_id,
        seq_id=seq_id,
        path=path,
        sampling_session_seq_id=sampling_session_seq_id,
        ttl_seconds=ttl_seconds,
        user_metadata=None if user_metadata is None else dict(user_metadata),
        kind=None if kind == "snapshot" else kind,
        type="save_weights_for_sampler",
    )
    return post(transport, "/api/v1/save_weights_for_sampler", body, types.UntypedFuture)


def save_weights_external(
    transport: Sender,
    *,
    model_id: str,
    seq_id: int,
    path: str,
    ttl_seconds: Optional[int] = None,
    age_encryption_recipients: Optional[Sequence[str]] = None,
) -> types.UntypedFuture:
    """``POST save_weights_external`` -> future of SaveWeightsExternalResponse.

    Raises RouteMissingError where the server does not have the route.
    """
    recipients = age_encryption_recipients
    body = _given(
        model_id=model_id,
        seq_id=seq_id,
        path=path,
        ttl_seconds=ttl_seconds,
        age_encryption_recipients=None if recipients is None else list(recipients),
        type="save_weights_external",
    )
    with optional_route(transport, "POST save_weights_external"):
        return post(transport, "/api/v1/save_weights_external", body, types.UntypedFuture)


def unload_model(
    transport: Sender, model_id: str
) -> Union[types.UntypedFuture, types.UnloadModelResponse]:
    """``POST unload_model`` -> future of UnloadModelResponse.

    Returns the response itself if an earlier attempt, whose response was lost, has unloaded the
    model.  Raises RouteMissingError where the server does not have the route, as newer ones do not.
    """
    body = {"model_id": model_id, "type": "unload_model"}
    with optional_route(transport, "POST unload_model"):
        try:
            return post(transport, "/api/v1/unload_model", body, types.UntypedFuture)
        except APIStatusError as error:
            if not was_done_before(error, 404, 409, 410):
                raise
            return types.UnloadModelResponse(model_id)


def create_custom_loss(
    transport: Sender,
    *,
    session_id: str,
    custom_loss_seq_id: int,
    name: str,
    inputs: Sequence[Mapping[str, Any]],
    graph: Mapping[str, Any],
) -> types.UntypedFuture:
    """``POST create_custom_loss`` -> future of CreateCustomLossResponse.

    Raises RouteMissingError where the server does not have the route.
    """
    body = {
        "session_id": session_id,
        "custom_loss_seq_id": custom_loss_seq_id,
        "name": name,
        "inputs": list(inputs),
        "graph": graph,
        "type": "create_custom_loss",
    }
    with optional_route(transport, "POST create_custom_loss", names_nothing=True, ask_once=True):
        return post(transport, "/api/v1/create_custom_loss", body, types.UntypedFuture)
