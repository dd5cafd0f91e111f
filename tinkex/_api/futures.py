"""Results of accepted work (docs/protocol.md, "Futures")."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional, Sequence

from tinkex._api._call import encode
from tinkex._transport.request import Reply, Request
from tinkex.errors import ResponseDecodeError
from tinkex.retry import RetryPolicy
from tinkex.wire.codec import JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE

if TYPE_CHECKING:
    from tinkex._transport.fast_connection import AnyChannel
    from tinkex._transport.transport import Sender

#: One attempt to cancel may take this long, in seconds.
CANCEL_TIMEOUT_S = 30.0

BINARY_FIRST = f"{PROTOBUF_CONTENT_TYPE}, {JSON_CONTENT_TYPE}"


def retrieve_future(
    transport: Sender,
    request_id: str,
    *,
    binary: bool,
    read_timeout_s: float,
    payload: bool = False,
    size_first: bool = False,
    channel: Optional[AnyChannel] = None,
) -> Reply:
    """``POST retrieve_future``, once: a long poll; returns the response whatever its status.

    *binary*: the result may come as protobuf (samples and passes).  *size_first*: the server may
    send only the size of a large result; *payload* then requests the result itself.
    """
    body: Dict[str, Any] = {"request_id": request_id}
    # Left out unless needed: older servers reject the field (docs/protocol.md, "Large results").
    if payload or size_first:
        body["allow_metadata_only"] = not payload
    request = Request(
        "POST",
        "/api/v1/retrieve_future",
        encode(body),
        accept=BINARY_FIRST if binary else JSON_CONTENT_TYPE,
        traffic="poll",
        read_timeout_s=read_timeout_s,
    )
    return transport.send_once(request, channel=channel)


def retrieve_futures(
    transport: Sender,
    *,
    sampling_session_id: str,
    clone: int,
    cursor: int,
    retrieved: Sequence[str],
    immediate: bool,
    read_timeout_s: float,
    channel: AnyChannel,
) -> Reply:
    """``POST retrieve_futures``, once: which samples have completed since *cursor*.

    A long poll, unless *immediate*; returns the response whatever its status.  *retrieved*
    acknowledges request ids whose results the server may drop.
    """
    body: Dict[str, Any] = {
        "target": {
            "type": "sampling_session",
            "sampling_session_id": sampling_session_id,
            "cloned_sampler_id": clone,
        },
        "prev_cursor": cursor,
        "retrieved_request_ids": sorted(retrieved),
    }
    if immediate:
        body["timeout"] = 0.0
    request = Request(
        "POST",
        "/api/v1/retrieve_futures",
        encode(body),
        traffic="poll",
        read_timeout_s=read_timeout_s,
    )
    return transport.send_once(request, channel=channel)


@dataclasses.dataclass(frozen=True)
class Completions:
    """The response of ``retrieve_futures``.

    Attributes:
        sizes: bytes of each finished result, by request id; 0 if unknown, or if the request failed.
        cursor: the ``prev_cursor`` of the next request.
    """

    sizes: Mapping[str, int]
    cursor: int


def read_completions(reply: Reply) -> Completions:
    """Read the response of ``retrieve_futures``; ResponseDecodeError if it is malformed."""
    body = reply.json()
    try:
        sizes = {
            str(one["request_id"]): int(one.get("response_payload_uncompressed_size") or 0)
            for one in body["completions"]
        }
        return Completions(sizes, int(body["cursor"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResponseDecodeError(
            f"POST /api/v1/retrieve_futures: not a list of completions: {error!r}",
            status=reply.status,
        ) from error


def cancel_future(transport: Sender, request_id: str) -> None:
    """``POST cancel_future``: the result is not wanted; the response is ignored."""
    request = Request(
        "POST",
        "/api/v1/cancel_future",
        encode({"request_id": request_id}),
        traffic="poll",
        read_timeout_s=CANCEL_TIMEOUT_S,
        empty_response_ok=True,
    )
    transport.send(request, RetryPolicy(max_elapsed_s=transport.config.max_outage_s))
