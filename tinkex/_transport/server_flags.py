"""ServerFlags: what the server reports about itself (docs/protocol.md, "Server flags").

They are requested when first needed, once per server and credential, by one thread for all.  No
thread refreshes them: flags that may change are requested again when next needed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING, Any, Callable, Dict, Mapping, Optional, Tuple, Type, TypeVar

import orjson

from tinkex._runtime.single_flight import SingleFlight
from tinkex._transport.request import Reply, Request
from tinkex._transport.request_errors import error_if_damaged
from tinkex._version import PROTOCOL_VERSION
from tinkex.errors import APIConnectionError, APIError, APIStatusError, ResponseDecodeError, a_type
from tinkex.retry import RetryPolicy, server_error_behind

if TYPE_CHECKING:
    from tinkex._transport.transport import Sender

logger = logging.getLogger(__name__)

#: Statuses that mean the server does not have the route.
ABSENT = (404, 405, 501)

#: One request for flags may take this long, in seconds.
TIMEOUT_S = 10.0

#: Shortest time between two requests for the dynamic flags, in seconds, whatever their interval.
MIN_REFRESH_S = 10.0

# Servers choose flags by the version that a client claims.  We claim the protocol generation that
# we speak, the only one whose flags are known (docs/protocol.md, "Server flags").
_BODY = orjson.dumps({"sdk_version": PROTOCOL_VERSION})


@dataclasses.dataclass(frozen=True)
class ServerFlags:
    """``client/config``: the flags that have an effect here.  Sizes are bytes."""

    pjwt_auth_enabled: bool = False
    credential_default_source: str = "api_key"
    sample_dispatch_bytes_semaphore_size: int = 10_485_760
    inflight_response_bytes_semaphore_size: int = 52_428_800
    fwdbwd_dispatch_bytes_semaphore_size: int = 50_000_000
    proto_compress_fwdbwd: bool = False
    fwdbwd_max_chunk_len: int = 1024
    fwdbwd_max_chunk_bytes_count: int = 5_000_000
    billing_exception_max_pause_duration_sec: float = 3600.0
    sample_no_retries: bool = False
    sample_max_concurrent_requests: int = 2000
    sample_use_retrieve_futures: bool = False
    custom_loss_server_side: bool = False
    sample_join_sampling_session: bool = False


@dataclasses.dataclass(frozen=True)
class DynamicFlags:
    """``client/dynamic_config``: flags that may change while a client lives."""

    refresh_interval_sec: float = 300.0
    sample_cancel_enabled: bool = False
    sample_cancel_max_batch_size: int = 64


F = TypeVar("F", ServerFlags, DynamicFlags)


class FlagCache:
    """The known flags of one server under one credential."""

    # No lock: the leader of a flight replaces an attribute atomically, and never changes a value.

    def __init__(self) -> None:
        self.static: Optional[ServerFlags] = None
        self.static_flight: SingleFlight[ServerFlags] = SingleFlight()
        # The flags, and the monotonic time of their next refresh.
        self.dynamic: Optional[Tuple[DynamicFlags, float]] = None
        self.dynamic_flight: SingleFlight[DynamicFlags] = SingleFlight()
        # How many responses to requests tried once looked like a gateway's; see RetryPolicy.
        self.gateway_answers = 0


def flags_for(transport: Sender, *, once: bool = False) -> ServerFlags:
    """Return the server's flags.  The first call requests them; later calls do not block.

    The request is retried for ``startup_timeout_s``, or tried only *once*.  A failure is not
    remembered, but a missing route is: such a server has the default flags.

    Raises:
        APIError: the server cannot be reached, refuses the credential, or sends an unreadable
            response.
        ClientClosedError: the transport was closed in the meantime.
    """
    known = transport.server.flags
    if known.static is not None:
        return known.static

    def fetch() -> ServerFlags:
        if known.static is None:  # another thread may have fetched them since we looked
            # Never with a token: the flags decide whether the server uses tokens.
            request = _request("client/config", raw_credential=True)
            known.static = _fetch(transport, request, ServerFlags, known if once else None)
        return known.static

    return known.static_flight.run(fetch, transport.closing)


def dynamic_flags_for(transport: Sender) -> DynamicFlags:
    """Return the dynamic flags, refreshed once they are ``refresh_interval_sec`` old.

    A refresh is tried once; if it fails, the old flags stay for another interval.  Raises like
    `flags_for`, but only if there are no old flags.
    """
    known = transport.server.flags

    def current() -> Optional[DynamicFlags]:
        found = known.dynamic
        if found is None or transport.clock.monotonic() >= found[1]:
            return None
        return found[0]

    def fetch() -> DynamicFlags:
        flags = current()
        if flags is None:
            old = known.dynamic
            flags = _refresh(transport, known, None if old is None else old[0])
            interval_s = max(flags.refresh_interval_sec, MIN_REFRESH_S)
            known.dynamic = flags, transport.clock.monotonic() + interval_s
        return flags

    return current() or known.dynamic_flight.run(fetch, transport.closing)


def _refresh(transport: Sender, known: FlagCache, old: Optional[DynamicFlags]) -> DynamicFlags:
    request = _request("client/dynamic_config")
    try:
        return _fetch(transport, request, DynamicFlags, None if old is None else known)
    except APIError as error:
        if old is None:
            raise
        logger.debug("keeping the old flags of the server: %s", error)
        return old


def _request(route: str, *, raw_credential: bool = False) -> Request:
    return Request(
        "POST",
        f"/api/v1/{route}",
        _BODY,
        traffic="control",
        read_timeout_s=TIMEOUT_S,
        raw_credential=raw_credential,
    )


def _fetch(transport: Sender, request: Request, kind: Type[F], once: Optional[FlagCache]) -> F:
    """Request flags, with retries; given *once*, try once and count gateway responses there."""
    try:
        if once is not None:
            reply = _fetch_once(transport, request, once)
        else:
            policy = RetryPolicy(max_elapsed_s=transport.config.startup_timeout_s, cap_s=4.0)
            reply = transport.send(request, policy)
    except APIStatusError as error:
        if error.status not in ABSENT:
            raise
        route = request.name.replace("/api/v1/", "")
        transport.server.note_missing(route, error.status or 404)
        return kind()
    payload = reply.json()
    if not isinstance(payload, dict):
        raise ResponseDecodeError(
            f"{request.name}: the response is {a_type(payload)}, not an object of flags"
        )
    return read_flags(kind, payload)


def _fetch_once(transport: Sender, request: Request, known: FlagCache) -> Reply:
    """Send one attempt: the caller is an attempt of another request, which is itself retried."""
    try:
        reply = transport.send_once(request)
        damaged = error_if_damaged(request, reply)
        if damaged is not None:
            raise APIConnectionError(damaged.message, status=reply.status) from damaged
    except APIConnectionError as error:
        # What looks like a gateway's page may be the server's own "no such route".  A RetryState
        # counts such responses to one request; here, each goes to a different caller.
        own = server_error_behind(error)
        known.gateway_answers += own is not None
        if own is None or RetryPolicy().retries_gateway(known.gateway_answers):
            raise
        raise own from None
    if not 200 <= reply.status < 300:
        raise transport.status_error(request, reply)
    return reply


def read_flags(kind: Type[F], payload: Mapping[str, Any]) -> F:
    """Read flags from a decoded response, ignoring unknown and null ones.

    For a flag of the wrong type, or a size that is not positive, this logs a warning and takes the
    default.
    """
    # No error: a client should not fail because of a flag that it may never need.
    given: Dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = payload.get(field.name)
        if value is None:
            continue
        default: Any = field.default
        if _READERS[type(default)](value):
            given[field.name] = type(default)(value)
        else:
            logger.warning(
                "the server's flag %s is %.100r; using %r", field.name, value, field.default
            )
    return kind(**given)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0


_READERS: Mapping[type, Callable[[Any], bool]] = {
    bool: lambda value: isinstance(value, bool),
    str: lambda value: isinstance(value, str),
    int: lambda value: _is_number(value) and value == int(value) and value > 0,
    float: _is_number,
}
