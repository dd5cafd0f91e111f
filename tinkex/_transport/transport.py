"""Transport: sends requests to one server.  Nothing here knows an endpoint.

The path of a request, from the top down:

    Transport.send           until it succeeds: attempts.RequestAttempts, for all but polls
    Transport.send_once      one attempt: headers, the token, errors
    Transport._follow        one exchange, and one more for each redirect
    Transport._exchange      the log, the counters, the typed error if there is no response
    Channel.request, or      HTTP: a pool of connections for several threads, or one connection of
    PrivateChannel.request   one thread (fast_connection)

Limits, counters and pauses are objects beside the transport: see `ClientResources`.
"""

from __future__ import annotations

import itertools
import platform
import threading
import uuid
from typing import Callable, Dict, Mapping, NoReturn, Optional, Union
from urllib.parse import urlsplit

import requests

from tinkex._runtime.clock import SYSTEM_CLOCK, Clock
from tinkex._runtime.descriptors import are_exhausted
from tinkex._transport import request_log
from tinkex._transport.attempts import RequestAttempts
from tinkex._transport.billing import BillingPause
from tinkex._transport.channel import Channel
from tinkex._transport.connections import Connections
from tinkex._transport.fast_connection import AnyChannel
from tinkex._transport.redaction import Redactor
from tinkex._transport.request import MAX_HOPS, Reply, Request, next_hop, same_origin
from tinkex._transport.request_errors import (
    connection_error,
    forget_frames,
    gateway_error,
    status_error,
)
from tinkex._transport.response_reading import ACCEPT_ENCODING
from tinkex._transport.server_state import state_of
from tinkex._transport.tokens import Token, is_invalid_token
from tinkex._transport.tracing import Tracer
from tinkex._version import __version__
from tinkex.config import Config
from tinkex.errors import APIError, ClientClosedError
from tinkex.metrics import Recorder
from tinkex.retry import RetryPolicy

_KEY_HEADER = "x-api-key"


class Transport:
    """Sends requests to the server of *config*.  Thread-safe; every call blocks.

    Args:
        config: settings; they name the server.
        closing: once the transport's owner has set it, every wait between attempts ends with
            ClientClosedError.
        recorder: counts what is sent and received.
        billing: decides how long to wait after a 402.

    Attributes:
        server: what is known about the server; shared with other transports.
        tracer: makes spans of operations and requests; None unless ``config.tracing``.
    """

    def __init__(
        self,
        config: Config,
        *,
        closing: Optional[threading.Event] = None,
        clock: Clock = SYSTEM_CLOCK,
        recorder: Optional[Recorder] = None,
        billing: Optional[BillingPause] = None,
    ) -> None:
        self.config = config
        self.closing = closing or threading.Event()
        self.clock = clock
        self.recorder = recorder or Recorder()
        self.billing = billing or BillingPause(config.host_and_port, clock)
        self.server = state_of(config)
        self.tracer = Tracer(config) if config.tracing else None
        self._connections = Connections(config, self.closing, clock)
        self._redactor = Redactor(config, self.server.tokens)
        self._headers: Dict[str, str] = {
            "User-Agent": f"tinkex/{__version__} Python/{platform.python_version()}",
            "Accept-Encoding": ACCEPT_ENCODING,
        }
        # Idempotency keys are made of these two: a uuid4 for each key would be a system call, at
        # which another thread may take the interpreter, thousands of times a second.
        self._key_stem = str(uuid.uuid4())[:24]
        self._key_numbers = itertools.count()

    def new_key(self) -> str:
        """Make an idempotency key."""
        return f"{self._key_stem}{next(self._key_numbers):012x}"

    def open_channel(self) -> Channel:
        """Open a private channel for one busy thread; closed with the transport at the latest."""
        return self._connections.open_channel()

    def open_connection(self) -> AnyChannel:
        """Like `open_channel`, for a thread that sends many short requests and nothing else."""
        return self._connections.open_connection()

    def send(
        self,
        request: Request,
        policy: RetryPolicy,
        *,
        channel: Optional[AnyChannel] = None,
        waits: Optional[bool] = None,
        urgent: bool = False,
    ) -> Reply:
        """Send until there is a readable 2xx response or *policy* gives up.

        *waits*: whether to wait while the server is rate-limiting (429).  By default
        ``on_backpressure`` decides for work, and all other requests wait.  *urgent*: whatever the
        settings, wait only for responses and for the pauses of *policy*, not while the server is
        rate-limiting or the account cannot pay (402).

        Raises:
            APIStatusError, ResponseDecodeError: the server's last response.
            RateLimitError: the server is rate-limiting (429), and the request does not wait.
            APIConnectionError: no response within the policy's time.
            ClientClosedError: the transport was closed, or *channel* stopped, in the meantime.
        """
        if urgent:
            waits = False
        elif waits is None:
            # The request for flags is part of other calls, which must not fail because of it.
            is_work = request.traffic == "work" and not request.raw_credential
            waits = not is_work or self.config.on_backpressure == "wait"
        return RequestAttempts(self, request, policy, channel, waits=waits, urgent=urgent).run()

    def send_once(
        self,
        request: Request,
        *,
        channel: Optional[AnyChannel] = None,
        idempotency_key: Optional[str] = None,
    ) -> Reply:
        """Send one attempt and return the server's response, whatever its status.

        If the server calls the token invalid, it is renewed and the request sent again, once.
        Redirects are followed.

        Raises:
            APITimeoutError, APIConnectionError: there was no response or only a gateway's (see
                tinkex._transport.request_errors), or a new token could not be fetched.
            APIStatusError: the server refuses to issue a token.
            CredentialError: there is no usable key or token.
            ClientClosedError: the transport was closed in the meantime.
        """
        headers = {**self._headers, "Accept": request.accept}
        # Even without a body (docs/protocol.md, "Request headers").
        if request.method != "GET":
            headers["Content-Type"] = request.content_type
            headers["X-Idempotency-Key"] = idempotency_key or self.new_key()
        token = self.token_for(request)
        channel = channel or self._connections.shared(request.traffic)
        reply = self._follow(request, headers, token, channel)
        if token is not None and reply.status == 401:
            if token.renewable and is_invalid_token(reply.headers):
                # Not counted as an attempt: the server has not looked at the request itself.
                token = self.server.tokens.renew(self, request, token)
                reply = self._follow(request, headers, token, channel)
            else:
                self.server.tokens.forget(token)
        self.server.log_deprecation(request.name, reply.headers)
        error = gateway_error(request, reply, self.clock.wall(), self._redactor)
        if error is not None:
            # Closes idle connections only: a proxy that rejects a connection rejects every request
            # on it, so the next attempt must open another one (docs/protocol.md, "Status codes").
            channel.close()
            raise error
        return reply

    def token_for(self, request: Request) -> Optional[Token]:
        """Return the token for *request*, or None if none is needed or there is no credential."""
        own = {name.lower() for name in (*request.headers, *self.config.extra_headers)}
        return None if _KEY_HEADER in own else self.server.tokens.token_for(self, request)

    def _follow(
        self,
        request: Request,
        headers: Mapping[str, str],
        token: Optional[Token],
        channel: AnyChannel,
    ) -> Reply:
        """Send, and follow redirects; credentials are sent to the server's own origin only."""
        private = {**self.config.access_headers, **request.headers}
        if token is not None:
            private["X-API-Key"] = token.text
        # Last, to replace headers of the same name (docs/protocol.md, "Request headers").
        private.update(self.config.extra_headers)
        url = self.config.base_url + request.path
        hops = 0
        while True:
            if self.tracer is None:
                reply = self._exchange(request, url, {**headers, **private}, channel)
            else:
                reply = self._exchange_in_span(request, url, {**headers, **private}, channel)
            target = next_hop(request.method, url, reply.status, reply.headers.get("location"))
            if target is None or not request.follow_redirects or hops == MAX_HOPS:
                return reply
            if not same_origin(url, target):
                if request.secrets and request.body:
                    return reply  # the secrets may be in the body
                private = {}
                # A private connection reaches only its own server.
                channel = self._connections.shared(request.traffic)
            url = target
            hops += 1

    def _exchange_in_span(
        self, request: Request, url: str, headers: Dict[str, str], channel: AnyChannel
    ) -> Reply:
        assert self.tracer is not None
        # Send no trace context to another origin: it is not part of this service.
        if not same_origin(url, self.config.base_url):
            return self._exchange(request, url, headers, channel)
        with self.tracer.request(request.method, urlsplit(url).path, headers) as span:
            reply = self._exchange(request, url, headers, channel)
            if span is not None:
                self.tracer.respond(span, reply.status)
            return reply

    def _exchange(
        self, request: Request, url: str, headers: Mapping[str, str], channel: AnyChannel
    ) -> Reply:
        """Send one HTTP request and read its response; log and count both."""
        read_timeout_s = request.read_timeout_s or self.config.read_timeout_s
        timeout = (min(self.config.connect_timeout_s, read_timeout_s), read_timeout_s)
        # Read not even the clock unless the log is on: this runs thousands of times a second.
        began = self.clock.monotonic() if request_log.is_on() else None
        try:
            reply = channel.request(
                request.method, url, headers=headers, body=request.body, timeout=timeout
            )
        except requests.RequestException as error:
            if began is not None:
                self._log(request, url, error, began)
            self._raise_no_response(request, error)
        if began is not None:
            self._log(request, url, reply, began)
        self.recorder.request(len(request.body or b""), len(reply.body))
        if reply.status == 429:
            self.recorder.count("rate_limited")
        if reply.status == 500 and reply.content_type.startswith("text/plain"):
            # After an unhandled exception, servers close the connection unannounced, and the next
            # request on it would fail.
            channel.close()
        # Don't redact it: the token in the body is needed, and the body is never shown.
        if request.secret_reply and 200 <= reply.status < 300:
            return reply
        return self._redactor.reply(reply, request)

    def _log(
        self, request: Request, url: str, outcome: Union[Reply, Exception], began: float
    ) -> None:
        took_s = self.clock.monotonic() - began
        request_log.log_exchange(request, url, outcome, took_s, self.redact)

    def _raise_no_response(self, request: Request, error: requests.RequestException) -> NoReturn:
        # These hold the request's headers, and so the key, which debuggers and crash reporters
        # would show.
        error.request = error.response = None
        # A request that `abort` ends fails with the same errors as in an outage.
        if self.closing.is_set():
            raise ClientClosedError(
                f"the client was closed while {request.name} was in flight"
            ) from error
        if are_exhausted(error):
            # The next attempt may reuse the file descriptor of a connection that is idle now.
            self._connections.free_descriptors()
        # A hundred lines of urllib3's frames would precede the line that names the reason.
        forget_frames(error)
        raise connection_error(self.config, request, error, self.redact) from error

    def status_error(self, request: Request, reply: Reply) -> APIError:
        """Make the typed error for a response with an error status."""
        return status_error(request, reply, self.clock.wall(), self.redact)

    def redact(self, text: str) -> str:
        """Return *text* without keys, tokens and other secrets."""
        return self._redactor.text(text)

    def drop_idle(self) -> None:
        """Close the idle connections of the shared channels; those in use are kept."""
        self._connections.drop_idle()

    def abort(self) -> None:
        """Abort every request in flight.

        Set ``closing`` first, so that these requests raise ClientClosedError.
        """
        self._connections.abort()
        # Only after the channels were stopped: that is what the waiting threads check.
        self.server.limiter.wake()


class ThreadTransport:
    """The transport of one busy thread, with a connection of its own.

    Its requests wait out every 429, whatever the settings: they form a sequence, in which later
    requests rely on earlier ones.

    Args:
        before_send: called with each request, returns the request to send instead; if it raises,
            nothing is sent.
    """

    def __init__(self, transport: Transport, before_send: Callable[[Request], Request]) -> None:
        self.config = transport.config
        self.server = transport.server
        self.closing = transport.closing
        self.clock = transport.clock
        self.status_error = transport.status_error
        self.redact = transport.redact
        self._transport = transport
        self._before_send = before_send
        self._connection = transport.open_connection()

    def send(
        self, request: Request, policy: RetryPolicy, *, channel: Optional[AnyChannel] = None
    ) -> Reply:
        """See Transport.send."""
        request = self._before_send(request)
        channel = channel or self._connection
        return self._transport.send(request, policy, channel=channel, waits=True)

    def send_once(self, request: Request, *, channel: Optional[AnyChannel] = None) -> Reply:
        """See Transport.send_once."""
        return self._transport.send_once(request, channel=channel or self._connection)


#: What endpoint functions send with.
Sender = Union[Transport, ThreadTransport]
