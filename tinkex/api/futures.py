"""Results of accepted work (protocol reference, section 1.5.4)."""

from __future__ import annotations

from typing import Any, Dict, Optional

from tinkex.api._call import encode
from tinkex.private_channel import AnyChannel
from tinkex.retry import RetryPolicy
from tinkex.transport import JSON_TYPE, Reply, Request, Transport

#: One attempt to cancel may take this long, in seconds.
CANCEL_TIMEOUT_S = 30.0

BINARY_FIRST = "application/x-protobuf, application/json"


def retrieve_future(
    transport: Transport,
    request_id: str,
    *,
    binary: bool,
    read_timeout_s: float,
    payload: bool = False,
    channel: Optional[AnyChannel] = None,
) -> Reply:
    """``POST retrieve_future``, once: a long poll; returns the answer whatever its status.

    *binary* tells that the result may come as protobuf (samples and passes).  *payload* insists on
    the result itself, from a server that has announced its size instead.
    """
    body: Dict[str, Any] = {"request_id": request_id}
    if payload:
        body["allow_metadata_only"] = False
    request = Request(
        "POST",
        "/api/v1/retrieve_future",
        encode(body),
        accept=BINARY_FIRST if binary else JSON_TYPE,
        traffic="poll",
        read_timeout_s=read_timeout_s,
    )
    return transport.send_once(request, channel=channel)


def cancel_future(transport: Transport, request_id: str) -> None:
    """``POST cancel_future``: the result is not wanted; the answer is ignored."""
    request = Request(
        "POST",
        "/api/v1/cancel_future",
        encode({"request_id": request_id}),
        traffic="poll",
        read_timeout_s=CANCEL_TIMEOUT_S,
    )
    transport.send(request, RetryPolicy(max_elapsed_s=transport.config.max_outage_s))
