"""Routes that a server may lack: recognizing a missing route, and the error that names it."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Iterator, Optional

from tinkex.errors import APIStatusError, RouteMissingError

if TYPE_CHECKING:
    from tinkex._transport.transport import Sender

#: What web frameworks respond if a route is missing; an application's 404 names the missing object
#: (docs/protocol.md, "Error bodies").
_GENERIC = ("", "not found", "404 not found", "404: not found", "404 page not found")
_NAMES_THE_ROUTE = re.compile(r"(cannot|no route:?) (get|post|put|delete) /")


def is_missing_route(error: APIStatusError, *, names_nothing: bool = False) -> bool:
    """True if *error* means that the server lacks the route.

    A 404 may also mean that an object named in the request does not exist, unless *names_nothing*.
    """
    if error.status in (405, 501):
        return True
    if error.status != 404:
        return False
    return names_nothing or _is_generic(error.body)


def was_done_before(error: APIStatusError, *statuses: int) -> bool:
    """True if *error* means that an earlier attempt of the same request was carried out."""
    # A request without a seq_id is sent again if its response is lost.  If the server has already
    # carried it out, the second attempt gets one of *statuses*: there is nothing left to do.
    return error.maybe_taken and error.status in statuses and not is_missing_route(error)


def _is_generic(body: Any) -> bool:
    if isinstance(body, dict):
        body = body.get("detail", body.get("error", body.get("message", "")))
    if not isinstance(body, str):
        return body is None
    text = body.strip().lower()
    if text in _GENERIC or text.startswith("<") or "requested url was not found" in text:
        return True
    return _NAMES_THE_ROUTE.match(text) is not None


@contextmanager
def optional_route(
    transport: Sender, route: str, *, names_nothing: bool = False, ask_once: bool = False
) -> Iterator[None]:
    """Turn the response of a server that lacks *route* into RouteMissingError.

    Args:
        route: the method, and the path after ``/api/v1/`` with placeholders such as ``{id}``.
        names_nothing: the request names no object that could be missing instead.
        ask_once: once the route was found missing, raise the error without a request.  For requests
            that the library makes by itself; what a user calls is tried each time.
    """
    server = transport.server
    status = server.missing_status(route)
    if ask_once and status is not None:
        raise _missing(transport, route, status)
    try:
        yield
    except APIStatusError as error:
        if not is_missing_route(error, names_nothing=names_nothing):
            raise
        server.note_missing(route, error.status or 404)
        raise _missing(transport, route, error.status, error.body) from error
    server.note_present(route)


def _missing(
    transport: Sender, route: str, status: Optional[int], body: Any = None
) -> RouteMissingError:
    return RouteMissingError(
        f"{transport.config.host_and_port} does not have {route} (status {status})",
        status=status,
        body=body,
        hint="Many servers of this protocol lack routes that the hosted service has; nothing "
        "was changed.",
    )
