"""Models and training (docs/protocol.md, "Training runs" and "Submissions")."""

from __future__ import annotations

import time
from typing import Any, Union

from tinkex import types
from tinkex._api._call import post, read
from tinkex._api._optional import optional_route, was_done_before
from tinkex._transport.request import Body
from tinkex._transport.transport import Request, Sender
from tinkex.errors import APIStatusError
from tinkex.retry import RetryPolicy
from tinkex.wire.codec import Codec, compress


def submit(transport: Sender, route: str, **fields: Any) -> types.UntypedFuture:
    """``POST`` a submission to *route* -> future of its result.

    Fields that are None are left out: servers of older protocols refuse what they do not know.
    """
    body = {name: value for name, value in fields.items() if value is not None}
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


def unload_model(
    transport: Sender, model_id: str
) -> Union[types.UntypedFuture, types.UnloadModelResponse]:
    """``POST unload_model`` -> future of UnloadModelResponse.

    Returns the response itself if an earlier attempt, whose response was lost, has unloaded the
    model.  Raises RouteMissingError where the server does not have the route, as newer ones do not.
    """
    with optional_route(transport, "POST unload_model"):
        try:
            return submit(transport, "unload_model", model_id=model_id)
        except APIStatusError as error:
            if not was_done_before(error, 404, 409, 410):
                raise
            return types.UnloadModelResponse(model_id)
