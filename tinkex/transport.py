"""Transport: sends requests to one server, with the one retry loop of tinkex.

Traffic classes have connection pools of their own, so that neither long polls nor bulk data can
delay a submission.  Nothing here knows an endpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import random
import threading
import uuid
import weakref
from typing import Any, Dict, Mapping, NoReturn, Optional
from urllib.parse import urlsplit

import orjson
import requests
import urllib3.exceptions

from tinkex._version import __version__
from tinkex.channel import Channel
from tinkex.clock import SYSTEM_CLOCK, Clock
from tinkex.config import Config
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    ClientClosedError,
    ResponseDecodeError,
    status_error_type,
)
from tinkex.rate_limiter import limiter_for
from tinkex.retry import RetryPolicy, retry_after_s

logger = logging.getLogger(__name__)

JSON_TYPE = "application/json"

#: Pause between attempts while the account cannot pay, with ``on_billing="wait"``, in seconds.
BILLING_PAUSE_S = 5.0

#: Connections kept per traffic class.
POOL_SIZES: Mapping[str, int] = {"control": 4, "work": 16, "poll": 64}

_HINTS: Mapping[int, str] = {
    401: "Set TINKER_API_KEY or pass api_key=; this server asks for a key it knows.",
    402: "The account cannot pay for this: check its billing set-up.",
    403: "The key is known but may not do this.",
}


@dataclasses.dataclass(frozen=True)
class Request:
    """One logical request; every attempt sends the same bytes and the same idempotency key."""

    method: str
    path: str
    body: Optional[bytes] = None
    content_type: str = JSON_TYPE
    accept: str = JSON_TYPE
    traffic: str = "work"
    read_timeout_s: Optional[float] = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Method and path, for messages."""
        return f"{self.method} {self.path.partition('?')[0]}"


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer of any status, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def content_type(self) -> str:
        """Lower-case content type, with its parameters."""
        return self.headers.get("content-type", "").lower()

    def json(self) -> Any:
        """The decoded body; ResponseDecodeError if it is not JSON."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise ResponseDecodeError(
                f"the answer (status {self.status}, {self.content_type or 'no content type'}) "
                f"is not JSON: {self.body[:200]!r}",
                status=self.status,
                hint="Is base_url the address of a Tinker server, and its path prefix right?",
            ) from error


class Transport:
    """Sends requests to the server of *config*.  Thread-safe; every call blocks.

    *closing* is set by whoever owns the transport: every wait between attempts then ends with
    ClientClosedError.
    """

    def __init__(
        self,
        config: Config,
        *,
        closing: Optional[threading.Event] = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.config = config
        self.closing = closing or threading.Event()
        self.clock = clock
        self._limiter = limiter_for(config.base_url, config.key_digest)
        self._channels = {name: Channel(config, size) for name, size in POOL_SIZES.items()}
        # Guards _private: the channels of busy threads.
        self._lock = threading.Lock()
        self._private: weakref.WeakSet[Channel] = weakref.WeakSet()
        self._headers: Dict[str, str] = {
            "User-Agent": f"tinkex/{__version__} Python/{platform.python_version()}",
            "Accept-Encoding": "gzip, deflate",
        }
        if config.api_key:
            self._headers["X-API-Key"] = config.api_key

    def open_channel(self) -> Channel:
        """A private connection for one busy thread; closed with the transport at the latest."""
        channel = Channel(self.config, pool_size=1)
        with self._lock:
            self._private.add(channel)
        if self.closing.is_set():
            channel.abort()
        return channel

    def send_once(
        self,
        request: Request,
        *,
        channel: Optional[Channel] = None,
        idempotency_key: Optional[str] = None,
    ) -> Reply:
        """Send one attempt and return the answer, whatever its status.

        Raises:
            APITimeoutError, APIConnectionError: there was no answer.
            ClientClosedError: the transport was closed meanwhile.
        """
        headers = {**self._headers, "Accept": request.accept, **request.headers}
        if request.method != "GET":
            headers["Content-Type"] = request.content_type
            headers["X-Idempotency-Key"] = idempotency_key or str(uuid.uuid4())
        headers.update(self.config.extra_headers)
        read_timeout_s = request.read_timeout_s or self.config.read_timeout_s
        timeout = (min(self.config.connect_timeout_s, read_timeout_s), read_timeout_s)
        try:
            response = (channel or self._channels[request.traffic]).request(
                request.method,
                self.config.base_url + request.path,
                headers=headers,
                body=request.body,
                timeout=timeout,
            )
        except requests.RequestException as error:
            self._raise_connection_error(request, error)
        lowered = {name.lower(): value for name, value in response.headers.items()}
        reply = Reply(response.status_code, lowered, response.content)
        return self._without_key(reply)

    def _without_key(self, reply: Reply) -> Reply:
        """Take the key out of a text that echoes it, before it gets into any error or log."""
        key = (self.config.api_key or "").encode("latin-1")
        if not key or key not in reply.body or "protobuf" in reply.content_type:
            return reply
        return dataclasses.replace(reply, body=reply.body.replace(key, b"<api key>"))

    def send(
        self, request: Request, policy: RetryPolicy, *, channel: Optional[Channel] = None
    ) -> Reply:
        """Send until there is a 2xx answer or *policy* gives up.

        Raises:
            APIStatusError: the server's last answer.
            APIConnectionError: no answer within the policy's time.
            ClientClosedError: closed meanwhile.
        """
        key = str(uuid.uuid4())
        started = self.clock.monotonic()
        attempt = 0
        while True:
            self._wait(self._limiter.wait_s(), request)
            attempt += 1
            reply: Optional[Reply] = None
            hint_s: Optional[float] = None
            try:
                reply = self.send_once(request, channel=channel, idempotency_key=key)
                if 200 <= reply.status < 300:
                    return reply
                error: APIError = self.status_error(request, reply)
                hint_s = retry_after_s(reply.headers, self.clock.wall())
                again = policy.retries_status(reply.status, attempt, reply.headers)
            except APIConnectionError as caught:
                error, again = caught, caught.retryable
            elapsed = self.clock.monotonic() - started
            delay = policy.delay_s(attempt, elapsed, hint_s, random.random()) if again else None
            if error.status == 402 and self.config.on_billing == "wait":
                delay = BILLING_PAUSE_S
            error.attempts, error.elapsed_s = attempt, elapsed
            if delay is None:
                raise error
            if reply is not None and reply.status == 429:
                self._limiter.back_off(delay)
            level = logging.INFO if attempt in (1, 4) or attempt % 16 == 0 else logging.DEBUG
            logger.log(level, "%s; attempt %d, next in %.1f s", error.message, attempt, delay)
            self._wait(delay, request)

    def _wait(self, delay_s: float, request: Request) -> None:
        if self.closing.is_set() or (delay_s > 0 and self.closing.wait(delay_s)):
            raise ClientClosedError(f"the client was closed before {request.name} was done")

    def status_error(self, request: Request, reply: Reply) -> APIError:
        """Make the typed error for an answer with an error status."""
        body, detail = self._read_error_body(reply)
        return status_error_type(reply.status)(
            f"{request.name} answered {reply.status}{': ' if detail else ''}{detail}",
            status=reply.status,
            body=body,
            retry_after_s=retry_after_s(reply.headers, self.clock.wall()),
            hint=_HINTS.get(reply.status),
        )

    def _read_error_body(self, reply: Reply) -> Any:
        """The decoded body, and the part of it a person wants to read."""
        try:
            body: Any = orjson.loads(reply.body)
        except orjson.JSONDecodeError:
            text = self.redact(reply.body[:500].decode("utf-8", "replace").strip())
            return text or None, text
        detail = body
        if isinstance(body, dict):
            detail = body.get("detail") or body.get("error") or body.get("message") or body
        text = detail if isinstance(detail, str) else orjson.dumps(detail).decode()
        text = self.redact(text)[:500]
        return (body if len(reply.body) <= 500 else text), text

    def redact(self, text: str) -> str:
        """Return *text* without the key, should a server have echoed it."""
        key = self.config.api_key
        return text.replace(key, "<api key>") if key else text

    def _raise_connection_error(
        self, request: Request, error: requests.RequestException
    ) -> NoReturn:
        if self.closing.is_set():
            raise ClientClosedError(
                f"the client was closed while {request.name} was under way"
            ) from error
        where = self.config.host_and_port
        if isinstance(error, requests.Timeout) or _is_stalled_body(error):
            if isinstance(error, requests.ConnectTimeout):
                limit = f"{self.config.connect_timeout_s:g} s to connect"
            else:
                limit = f"{request.read_timeout_s or self.config.read_timeout_s:g} s"
            raise APITimeoutError(
                f"{where} did not answer {request.name} within {limit}"
            ) from error
        reason = self.redact(_root_cause(error))
        if isinstance(error, requests.exceptions.ProxyError):
            proxy = urlsplit(self.config.proxy or "")
            reason = f"the proxy {proxy.hostname}:{proxy.port}: {reason}"
        raise APIConnectionError(
            f"cannot reach {where} for {request.name}: {reason}",
            retryable=not isinstance(error, requests.exceptions.SSLError),
            hint=f"Is the server running at {self.config.base_url}, and base_url right?",
        ) from error

    def drop_idle(self) -> None:
        """Close the idle connections of the shared channels; those in use are kept."""
        for channel in self._channels.values():
            channel.close()

    def abort(self) -> None:
        """Break off everything in flight.  Set ``closing`` first, so that callers learn why."""
        with self._lock:
            channels = [*self._channels.values(), *self._private]
        for channel in channels:
            channel.abort()


def _is_stalled_body(error: requests.RequestException) -> bool:
    """True for a timeout in the middle of an answer, which requests calls a ConnectionError."""
    return bool(error.args) and isinstance(error.args[0], urllib3.exceptions.ReadTimeoutError)


def _root_cause(error: BaseException) -> str:
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
