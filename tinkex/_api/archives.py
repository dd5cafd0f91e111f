"""The URL of a checkpoint's archive (docs/protocol.md, "Archives").

Servers build archives on request.  That takes minutes, during which they respond with 503 or not at
all.
"""

from __future__ import annotations

import email.utils
import logging
import random
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Callable, Mapping, Optional
from urllib.parse import urljoin

from tinkex import types
from tinkex._api._call import read
from tinkex._api._optional import optional_route
from tinkex._api.rest import checkpoint_route
from tinkex._transport.channel import Channel
from tinkex._transport.request import Reply, Request
from tinkex._transport.request_errors import error_if_damaged
from tinkex.errors import APIConnectionError, APIError, ClientClosedError, ResponseDecodeError
from tinkex.retry import RetryPolicy, RetryState
from tinkex.types._wire import parse_datetime

if TYPE_CHECKING:
    from tinkex._transport.transport import Transport

logger = logging.getLogger(__name__)

ROUTE = "GET training_runs/{id}/checkpoints/{checkpoint}/archive"

#: The number of attempts while the server builds the archive, and the pause after each, in seconds,
#: unless the server sends Retry-After.
BUILDING_TRIES = 6
BUILDING_PAUSE_S = 30.0
LONGEST_PAUSE_S = 300.0

Pause = Callable[[float], None]


def get_checkpoint_archive_url(
    transport: Transport,
    run_id: str,
    checkpoint_id: str,
    *,
    pause: Optional[Pause] = None,
    channel: Optional[Channel] = None,
) -> types.CheckpointArchiveUrlResponse:
    """``GET .../archive``: the signed URL, from a redirect that is not followed or from a body.

    Blocks while the server builds the archive, for up to six responses with 503, a few minutes in
    all.  *pause* sleeps, or raises to stop; the default raises once the client is closed.

    Raises:
        RouteMissingError: the server lacks the route.
        APIStatusError: the server refused, or was still building the archive.
        ResponseDecodeError: the response holds no URL.
    """
    pause = pause or _until_closed(transport)
    request = Request(
        "GET",
        f"{checkpoint_route(run_id, checkpoint_id)}/archive",
        traffic="poll",
        read_timeout_s=transport.config.poll_timeout_s,
        follow_redirects=False,
    )
    policy = RetryPolicy(max_elapsed_s=transport.config.max_outage_s)
    clock = transport.clock
    started = clock.monotonic()
    retries = RetryState(policy, started)
    building = 0
    while True:
        sent = clock.monotonic()
        error: APIError
        headers: Optional[Mapping[str, str]] = None
        try:
            reply = transport.send_once(request, channel=channel)
            # A body of another type may be the archive itself, which every retry would fetch again.
            is_json = not reply.content_type or "json" in reply.content_type
            damaged = error_if_damaged(request, reply) if is_json else None
            if reply.status < 400 and damaged is None:
                return _read(transport, request, reply)
            error, headers = damaged or transport.status_error(request, reply), reply.headers
        except APIConnectionError as silence:
            error = silence
        now = clock.monotonic()
        delay_s, error = retries.decide(error, now, random.random(), headers)
        # The server builds the archive before it responds, and something in between timed out.
        timed_out = headers is None and error.retryable and now - sent >= BUILDING_PAUSE_S
        if timed_out or (headers is not None and error.status == 503):
            building += 1
            hint_s = getattr(error, "retry_after_s", None)
            delay_s = min(BUILDING_PAUSE_S if hint_s is None else hint_s, LONGEST_PAUSE_S)
            if building >= BUILDING_TRIES:
                delay_s = None
        if delay_s is None:
            error.attempts, error.elapsed_s = retries.attempts, now - started
            try:
                # Raised in here, a 404 becomes RouteMissingError if it is about the route.
                with optional_route(transport, ROUTE):
                    raise error
            finally:
                del error  # its traceback holds this frame
        del error
        logger.info("the archive of %s is not ready; next try in %.0f s", run_id, delay_s)
        pause(delay_s)


def _until_closed(transport: Transport) -> Pause:
    def pause(seconds: float) -> None:
        if transport.closing.wait(seconds):
            raise ClientClosedError("the client was closed before the archive was ready")

    return pause


def _read(
    transport: Transport, request: Request, reply: Reply
) -> types.CheckpointArchiveUrlResponse:
    if reply.status >= 300:
        location = reply.headers.get("location")
        if not location:
            raise ResponseDecodeError(
                f"{request.name} returned {reply.status} without a Location", status=reply.status
            )
        url = urljoin(transport.config.base_url + request.path, location)
        return types.CheckpointArchiveUrlResponse(url, _expires(reply.headers))
    return read(types.CheckpointArchiveUrlResponse, reply, request.name)


def _expires(headers: Mapping[str, str]) -> Optional[datetime]:
    """Read ``Expires``, an HTTP date or RFC 3339; None if it is neither."""
    text = headers.get("expires")
    try:
        found = email.utils.parsedate_to_datetime(text or "")
    except (ValueError, TypeError, IndexError):
        try:
            return parse_datetime(text)
        except ValueError:
            return None
    return found if found.tzinfo is not None else found.replace(tzinfo=timezone.utc)
