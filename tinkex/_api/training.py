"""Models and training (docs/protocol.md, "Training runs" and "Submissions")."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Mapping, Tuple, Union

from tinkex import types
from tinkex._api._call import post, read
from tinkex._api._optional import optional_route, was_done_before
from tinkex._transport.request import Body, Request
from tinkex.errors import APIStatusError
from tinkex.retry import RetryPolicy
from tinkex.wire.codec import Codec, compress

if TYPE_CHECKING:
    from tinkex._transport.transport import Sender

_NEW_RUN = ("session_id", "model_seq_id")
_OF_RUN = ("model_id", "seq_id")

#: The JSON submissions, and the fields of each, in the order in which they are sent.
SUBMISSIONS: Mapping[str, Tuple[str, ...]] = {
    "create_model": (
        *_NEW_RUN,
        "base_model",
        "lora_config",
        "user_metadata",
        "optimizer_config",
    ),
    # Form 1 creates a run from a checkpoint, form 2 loads a checkpoint into a run.
    "load_weights": (
        *_NEW_RUN,
        *_OF_RUN,
        "path",
        "optimizer",
        "base_model",
        "user_metadata",
        "weights_access_token",
        "optimizer_config",
    ),
    "optim_step": ("adam_params", "optimizer_params", *_OF_RUN),
    "save_weights": (*_OF_RUN, "path", "ttl_seconds", "overwrite", "user_metadata"),
    "save_weights_for_sampler": (
        *_OF_RUN,
        "path",
        "sampling_session_seq_id",
        "ttl_seconds",
        "user_metadata",
        "kind",
    ),
    "save_weights_external": (*_OF_RUN, "path", "ttl_seconds", "age_encryption_recipients"),
    "unload_model": ("model_id",),
    "create_custom_loss": ("session_id", "custom_loss_seq_id", "name", "inputs", "graph"),
}


def submit(transport: Sender, route: str, **fields: Any) -> types.UntypedFuture:
    """``POST`` one of SUBMISSIONS -> future of its result.

    Fields that are None are left out: servers of older protocols refuse unknown fields.
    """
    names = SUBMISSIONS[route]
    assert fields.keys() <= {*names}, fields.keys()
    body = {name: fields[name] for name in names if fields.get(name) is not None}
    return post(transport, f"/api/v1/{route}", {**body, "type": route}, types.UntypedFuture)


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

    If *compressed*, the body is sent as a zstd frame, which needs ``zstandard``.
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


def unload_model(
    transport: Sender, model_id: str
) -> Union[types.UntypedFuture, types.UnloadModelResponse]:
    """``POST unload_model`` -> future of UnloadModelResponse.

    Returns the response itself if an earlier attempt, whose response was lost, has unloaded the
    model.  Raises RouteMissingError if the server lacks the route, as newer servers do.
    """
    with optional_route(transport, "POST unload_model"):
        try:
            return submit(transport, "unload_model", model_id=model_id)
        except APIStatusError as error:
            if not was_done_before(error, 404, 409, 410):
                raise
            return types.UnloadModelResponse(model_id)
