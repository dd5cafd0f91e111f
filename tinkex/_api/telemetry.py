"""Telemetry (docs/protocol.md, "Telemetry")."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any, Mapping, Sequence

from tinkex._api._call import encode
from tinkex._transport.request import Reply, Request
from tinkex._version import PROTOCOL_VERSION

if TYPE_CHECKING:
    from tinkex._transport.fast_connection import AnyChannel
    from tinkex._transport.transport import Sender

#: One report may take this long, in seconds.
TIMEOUT_S = 5.0


def send_telemetry(
    transport: Sender,
    events: Sequence[Mapping[str, Any]],
    *,
    session_id: str,
    process_uuid: str,
    channel: AnyChannel,
) -> Reply:
    """``POST telemetry``, once, without keys; returns the response whatever its status."""
    body = {
        "events": events,
        "platform": platform.system(),
        "sdk_version": PROTOCOL_VERSION,
        "session_id": session_id,
        "process_uuid": process_uuid,
    }
    clean = transport.redact(encode(body).decode()).encode()
    request = Request(
        "POST", "/api/v1/telemetry", clean, read_timeout_s=TIMEOUT_S, empty_response_ok=True
    )
    return transport.send_once(request, channel=channel)
