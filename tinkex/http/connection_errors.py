"""What requests and urllib3 raise when there is no answer, as our errors, in words."""

from __future__ import annotations

import socket
from typing import Any, Callable
from urllib.parse import urlsplit

import requests
import urllib3.exceptions

from tinkex.config import Config
from tinkex.errors import APIConnectionError, APITimeoutError
from tinkex.http.request import Request

#: What happens only while a connection is being made.
_CONNECTING = (
    urllib3.exceptions.NewConnectionError,
    ConnectionRefusedError,
    socket.gaierror,
)


def connection_error(
    config: Config,
    request: Request,
    error: requests.RequestException,
    redact: Callable[[str], str],
) -> APIConnectionError:
    """Make the typed error for *error*; *redact* takes secrets out of a text."""
    where = config.host_and_port
    if isinstance(error, requests.Timeout) or _is_stalled_body(error):
        if isinstance(error, requests.ConnectTimeout):
            limit = f"{config.connect_timeout_s:g} s to connect"
        else:
            limit = f"{request.read_timeout_s or config.read_timeout_s:g} s"
        late = APITimeoutError(f"{where} did not answer {request.name} within {limit}")
        late.maybe_taken = not isinstance(error, requests.ConnectTimeout)
        return late
    reason = redact(root_cause(error))
    if isinstance(error, requests.exceptions.ProxyError):
        proxy = urlsplit(config.proxy or "")
        reason = f"the proxy {proxy.hostname}:{proxy.port}: {reason}"
    unreachable = APIConnectionError(
        f"cannot reach {where} for {request.name}: {reason}",
        retryable=not isinstance(error, requests.exceptions.SSLError),
        hint=f"Is the server running at {config.base_url}, and base_url right?",
    )
    unreachable.maybe_taken = not _never_connected(error)
    return unreachable


def _never_connected(error: requests.RequestException) -> bool:
    """True if no connection was made, so that nothing can have arrived."""
    if isinstance(error, (requests.exceptions.SSLError, requests.exceptions.ProxyError)):
        return True
    inner: Any = error.args[0] if error.args else None
    return isinstance(getattr(inner, "reason", inner), _CONNECTING)


def _is_stalled_body(error: requests.RequestException) -> bool:
    """True for a timeout in the middle of an answer, which requests calls a ConnectionError."""
    return bool(error.args) and isinstance(error.args[0], urllib3.exceptions.ReadTimeoutError)


def root_cause(error: BaseException) -> str:
    """The innermost reason of a requests error, in words: it wraps the cause three deep."""
    seen: BaseException = error
    while True:
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
        text = str(seen)
        return text.partition(": ")[2] or text
    return str(seen) or type(seen).__name__
