"""Transport: sends requests to one server.  Nothing here knows an endpoint.

It authenticates requests, follows redirects and retries; limits, counters and pauses are objects
beside it, see `ClientResources`.
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
from tinkex._transport.connection_errors import connection_error, forget_frames
from tinkex._transport.connections import Connections
from tinkex._transport.content_encoding import ACCEPT_ENCODING
from tinkex._transport.fast_connection import AnyChannel
from tinkex._transport.redaction import Redactor
from tinkex._transport.redirects import MAX_HOPS, next_hop, same_origin
from tinkex._transport.request import Reply, Request
from tinkex._transport.response_errors import raise_if_from_gateway, status_error
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
        closing: set by the owner of the transport: every wait between attempts then ends with
            ClientClosedError.
        recorder: counts what is sent.
        billing: decides how long a 402 is waited out.

    Attributes:
        server: what is known of the server; shared with other transports.
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
        # Traffic classes have pools of their own: a long poll must not delay a submission.
        self._connections = Connections(config, self.closing, clock)
        self._redactor = Redactor(config, self.server.tokens)
        self._headers: Dict[str, str] = {
            "User-Agent": f"tinkex/{__version__} Python/{platform.python_version()}",
            "Accept-Encoding": ACCEPT_ENCODING,
        }
        # Idempotency keys are made of these: a uuid4 for each is a system call, which lets other
        # threads take the interpreter away from us, thousands of times a second.
        self._key_stem = str(uuid.uuid4())[:24]
        self._key_numbers = itertools.count()

    def new_key(self) -> str:
        """Make an idempotency key."""
        return f"{self._key_stem}{next(self._key_numbers):012x}"

    def open_channel(self) -> Channel:
        """A private channel for one busy thread; closed with the transport at the latest."""
        return self._connections.open_channel()

    def open_connection(self) -> AnyChannel:
        """Like `open_channel`, for a thread that sends many short requests and nothing else."""
        return self._connections.open_connection()

    def watched(self, before_send: Callable[[Request], Request]) -> ThreadTransport:
        """This transport for one busy thread, whose requests pass *before_send*."""
        return ThreadTransport(self, before_send)

    def send(
        self,
        request: Request,
        policy: RetryPolicy,
        *,
        channel: Optional[AnyChannel] = None,
        waits: Optional[bool] = None,
        urgent: bool = False,
    ) -> Reply:
        """Send until there is a 2xx response or *policy* gives up.

        *waits*: whether to wait while the server asks to be left alone (429).  By default that is
        a setting for work, and True for all other requests.  *urgent*: to wait for nothing but
        responses and the pauses of *policy*, neither while the server asks to be left alone nor
        while the account cannot pay (402), whatever the settings.

        Raises:
            APIStatusError, ResponseDecodeError: the server's last response.
            RateLimitError: it was turned away with 429, or would be, and does not wait.
            APIConnectionError: no response within the policy's time.
            ClientClosedError: closed, or *channel* stopped, meanwhile.
        """
        if urgent:
            waits = False
        elif waits is None:
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

        A token that the server calls invalid is renewed, and the request sent again, once.
        Redirects are followed.

        Raises:
            APITimeoutError, APIConnectionError: there was no response, or none of the server's own
                (see tinkex._transport.response_errors), or no new token to be had.
            APIStatusError: the server refuses to give a token.
            CredentialError: there is no usable key or token.
            ClientClosedError: the transport was closed meanwhile.
        """
        headers = {**self._headers, "Accept": request.accept}
        if request.method != "GET":
            headers["Content-Type"] = request.content_type
            headers["X-Idempotency-Key"] = idempotency_key or self.new_key()
        token = self.token_for(request)
        channel = channel or self._connections.shared(request.traffic)
        reply = self._follow(request, headers, token, channel)
        if token is not None and reply.status == 401:
            if token.renewable and is_invalid_token(reply.status, reply.headers):
                token = self.server.tokens.renew(self, request, token)
                reply = self._follow(request, headers, token, channel)
            else:
                self.server.tokens.forget(token)
        self.server.log_deprecation(request.name, reply.headers)
        raise_if_from_gateway(request, reply, channel, self.clock.wall(), self._redactor)
        return reply

    def token_for(self, request: Request) -> Optional[Token]:
        """What *request* is to be authenticated with; None if it brings its own, or needs none."""
        own = {name.lower() for name in (*request.headers, *self.config.extra_headers)}
        return None if _KEY_HEADER in own else self.server.tokens.token_for(self, request)

    def _follow(
        self,
        request: Request,
        headers: Mapping[str, str],
        token: Optional[Token],
        channel: AnyChannel,
    ) -> Reply:
        """Send, and go where redirects lead; what authenticates goes nowhere else."""
        private = {**self.config.access_headers, **request.headers}
        if token is not None:
            private["X-API-Key"] = token.text
        private.update(self.config.extra_headers)
        url = self.config.base_url + request.path
        for _ in range(MAX_HOPS):
            reply = self._attempt(request, url, {**headers, **private}, channel)
            target = next_hop(request.method, url, reply.status, reply.headers.get("location"))
            if target is None or not request.follow_redirects:
                return reply
            if not same_origin(url, target):
                if request.secrets and request.body:
                    return reply  # the secrets may be in the body
                private = {}
                # A private connection leads to its server only.
                channel = self._connections.shared(request.traffic)
            url = target
        return self._attempt(request, url, {**headers, **private}, channel)

    def _attempt(
        self, request: Request, url: str, headers: Dict[str, str], channel: AnyChannel
    ) -> Reply:
        if self.tracer is None or not same_origin(url, self.config.base_url):
            return self._exchange(request, url, headers, channel)
        with self.tracer.request(request.method, urlsplit(url).path, headers) as span:
            reply = self._exchange(request, url, headers, channel)
            if span is not None:
                self.tracer.respond(span, reply.status)
            return reply

    def _exchange(
        self, request: Request, url: str, headers: Mapping[str, str], channel: AnyChannel
    ) -> Reply:
        read_timeout_s = request.read_timeout_s or self.config.read_timeout_s
        timeout = (min(self.config.connect_timeout_s, read_timeout_s), read_timeout_s)
        # Not even the time is taken unless the log is on: thousands of requests a second pass here.
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
            # After an unhandled exception servers hang up without announcing it: the next request
            # must not be the one to find that out.  Idle connections only.
            channel.close()
        if request.secret_reply and 200 <= reply.status < 300:
            return reply
        return self._redactor.reply(reply, request)

    def _log(
        self, request: Request, url: str, outcome: Union[Reply, Exception], began: float
    ) -> None:
        took_s = self.clock.monotonic() - began
        request_log.log_exchange(request, url, outcome, took_s, self.redact)

    def _raise_no_response(self, request: Request, error: requests.RequestException) -> NoReturn:
        # They hold the request with its headers, and so the key.
        error.request = error.response = None
        if self.closing.is_set():
            raise ClientClosedError(
                f"the client was closed while {request.name} was under way"
            ) from error
        if are_exhausted(error):
            self._connections.free_descriptors()
        forget_frames(error)  # a hundred lines of urllib3's, before the one that names the reason
        raise connection_error(self.config, request, error, self.redact) from error

    def status_error(self, request: Request, reply: Reply) -> APIError:
        """Make the typed error for a response with an error status."""
        return status_error(request, reply, self.clock.wall(), self.redact)

    def redact(self, text: str) -> str:
        """Return *text* without the key and the like, should a server have echoed them."""
        return self._redactor.text(text)

    def drop_idle(self) -> None:
        """Close the idle connections of the shared channels; those in use are kept."""
        self._connections.drop_idle()

    def abort(self) -> None:
        """Abort every request in flight.  Set ``closing`` first, so that the errors name it."""
        self._connections.abort()
        self.server.limiter.wake()  # what waits there finds its channel stopped


class ThreadTransport:
    """A transport as one busy thread uses it, with a connection of its own.

    Its requests wait out every 429, whatever the settings: each is one of a sequence, and those
    that follow rely on it.

    Args:
        before_send: returns what to send in place of a request; what it raises keeps the request
            from being sent.
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
