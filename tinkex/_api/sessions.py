"""Sessions, their telemetry, and server facts.

See docs/protocol.md, "Sessions", "Telemetry" and "Server flags".
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional, Sequence

from tinkex import types
from tinkex._api._call import call, encode, get, read
from tinkex._api._optional import is_missing_route
from tinkex._runtime.error_text import ErrorText, Setting
from tinkex._transport.request import Reply, Request
from tinkex._version import PROTOCOL_VERSION
from tinkex.config import Config
from tinkex.errors import APIStatusError, NotFoundError, ResponseDecodeError
from tinkex.retry import RetryPolicy

if TYPE_CHECKING:
    from tinkex._transport.fast_connection import AnyChannel
    from tinkex._transport.transport import Sender, Transport

#: One heartbeat may take this long, in seconds.  It is never retried: the next heartbeat is the
#: retry.
HEARTBEAT_TIMEOUT_S = 10.0

#: One telemetry report may take this long, in seconds.
TELEMETRY_TIMEOUT_S = 5.0

HEARTBEAT_PATH = "/api/v1/session_heartbeat"
CAPABILITIES_PATH = "/api/v1/get_server_capabilities"
HEALTH_PATH = "/api/v1/healthz"


def create_session(transport: Sender, config: Config) -> types.CreateSessionResponse:
    """``POST create_session``: gives up after ``startup_timeout_s``."""
    body: Dict[str, Any] = {
        "tags": list(config.tags),
        "user_metadata": dict(config.user_metadata),
        "sdk_version": PROTOCOL_VERSION,
        "type": "create_session",
    }
    if config.project_id:
        body["project_id"] = config.project_id
    if config.display_name:
        body["display_name"] = config.display_name
    request = Request(
        "POST",
        "/api/v1/create_session",
        encode(body),
        traffic="control",
        read_timeout_s=min(config.read_timeout_s, config.startup_timeout_s),
    )
    policy = RetryPolicy(max_elapsed_s=config.startup_timeout_s, cap_s=4.0)
    try:
        reply = transport.send(request, policy)
    except NotFoundError as error:
        error.hint = error.hint or ErrorText(
            "Is ",
            Setting("base_url"),
            f" {config.base_url} right, path prefix and all? /api/v1 is added to it.",
        )
        raise
    created = read(types.CreateSessionResponse, reply, request.name)
    raw = reply.json()["session_id"]  # dataclasses-json would turn a number into a string
    if not isinstance(raw, str) or not raw:
        raise ResponseDecodeError(f"{request.name}: session_id is {raw!r}, not a string")
    return created


def session_heartbeat(
    transport: Sender, session_id: str, *, timeout_s: float = HEARTBEAT_TIMEOUT_S
) -> Reply:
    """``POST session_heartbeat``, once; returns the response whatever its status."""
    return transport.send_once(_heartbeat(session_id, timeout_s))


def ask_for_session(transport: Transport, session_id: str, *, timeout_s: float) -> None:
    """``POST session_heartbeat``, with retries for *timeout_s*; raises if all attempts fail."""
    # Urgent: failed work waits for this response, so a 429 or 402 must not delay it.
    policy = RetryPolicy(max_elapsed_s=timeout_s, max_gateway_answers=None)
    transport.send(_heartbeat(session_id, timeout_s), policy, urgent=True)


def _heartbeat(session_id: str, timeout_s: float) -> Request:
    body = encode({"session_id": session_id, "type": "session_heartbeat"})
    return Request("POST", HEARTBEAT_PATH, body, traffic="control", read_timeout_s=timeout_s)


def finish_session(
    transport: Sender, session_id: str, status: str, detail: Optional[str], timeout_s: float
) -> int:
    """``POST sessions/{id}/finish``, once; returns the status of the response.

    Returns 404 if the route is missing, and 410 for a 404 about the session.
    """
    body = encode({"reason": {"type": status}, "detail": detail})
    path = f"/api/v1/sessions/{session_id}/finish"
    request = Request(
        "POST",
        path,
        body,
        traffic="control",
        read_timeout_s=timeout_s,
        empty_response_ok=True,
    )
    reply = transport.send_once(request)
    if reply.status == 404:
        error = transport.status_error(request, reply)
        if isinstance(error, APIStatusError) and not is_missing_route(error):
            return 410
    return reply.status


def get_server_capabilities(transport: Sender) -> types.GetServerCapabilitiesResponse:
    """``GET get_server_capabilities``."""
    return get(transport, CAPABILITIES_PATH, types.GetServerCapabilitiesResponse)


def healthz(transport: Sender) -> None:
    """``GET healthz``: raises if the response is an error."""
    call(transport, "GET", HEALTH_PATH, reads_response=False)


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
    # Events hold error messages, which may quote a key, wherever the user has put it.
    clean = transport.redact(encode(body).decode()).encode()
    request = Request(
        "POST",
        "/api/v1/telemetry",
        clean,
        read_timeout_s=TELEMETRY_TIMEOUT_S,
        empty_response_ok=True,
    )
    return transport.send_once(request, channel=channel)
