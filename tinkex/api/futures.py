"""Results of accepted work (protocol reference, section 1.5.4)."""

from __future__ import annotations

from typing import Optional

from tinkex.api._call import encode
from tinkex.channel import Channel
from tinkex.transport import JSON_TYPE, Reply, Request, Transport

BINARY_FIRST = "application/x-protobuf, application/json"


def retrieve_future(
    transport: Transport,
    request_id: str,
    *,
    binary: bool,
    read_timeout_s: float,
    channel: Optional[Channel] = None,
) -> Reply:
    """``POST retrieve_future``, once: a long poll; returns the answer whatever its status.

    *binary* tells that the result may come as protobuf (samples and passes).
    """
    request = Request(
        "POST",
        "/api/v1/retrieve_future",
        encode({"request_id": request_id}),
        accept=BINARY_FIRST if binary else JSON_TYPE,
        traffic="poll",
        read_timeout_s=read_timeout_s,
    )
    return transport.send_once(request, channel=channel)
