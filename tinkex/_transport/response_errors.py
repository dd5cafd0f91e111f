"""The error that a response stands for: the server's own, or one from a gateway in front of it.

The server's own responses are JSON or protobuf, or the plain text of its web framework.  Anything
else (an HTML page, an empty body, XML) comes from a load balancer, a sign-on page or a captive
portal.  It reports nothing about the request: it is an outage, and the request can be repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Mapping, Optional, Tuple

import orjson

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex._transport.redirects import shown
from tinkex._transport.request import NOT_JSON_HINT, Reply, Request, describe
from tinkex.errors import APIConnectionError, APIError, ResponseDecodeError, status_error_type
from tinkex.retry import retry_after_s

if TYPE_CHECKING:
    from tinkex._transport.fast_connection import AnyChannel
    from tinkex._transport.redaction import Redactor

_HINTS: Mapping[int, str] = {
    401: ErrorText(
        "Set TINKER_API_KEY",
        Setting("api_key", ..., aside=" (or {})"),
        " or run `tinkex auth login`: the server asks for a key that it knows.",
    ),
    402: "The account cannot pay for this: check its billing set-up.",
    403: "The key is known but may not do this.",
}

GATEWAY_HINT = ErrorText(
    "Something between this machine and the server (a proxy, load balancer or sign-on page) seems "
    "to have answered. If it does so again, check ",
    Setting("base_url"),
    " and its path prefix.",
)

#: Requests with these statuses are repeated in any case.
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


def status_error(
    request: Request, reply: Reply, wall: float, redact: Callable[[str], str]
) -> APIError:
    """Make the typed error for a response with an error status.

    *wall* is now, in seconds since the epoch; *redact* takes secrets out of a text.
    """
    body, detail = _read_error_body(reply, redact)
    return status_error_type(reply.status)(
        f"{request.name} answered {reply.status}{': ' if detail else ''}{detail}",
        status=reply.status,
        body=body,
        retry_after_s=retry_after_s(reply.headers, wall),
        hint=_hint(reply),
    )


def _hint(reply: Reply) -> Optional[str]:
    if 300 <= reply.status < 400:
        where = shown(reply.headers.get("location", ""))
        return ErrorText(
            f"The server redirects to {where}, which is not followed. Is ",
            Setting("base_url"),
            " right?",
        )
    return _HINTS.get(reply.status)


def _read_error_body(reply: Reply, redact: Callable[[str], str]) -> Tuple[Any, str]:
    """The decoded body, and the part of it a person wants to read."""
    try:
        body: Any = orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        text = redact(reply.body[:500].decode("utf-8", "replace").strip())
        return text or None, text
    detail = body
    if isinstance(body, dict):
        detail = body.get("detail") or body.get("error") or body.get("message") or body
    text = detail if isinstance(detail, str) else orjson.dumps(detail).decode()
    text = redact(text)[:500]
    return (body if len(reply.body) <= 500 else text), text


def raise_if_from_gateway(
    request: Request, reply: Reply, channel: AnyChannel, wall: float, redactor: Redactor
) -> None:
    """Raise APIConnectionError if a gateway has responded in the place of the server.

    Its ``__cause__`` is the error for the case that it was the server after all, which
    `tinkex.retry.server_error_behind` returns.
    """
    if not is_from_gateway(request, reply):
        return
    channel.close()  # idle connections only: the next attempt makes a new one
    text = redactor.text(describe(request, reply), request)
    error = APIConnectionError(
        f"{request.name} was answered by a gateway, not by the server: {text}",
        status=reply.status,
        hint=GATEWAY_HINT,
    )
    # A success may be the server's, with its body lost; with another status, gateways send nothing
    # on to the server.
    error.maybe_taken = reply.status < 300
    if reply.status < 300:
        error.__cause__ = ResponseDecodeError(
            f"{request.name}: the response is not JSON: {text}",
            status=reply.status,
            hint=NOT_JSON_HINT,
        )
    else:
        error.__cause__ = status_error(request, reply, wall, redactor.text)
    raise error


def is_from_gateway(request: Request, reply: Reply) -> bool:
    """True if *reply* is plainly not the server's.

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
        return not (status == 204 or (status < 300 and request.empty_response_ok))
    start = reply.body[:64].lstrip(_BLANKS)
    if start.startswith(b"<"):
        return True
    if start.startswith((b"{", b"[")):
        return False
    if "json" in kind:
        return False
    plain = status >= 300 and kind.partition(";")[0].strip() in ("text/plain", "")
    return not plain or start.lower().startswith(_GATEWAY_TEXTS)
