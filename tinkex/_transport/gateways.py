"""Which answers come from something in between: a load balancer, a sign-on page, a captive portal.

The server's own answers are JSON or protobuf, or the plain text of its web framework.  Anything
else (an HTML page, an empty body, XML) says nothing about the request: it is an outage, and the
request can be repeated.  Pure functions of an answer.
"""

from __future__ import annotations

import re
from typing import Optional

from tinkex._transport.request import Reply, Request
from tinkex.errors import APIConnectionError, APIError, APIStatusError, ResponseDecodeError

HINT = (
    "Something between this machine and the server (a proxy, load balancer or sign-on page) seems "
    "to have answered. If it does so again, check base_url and its path prefix."
)

#: Characters of a body that are shown.
_SHOWN = 200

#: These statuses are repeated whoever sent them.
_PASSING = (408, 429)
#: A gateway's limits on a request's size: sent again, it is no smaller.
_TOO_LARGE = (413, 414, 431)

#: Plain text of well-known gateways: Traefik and Go's default, ingress-nginx, Envoy.
_GATEWAY_TEXTS = (
    b"404 page not found",
    b"default backend - 404",
    b"no healthy upstream",
    b"upstream connect error",
)

_BLANKS = b" \t\r\n\xef\xbb\xbf"


def is_from_gateway(request: Request, reply: Reply) -> bool:
    """Tell whether *reply* is plainly not the server's.

    False for statuses that decide by themselves whether a request is sent again.
    """
    status = reply.status
    if status in (*_PASSING, *_TOO_LARGE) or (status >= 500 and status != 501):
        return False
    if 300 <= status < 400 and not request.follow_redirects:
        return False
    kind = reply.content_type
    if "protobuf" in kind:
        return False  # it may begin with any byte, and hold none
    if not reply.body:
        return not (status == 204 or (status < 300 and request.empty_answer_ok))
    start = reply.body[:64].lstrip(_BLANKS)
    if start.startswith(b"<"):
        return True
    if start.startswith((b"{", b"[")):
        return False
    if "json" in kind:
        return False
    plain = status >= 300 and kind.partition(";")[0].strip() in ("text/plain", "")
    return not plain or start.lower().startswith(_GATEWAY_TEXTS)


def gateway_error(request: Request, reply: Reply, text: str, cause: APIError) -> APIConnectionError:
    """Make the error for an answer that is not the server's; *text* describes it.

    *cause* is what it is if it was the server's after all; see `as_the_servers_own`.
    """
    error = APIConnectionError(
        f"{request.name} was answered by a gateway, not by the server: {text}",
        status=reply.status,
        hint=HINT,
    )
    # A success may be the server's, with its body lost; with another status, gateways send nothing
    # on to the server.
    error.maybe_taken = reply.status < 300
    error.__cause__ = cause
    return error


def as_the_servers_own(error: Exception) -> Optional[APIError]:
    """The error to report if an answer that looked like a gateway's turns out to be the server's.

    None if *error* is not of `gateway_error`.
    """
    cause = error.__cause__
    if isinstance(error, APIConnectionError) and isinstance(
        cause, (APIStatusError, ResponseDecodeError)
    ):
        return None if cause.retryable else cause
    return None


def describe(request: Request, reply: Reply) -> str:
    """Status, content type and the beginning of the body, for messages; may hold secrets."""
    kind = reply.content_type.partition(";")[0].strip() or "no content type"
    if request.secret_reply:
        return f"status {reply.status}, {kind}"
    text = re.sub(r"\s+", " ", reply.body[: 4 * _SHOWN].decode("utf-8", "replace")).strip()
    shown = repr(text[:_SHOWN]) if text else "empty body"
    return f"status {reply.status}, {kind}, {shown}"
