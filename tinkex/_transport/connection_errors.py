"""What requests and urllib3 raise when there is no response, as typed errors in plain words."""

from __future__ import annotations

import http.client
import socket
from typing import Any, Callable, List, Optional, Set
from urllib.parse import urlsplit

import requests
import urllib3.exceptions

from tinkex._runtime import descriptors
from tinkex._runtime.error_text import ErrorText, Setting
from tinkex._transport.request import Request
from tinkex.config import DEFAULT_BASE_URL, Config
from tinkex.errors import APIConnectionError, APITimeoutError, InvalidInputError, TinkexError

#: What happens only while a connection is being made.
_CONNECTING = (
    urllib3.exceptions.NewConnectionError,
    ConnectionRefusedError,
    socket.gaierror,
)

#: What cannot be sent at all; it stays so, and is no outage.
_IMPOSSIBLE = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidHeader,
    requests.exceptions.MissingSchema,
    requests.exceptions.InvalidSchema,
)

#: Errors whose text is complete: where in this package they were raised does not help.
_PLAIN = (
    TinkexError,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
)


def connection_error(
    config: Config,
    request: Request,
    error: requests.RequestException,
    redact: Callable[[str], str],
) -> APIConnectionError:
    """Make the typed error for *error*; *redact* takes secrets out of a text."""
    where = config.host_and_port
    if _in_handshake(error):
        mute = APITimeoutError(
            f"{where} did not answer the TLS handshake of {request.name}",
            hint=ErrorText(
                "Does it speak https? If not, ",
                Setting("base_url"),
                f" is {_plain(config.base_url)}.",
            ),
        )
        mute.maybe_taken = False
        return mute
    if isinstance(error, requests.Timeout) or _is_stalled_body(error):
        if isinstance(error, requests.ConnectTimeout):
            limit = f"{config.connect_timeout_s:g} s to connect"
        else:
            limit = f"{request.read_timeout_s or config.read_timeout_s:g} s"
        late = APITimeoutError(f"{where} did not answer {request.name} within {limit}")
        late.maybe_taken = not isinstance(error, requests.ConnectTimeout)
        return late
    reason = redact(root_cause(error))
    if isinstance(error, _IMPOSSIBLE):
        unsent = APIConnectionError(f"{request.name} cannot be sent: {reason}", retryable=False)
        unsent.maybe_taken = False
        return unsent
    if isinstance(error, requests.exceptions.ProxyError):
        proxy = urlsplit(config.proxy or "")
        reason = f"the proxy {proxy.hostname}:{proxy.port}: {reason}"
    unreachable = APIConnectionError(
        f"cannot reach {where} for {request.name}: {reason}",
        retryable=not isinstance(error, requests.exceptions.SSLError),
        hint=descriptors.advice() if descriptors.are_exhausted(error) else _advice(config),
    )
    unreachable.maybe_taken = not _never_connected(error)
    return unreachable


def _never_connected(error: requests.RequestException) -> bool:
    """True if no connection was made, so that nothing can have arrived."""
    if isinstance(error, (requests.exceptions.SSLError, requests.exceptions.ProxyError)):
        return True
    inner: Any = error.args[0] if error.args else None
    return isinstance(getattr(inner, "reason", inner), _CONNECTING)


def _in_handshake(error: requests.RequestException) -> bool:
    """True for a timeout before a byte of the request was sent, which requests calls of reading."""
    if not isinstance(error, requests.ReadTimeout):
        return False
    inner = error.__cause__ or error.__context__
    cause = inner and (inner.__cause__ or inner.__context__)
    return isinstance(cause, socket.timeout) and "handshake" in str(cause)


def _plain(url: str) -> str:
    return url.replace("https:", "http:", 1)


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


def forget_frames(error: BaseException) -> None:
    """Drop the tracebacks of *error* and its causes: of errors of ours, and of the transport's.

    Their frames hold the request and its future, which holds the error: a cycle that only the
    garbage collector finds, if it ever runs.  Other errors, such as one of a user's function, keep
    theirs.
    """
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
