"""What a response to a poll means.  Pure: no I/O, no clock.

See docs/protocol.md, "Interpreting a poll", and docs/servers.md: a pending request may be a 408,
a ``try_again`` body, or just a long silence; a failed one a 200 with ``error``, or a 4xx.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, Optional, Union

from tinkex._transport.request import Reply
from tinkex.errors import APIError, RequestFailedError, ResultExpiredError, TinkexError

#: Every JSON response that is not a result contains one of these.
_SPECIAL = (b'"try_again"', b'"complete_metadata"', b'"error"')


@dataclasses.dataclass(frozen=True)
class Pending:
    """Not done yet."""

    queue_state: Optional[str] = None
    reason: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class Done:
    """Done: *reply* holds the result, still encoded."""

    reply: Reply


@dataclasses.dataclass(frozen=True)
class Announced:
    """Done, but the server has sent only the size of the result, which is still to be fetched."""

    size: int


@dataclasses.dataclass(frozen=True)
class Failed:
    """The request has failed, with *error*."""

    error: TinkexError


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Only the poll has failed.  It is repeated; *error* is reported if that does not help."""

    error: APIError


Outcome = Union[Pending, Done, Announced, Failed, Trouble]


def interpret(
    reply: Reply, error: Optional[APIError], *, request_id: str, kind: str, maybe_lost: bool
) -> Outcome:
    """Classify the response to one poll.

    *error* is the typed error of a reply that is not a 2xx.  With *maybe_lost*, the response to an
    earlier poll was cut off and may have been the result: a 404 then means that the result is gone.
    """
    if error is not None:
        return _interpret_error(
            reply, error, request_id=request_id, kind=kind, maybe_lost=maybe_lost
        )
    if "application/x-protobuf" in reply.content_type:  # everything but a result is JSON
        return Done(reply)
    if not any(word in reply.body for word in _SPECIAL):
        return Done(reply)  # do not decode a large result just to look at its keys
    body = reply.json()
    if not isinstance(body, dict):
        return Done(reply)
    if body.get("type") == "try_again":
        return _pending(body)
    if body.get("status") == "complete_metadata":
        size = body.get("response_payload_size")
        return Announced(max(size, 0) if isinstance(size, int) else 0)
    if body.get("error") is not None:
        category = str(body.get("category") or "unknown").lower()
        known = category if category in ("user", "server") else "unknown"
        return Failed(
            RequestFailedError(
                f"{kind} failed on the server: {body['error']}",
                request_id=request_id,
                category=known,
            )
        )
    return Done(reply)


def _interpret_error(
    reply: Reply, error: APIError, *, request_id: str, kind: str, maybe_lost: bool
) -> Outcome:
    status = reply.status
    error.request_id = request_id
    if status == 408:  # how some servers end a long poll
        body = getattr(error, "body", None)
        return _pending(body) if isinstance(body, dict) else Pending()
    # These are about the poll or the account, not about the work.  501 is excluded: no repetition
    # makes a server implement the route.
    if status in (402, 429) or (status >= 500 and status != 501):
        return Trouble(error)
    # A server may hand out a result only once.  A 404 means an unknown request; but if an earlier
    # response was cut off, that response most likely was the result.
    if status == 410 or (status == 404 and maybe_lost):
        lost = ResultExpiredError(
            f"the result of {kind} is no longer on the server (status {status})",
            status=status,
            request_id=request_id,
            hint="The work itself was probably done. Check the run before you submit it again.",
        )
        lost.__cause__ = error
        return Failed(lost)
    if status in (400, 409, 422):  # how some servers report that the work failed
        failed = RequestFailedError(
            f"{kind} failed on the server: {error.message}",
            status=status,
            request_id=request_id,
            category="user",
        )
        failed.__cause__ = error
        return Failed(failed)
    return Failed(error)


def _pending(body: Dict[str, Any]) -> Pending:
    state, reason = body.get("queue_state"), body.get("queue_state_reason")
    return Pending(
        state if isinstance(state, str) else None, reason if isinstance(reason, str) else None
    )
