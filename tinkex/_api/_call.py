"""How endpoint functions send JSON and read the response."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any, Mapping, Optional, Type, TypeVar
from urllib.parse import quote, urlencode

import orjson

from tinkex._transport.request import Reply, Request
from tinkex.errors import InvalidInputError, ResponseDecodeError
from tinkex.retry import RetryPolicy

if TYPE_CHECKING:
    from tinkex._transport.fast_connection import AnyChannel
    from tinkex._transport.transport import Sender
    from tinkex.types._wire import Wire

W = TypeVar("W", bound="Wire")


def encode(body: Mapping[str, Any]) -> bytes:
    """Encode *body* as JSON; numpy arrays are written straight from their buffers.

    Raises:
        InvalidInputError: *body* holds something that JSON cannot express.
    """
    try:
        encoded = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:  # includes orjson.JSONEncodeError
        raise InvalidInputError(f"this cannot be sent as JSON: {error}") from error
    # A copy, because orjson's bytes keep its whole buffer alive: 16 KiB for 500 bytes, in each busy
    # thread.
    return bytes(memoryview(encoded))


def call(
    transport: Sender,
    method: str,
    path: str,
    body: Optional[Mapping[str, Any]] = None,
    *,
    traffic: str = "work",
    policy: Optional[RetryPolicy] = None,
    channel: Optional[AnyChannel] = None,
    headers: Optional[Mapping[str, str]] = None,
    reads_response: bool = True,
) -> Reply:
    """Send a JSON request with retries; return the 2xx response.

    The response may be empty if *reads_response* is False.
    """
    began = time.perf_counter()
    encoded = None if body is None else encode(body)
    encode_s = time.perf_counter() - began if encoded is not None and traffic == "work" else None
    token = (body or {}).get("weights_access_token")
    request = Request(
        method,
        path,
        encoded,
        traffic=traffic,
        headers=headers or {},
        secrets=(token,) if isinstance(token, str) else (),
        empty_response_ok=not reads_response,
        encode_s=encode_s,
    )
    if policy is None:
        policy = RetryPolicy(max_elapsed_s=transport.config.max_outage_s)
        # Keep retrying after a gateway's responses as in any outage: to take one for the server's
        # refusal would mean guessing whether the seq_id was used.
        if any(name.endswith("seq_id") for name in body or {}):
            policy = dataclasses.replace(policy, max_gateway_answers=None)
    return transport.send(request, policy, channel=channel)


def read(response_type: Type[W], reply: Reply, name: str) -> W:
    """Read a JSON response of type *response_type*; ResponseDecodeError names the route *name*."""
    try:
        return response_type.from_wire(reply.json())
    except ResponseDecodeError as error:
        raise ResponseDecodeError(
            f"{name}: {error.message}", status=reply.status, hint=error.hint
        ) from error


def post(
    transport: Sender, path: str, body: Mapping[str, Any], response_type: Type[W], **how: Any
) -> W:
    """POST *body* and read the response; *how* as for `call`."""
    return read(response_type, call(transport, "POST", path, body, **how), f"POST {path}")


def segment(what: str, value: str) -> str:
    """Return *value*, stripped and quoted, as one segment of a path; ``:`` is not quoted.

    Raises:
        InvalidInputError: *value* is empty or would change the route.
    """
    name = value.strip() if isinstance(value, str) else ""
    if name in ("", ".", ".."):
        raise InvalidInputError(f"{what} is {value!r}; it must be a string, and not empty")
    return quote(name, safe=":@=+,;!$&'()*~")


def get(
    transport: Sender, path: str, response_type: Type[W], query: Optional[Mapping[str, Any]] = None
) -> W:
    """GET *path* and read the response; None and empty query values are left out."""
    pairs = {key: value for key, value in (query or {}).items() if value not in (None, "")}
    full = f"{path}?{urlencode(pairs)}" if pairs else path
    return read(response_type, call(transport, "GET", full), f"GET {path}")
