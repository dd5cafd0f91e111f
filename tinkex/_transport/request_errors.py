"""Typed errors for failed attempts: no response, an error status, a gateway's page, damaged JSON.

The server's own responses are JSON or protobuf, or the plain text of its web framework.  Anything
else (an HTML page, an empty body, XML) comes from a load balancer, a sign-on page or a captive
portal.  It says nothing about the request: it is an outage, and the request can be sent again.
"""

from __future__ import annotations

import http.client
import re
import socket
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Set, Tuple
from urllib.parse import urlsplit

import orjson
import requests
import urllib3.exceptions

from tinkex._runtime import descriptors
from tinkex._runtime.error_text import ErrorText, Setting
from tinkex._transport.request import NOT_JSON_HINT, Reply, Request, host_of_redirect
from tinkex.config import DEFAULT_BASE_URL, Config
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    InvalidInputError,
    ResponseDecodeError,
    TinkexError,
    status_error_type,
)
from tinkex.retry import retry_after_s

if TYPE_CHECKING:
    from tinkex._transport.redaction import Redactor

#: Errors raised only while a connection is being made.
_CONNECTING = (
    urllib3.exceptions.NewConnectionError,
    ConnectionRefusedError,
    socket.gaierror,
)

#: Errors for a request that cannot be sent at all: another attempt would fail in the same way.
_IMPOSSIBLE = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidHeader,
    requests.exceptions.MissingSchema,
    requests.exceptions.InvalidSchema,
)

#: Errors whose text is enough: knowing where in this package they were raised does not help.
_PLAIN = (
    TinkexError,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
)

_HINTS: Mapping[int, str] = {
    401: ErrorText(
        "Set TINKER_API_KEY",
        Setting("api_key", ..., aside=" (or {})"),
        " or run `tinkex auth login`: the server asks for a key that it knows.",
    ),
    402: "The account cannot pay for this: check its billing set-up.",
    403: "The key is valid, but has no permission for this.",
}

GATEWAY_HINT = ErrorText(
    "Something between this machine and the server (a proxy, load balancer or sign-on page) seems "
    "to have responded. If it does so again, check ",
    Setting("base_url"),
    " and its path prefix.",
)

#: Retried in any case, whether the server or a gateway responded.
_ALWAYS_RETRIED = (408, 429)
#: A gateway's limits on the size of a request, which is no smaller when sent again.
_TOO_LARGE = (413, 414, 431)

#: Plain text of well-known gateways: Traefik and Go's default, ingress-nginx, Envoy.
_GATEWAY_TEXTS = (
    b"404 page not found",
    b"default backend - 404",
    b"no healthy upstream",
    b"upstream connect error",
)

#: White space and the byte order mark, which may precede the first character of a body.
_BLANKS = b" \t\r\n\xef\xbb\xbf"

#: How many characters of a body messages show.
_SHOWN = 200


# ---- No response ----


def connection_error(
    config: Config,
    request: Request,
    error: requests.RequestException,
    redact: Callable[[str], str],
) -> APIConnectionError:
    """Make the typed error for *error*; *redact* removes secrets from a text."""
    where = config.host_and_port
    if _in_handshake(error):
        http_url = config.base_url.replace("https:", "http:", 1)
        no_handshake = APITimeoutError(
            f"{where} did not respond to the TLS handshake of {request.name}",
            hint=ErrorText(
                "Does it speak https? If not, ", Setting("base_url"), f" is {http_url}."
            ),
        )
        no_handshake.maybe_taken = False
        return no_handshake
    if isinstance(error, requests.Timeout) or _is_stalled_body(error):
        connecting = isinstance(error, requests.ConnectTimeout)
        if connecting:
            limit = f"{config.connect_timeout_s:g} s to connect"
        else:
            limit = f"{request.read_timeout_s or config.read_timeout_s:g} s"
        late = APITimeoutError(f"{where} did not respond to {request.name} within {limit}")
        late.maybe_taken = not connecting
        return late
    reason = redact(root_cause(error))
    if isinstance(error, _IMPOSSIBLE):
        unsent = APIConnectionError(f"{request.name} cannot be sent: {reason}", retryable=False)
        unsent.maybe_taken = False
        return unsent
    if isinstance(error, requests.exceptions.ProxyError):
        # Leave out the URL's user name and password.
        proxy = urlsplit(config.proxy or "")
        reason = f"the proxy {proxy.hostname}:{proxy.port}: {reason}"
    unreachable = APIConnectionError(
        f"cannot reach {where} for {request.name}: {reason}",
        # A certificate that is refused now will be refused at every attempt.
        retryable=not isinstance(error, requests.exceptions.SSLError),
        hint=descriptors.advice() if descriptors.are_exhausted(error) else _advice(config),
    )
    unreachable.maybe_taken = not _never_connected(error)
    return unreachable


def _never_connected(error: requests.RequestException) -> bool:
    """True if no connection was made, so that the request cannot have arrived."""
    if isinstance(error, (requests.exceptions.SSLError, requests.exceptions.ProxyError)):
        return True
    inner: Any = error.args[0] if error.args else None
    return isinstance(getattr(inner, "reason", inner), _CONNECTING)


def _in_handshake(error: requests.RequestException) -> bool:
    """True for a timeout in the TLS handshake, which requests calls a ReadTimeout."""
    if not isinstance(error, requests.ReadTimeout):
        return False
    inner = error.__cause__ or error.__context__
    cause = inner and (inner.__cause__ or inner.__context__)
    # Only the text of ssl's error distinguishes it from a timeout of the response.
    return isinstance(cause, socket.timeout) and "handshake" in str(cause)


def _advice(config: Config) -> str:
    if config.base_url == DEFAULT_BASE_URL:
        return ErrorText(
            f"{config.base_url} is the default. For another server give ",
            Setting("base_url", ...),
            ", or set TINKER_BASE_URL (`tinkex serve` prints its own).",
        )
    return ErrorText(
        f"Is the server running at {config.base_url}, and ", Setting("base_url"), " right?"
    )


def _is_stalled_body(error: requests.RequestException) -> bool:
    """True for a timeout in the middle of a response, which requests calls a ConnectionError."""
    return bool(error.args) and isinstance(error.args[0], urllib3.exceptions.ReadTimeoutError)


def root_cause(error: BaseException) -> str:
    """Return the innermost reason of a requests error, which wraps the cause three deep."""
    seen: BaseException = error
    while True:
        # urllib3 keeps the cause in `reason` (MaxRetryError), requests in its first argument, and
        # urllib3's ProtocolError in its second.
        inner: Any = getattr(seen, "reason", None)
        if not isinstance(inner, BaseException):
            inner = seen.args[0] if seen.args and isinstance(seen.args[0], BaseException) else None
        if inner is None:
            inner = seen.__cause__ or (
                seen.args[1]
                if len(seen.args) > 1 and isinstance(seen.args[1], BaseException)
                else None
            )
        if inner is None or inner is seen:
            break
        seen = inner
    if isinstance(seen, OSError) and seen.strerror:
        return seen.strerror
    if isinstance(seen, urllib3.exceptions.HTTPError):
        # "HTTPConnection(host=...): why" -> "why"
        text = str(seen)
        return text.partition(": ")[2] or text
    return str(seen) or type(seen).__name__


def forget_frames(error: BaseException) -> None:
    """Drop the tracebacks of *error* and its causes, if they are our own or the transport's errors.

    Other errors, such as those of a user's function, keep their tracebacks.
    """
    # The frames hold the request and its future, which holds the error: a cycle that only the
    # garbage collector can free, if it ever runs.
    left: List[Optional[BaseException]] = [error]
    seen: Set[int] = set()
    while left:
        found = left.pop()
        if not isinstance(found, _PLAIN) or id(found) in seen:
            continue
        seen.add(id(found))
        found.__traceback__ = None
        if not isinstance(found, InvalidInputError):  # its causes may be the user's
            left += [found.__cause__, found.__context__]


# ---- A response that is an error ----


def status_error(
    request: Request, reply: Reply, wall: float, redact: Callable[[str], str]
) -> APIError:
    """Make the typed error for a response with an error status.

    *wall* is the current time, in seconds since the epoch; *redact* removes secrets from a text.
    """
    body, detail = _read_error_body(reply, redact)
    return status_error_type(reply.status)(
        f"{request.name} returned {reply.status}{': ' if detail else ''}{detail}",
        status=reply.status,
        body=body,
        retry_after_s=retry_after_s(reply.headers, wall),
        hint=_hint(reply),
    )


def _hint(reply: Reply) -> Optional[str]:
    if 300 <= reply.status < 400:
        where = host_of_redirect(reply.headers.get("location", ""))
        return ErrorText(
            f"The server redirects to {where}, which is not followed. Is ",
            Setting("base_url"),
            " right?",
        )
    return _HINTS.get(reply.status)


def _read_error_body(reply: Reply, redact: Callable[[str], str]) -> Tuple[Any, str]:
    """Return the decoded body, and the part of it that a person wants to read."""
    try:
        body: Any = orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        text = redact(reply.body[:500].decode("utf-8", "replace").strip())
        return text or None, text
    detail = body
    if isinstance(body, dict):
        # The field's name depends on the web framework; FastAPI's is `detail`.
        detail = body.get("detail") or body.get("error") or body.get("message") or body
    text = detail if isinstance(detail, str) else orjson.dumps(detail).decode()
    text = redact(text)[:500]
    # The error keeps the body, unless it is large: FastAPI's 422 echoes the whole batch.
    return (body if len(reply.body) <= 500 else text), text


def repeated_error_hint(request: Request, times: int) -> str:
    """Return the hint for an error that was returned several *times*, word for word."""
    return (
        f"The server returned the same error {times} times: its route {request.name} is broken, or "
        "fails for this request. See its log."
    )


def unreachable_server(error: APIError, config: Config) -> Dict[str, Optional[str]]:
    """Return the *extra* of a log record about *error*: names the server if it is unreachable."""
    is_outage = isinstance(error, APIConnectionError) and not isinstance(error, APITimeoutError)
    # If there is a status, something did respond: a gateway.
    return {"unreachable": config.host_and_port if is_outage and error.status is None else None}


# ---- A response that is not the server's, or was damaged ----


def gateway_error(
    request: Request, reply: Reply, wall: float, redactor: Redactor
) -> Optional[APIConnectionError]:
    """Return the error if a gateway responded in place of the server; None if the server did.

    Its ``__cause__``, which `tinkex.retry.server_error_behind` returns, is the error to raise if
    the response was the server's after all.
    """
    if not is_from_gateway(request, reply):
        return None
    text = redactor.text(describe(request, reply), request)
    error = APIConnectionError(
        f"a gateway, not the server, responded to {request.name}: {text}",
        status=reply.status,
        hint=GATEWAY_HINT,
    )
    # A success may be the server's, with its body lost; with any other status, a gateway has not
    # passed the request on to the server.
    error.maybe_taken = reply.status < 300
    if reply.status < 300:
        error.__cause__ = _not_json_error(request, reply, text)
    else:
        error.__cause__ = status_error(request, reply, wall, redactor.text)
    return error


def is_from_gateway(request: Request, reply: Reply) -> bool:
    """True if *reply* is clearly not the server's.

    False for statuses that alone decide whether a request is sent again.
    """
    status = reply.status
    if status in (*_ALWAYS_RETRIED, *_TOO_LARGE) or (status >= 500 and status != 501):
        return False
    if 300 <= status < 400 and not request.follow_redirects:
        return False
    kind = reply.content_type
    if "protobuf" in kind:
        return False  # may begin with any byte; an empty message has none
    if not reply.body:
        return not (status == 204 or (status < 300 and request.empty_response_ok))
    # The first character decides before the content type does: gateways send HTML as text/plain,
    # and servers send JSON without a type.
    start = reply.body[:64].lstrip(_BLANKS)
    if start.startswith(b"<"):
        return True
    if start.startswith((b"{", b"[")):
        return False
    if "json" in kind:
        return False
    # An error in plain text is the server's web framework's, unless its words are a gateway's.
    plain = status >= 300 and kind.partition(";")[0].strip() in ("text/plain", "")
    return not plain or start.lower().startswith(_GATEWAY_TEXTS)


def error_if_damaged(request: Request, reply: Reply) -> Optional[ResponseDecodeError]:
    """Return the error for a success that should be JSON but is not; None if all is well.

    The work was done.  If the request is sent again under the same idempotency key, the server
    sends the same response again.
    """
    if request.empty_response_ok or "protobuf" in reply.content_type or not reply.is_damaged:
        return None
    error = _not_json_error(request, reply, describe(request, reply))
    error.maybe_taken = True
    return error


def _not_json_error(request: Request, reply: Reply, text: str) -> ResponseDecodeError:
    return ResponseDecodeError(
        f"{request.name}: the response is not JSON: {text}",
        status=reply.status,
        hint=NOT_JSON_HINT,
    )


def describe(request: Request, reply: Reply) -> str:
    """Return status, content type and the beginning of the body, for messages; may hold secrets."""
    kind = reply.content_type.partition(";")[0].strip() or "no content type"
    if request.secret_reply:
        return f"status {reply.status}, {kind}"
    text = re.sub(r"\s+", " ", reply.body[: 4 * _SHOWN].decode("utf-8", "replace")).strip()
    shown = repr(text[:_SHOWN]) if text else "empty body"
    return f"status {reply.status}, {kind}, {shown}"
