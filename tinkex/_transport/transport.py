"""Transport: sends requests to one server, with the one retry loop of tinkex.

Traffic classes have connection pools of their own, so that neither long polls nor bulk data can
delay a submission.  Nothing here knows an endpoint.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import platform
import random
import threading
import uuid
import weakref
from typing import Any, Callable, Dict, List, Mapping, NoReturn, Optional

import orjson
import requests

from tinkex._runtime.clock import SYSTEM_CLOCK, Clock
from tinkex._runtime.descriptors import advice, are_exhausted
from tinkex._transport.billing import BillingPause
from tinkex._transport.byte_limits import Pressure
from tinkex._transport.channel import Channel
from tinkex._transport.connection_errors import connection_error, forget_frames
from tinkex._transport.content_encoding import ACCEPT_ENCODING
from tinkex._transport.fast_connection import AnyChannel, PrivateChannel
from tinkex._transport.gateways import as_the_servers_own, describe, gateway_error, is_from_gateway
from tinkex._transport.redaction import redact, redact_reply, secrets_of
from tinkex._transport.redirects import MAX_HOPS, next_hop, same_origin, shown
from tinkex._transport.request import (
    JSON_TYPE as JSON_TYPE,
    NOT_JSON_HINT,
    Reply as Reply,
    Request as Request,
    broken_route,
)
from tinkex._transport.server_state import state_of
from tinkex._transport.tokens import Token, is_invalid_token
from tinkex._version import __version__
from tinkex.config import Config
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    ClientClosedError,
    RateLimitError,
    ResponseDecodeError,
    status_error_type,
)
from tinkex.metrics import Recorder
from tinkex.retry import RetryPolicy, leaves_outcome_open, retry_after_s

logger = logging.getLogger(__name__)

#: Connections kept per traffic class.
POOL_SIZES: Mapping[str, int] = {"control": 4, "work": 16, "poll": 64}

_HINTS: Mapping[int, str] = {
    401: "Set TINKER_API_KEY (or api_key=) or run `tinkex auth login`: the server asks for a key "
    "that it knows.",
    402: "The account cannot pay for this: check its billing set-up.",
    403: "The key is known but may not do this.",
}

#: A lack of file descriptors is reported this often at most, in seconds.
_SHORTAGE_EVERY_S = 60.0

_KEY_HEADER = "x-api-key"


class _Shortage:
    """When a lack of file descriptors is to be reported next; views of a transport share it."""

    report_at = -math.inf


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
        #: Paces whoever gets a 402, with ``on_billing="wait"``.
        self.billing = BillingPause(config.host_and_port, clock)
        #: Counts what is sent, for `ServiceClient.metrics`.
        self.recorder = Recorder()
        #: What is known of the server; shared with other transports.
        self.server = state_of(config)
        self._limiter = self.server.limiter
        #: What may be under way at once, and how many futures unread.
        self.pressure = Pressure(config, self.server, self.closing)
        # A run's requests always wait: what follows in the run relies on each of them.
        self._waits_after_429 = config.on_backpressure == "wait"
        self._channels = {name: Channel(config, size) for name, size in POOL_SIZES.items()}
        # Guards _private, the channels of busy threads, and _shortage.
        self._lock = threading.Lock()
        self._shortage = _Shortage()
        self._private: weakref.WeakSet[AnyChannel] = weakref.WeakSet()
        self._headers: Dict[str, str] = {
            "User-Agent": f"tinkex/{__version__} Python/{platform.python_version()}",
            "Accept-Encoding": ACCEPT_ENCODING,
        }
        self._secrets = secrets_of(config)
        self._before_send: Optional[Callable[[Request], Request]] = None
        self._own: Optional[AnyChannel] = None
        # Idempotency keys are made of these: a uuid4 for each is a system call, which lets other
        # threads take the interpreter away from us, thousands of times a second.
        self._key_stem = str(uuid.uuid4())[:24]
        self._key_numbers = itertools.count()

    def _new_key(self) -> str:
        return f"{self._key_stem}{next(self._key_numbers):012x}"

    def watched(self, before_send: Callable[[Request], Request]) -> Transport:
        """Return a view of this transport for one busy thread, with a connection of its own.

        Its `send` sends what *before_send* makes of a request; what that raises keeps the request
        from being sent.
        """
        view = copy.copy(self)
        view._before_send = before_send
        view._waits_after_429 = True
        view._own = self.open_connection()
        return view

    def open_channel(self) -> Channel:
        """A private connection for one busy thread; closed with the transport at the latest."""
        channel = Channel(self.config, pool_size=1)
        with self._lock:
            self._private.add(channel)
        if self.closing.is_set():
            channel.abort()
        return channel

    def open_connection(self) -> AnyChannel:
        """Like `open_channel`, for a thread that does nothing but short requests, and many."""
        channel: AnyChannel
        channel = (
            Channel(self.config, pool_size=1) if self.config.proxy else PrivateChannel(self.config)
        )
        with self._lock:
            self._private.add(channel)
        if self.closing.is_set():
            channel.abort()
        return channel

    def send_once(
        self,
        request: Request,
        *,
        channel: Optional[AnyChannel] = None,
        idempotency_key: Optional[str] = None,
    ) -> Reply:
        """Send one attempt and return the server's answer, whatever its status.

        A token that the server calls invalid is renewed, and the request sent again, once.
        Redirects are followed.

        Raises:
            APITimeoutError, APIConnectionError: there was no answer, or none of the server's own
                (see tinkex._transport.gateways), or no new token to be had.
            APIStatusError: the server refuses to give a token.
            CredentialError: there is no usable key or token.
            ClientClosedError: the transport was closed meanwhile.
        """
        headers = {**self._headers, "Accept": request.accept}
        if request.method != "GET":
            headers["Content-Type"] = request.content_type
            headers["X-Idempotency-Key"] = idempotency_key or self._new_key()
        token = self.token_for(request)
        channel = channel or self._own or self._channels[request.traffic]
        reply = self._follow(request, headers, token, channel)
        if token is not None and reply.status == 401:
            if token.renewable and is_invalid_token(reply.status, reply.headers):
                token = self.server.tokens.renew(self, request, token)
                reply = self._follow(request, headers, token, channel)
            else:
                self.server.tokens.forget(token)
        self.server.log_deprecation(request.name, reply.headers)
        self._check_for_gateway(request, reply, channel)
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
                channel = self._channels[request.traffic]  # a private one knows its server only
            url = target
        return self._attempt(request, url, {**headers, **private}, channel)

    def _attempt(
        self, request: Request, url: str, headers: Mapping[str, str], channel: AnyChannel
    ) -> Reply:
        read_timeout_s = request.read_timeout_s or self.config.read_timeout_s
        timeout = (min(self.config.connect_timeout_s, read_timeout_s), read_timeout_s)
        try:
            reply = channel.request(
                request.method, url, headers=headers, body=request.body, timeout=timeout
            )
        except requests.RequestException as error:
            self._no_answer(request, error)
        self.recorder.request(len(request.body or b""), len(reply.body))
        if reply.status == 429:
            self.recorder.count("rate_limited")
        if reply.status == 500 and reply.content_type.startswith("text/plain"):
            # After an unhandled exception servers hang up, and do not say so: the next request
            # is not to find that out.  Idle connections only.
            channel.close()
        if request.secret_reply and 200 <= reply.status < 300:
            return reply
        return redact_reply(reply, self.config.api_key, self._all_secrets(request))

    def _check_for_gateway(self, request: Request, reply: Reply, channel: AnyChannel) -> None:
        """Raise APIConnectionError if something before the server has answered in its place."""
        if not is_from_gateway(request, reply):
            return
        channel.close()  # idle connections only: the next attempt makes a new one
        text = redact(describe(request, reply), self.config.api_key, self._all_secrets(request))
        own = (
            ResponseDecodeError(
                f"{request.name}: the answer is not JSON: {text}",
                status=reply.status,
                hint=NOT_JSON_HINT,
            )
            if reply.status < 300
            else self.status_error(request, reply)
        )
        raise gateway_error(request, reply, text, own)

    def send(
        self, request: Request, policy: RetryPolicy, *, channel: Optional[AnyChannel] = None
    ) -> Reply:
        """Send until there is a 2xx answer or *policy* gives up.

        Raises:
            APIStatusError, ResponseDecodeError: the server's last answer.
            RateLimitError: it was turned away with 429, or would be, and is not to wait.
            APIConnectionError: no answer within the policy's time.
            ClientClosedError: closed, or *channel* stopped, meanwhile.
        """
        if self._before_send is not None:
            request = self._before_send(request)
        key = request.idempotency_key or self._new_key()
        started = self.clock.monotonic()
        attempt = 0
        same = 0  # times that the last answer came
        last: Optional[str] = None
        maybe_taken = False
        waits = self._waits_after_429 or request.bare or request.traffic != "work"
        while True:
            if not waits and self._limiter.wait_s() > 0:
                raise self._not_now(request, attempt, maybe_taken)
            attempt += 1
            reply: Optional[Reply] = None
            hint_s: Optional[float] = None
            own: Optional[APIError] = None  # the error, if a gateway's answer is the server's own
            try:
                reply = self._send_in_turn(request, channel, key)
                if 200 <= reply.status < 300:
                    if request.traffic == "work" and request.method == "POST":
                        self.recorder.took("submit", self.clock.monotonic() - started)
                    return reply
                error: APIError = self.status_error(request, reply)
                hint_s = retry_after_s(reply.headers, self.clock.wall())
                again = policy.retries_status(reply.status, attempt, reply.headers)
            except (APIConnectionError, APIStatusError) as caught:  # the latter: of a token
                error, again = caught, caught.retryable
                own = as_the_servers_own(caught)
                hint_s = getattr(own, "retry_after_s", None)
                again = again and (own is None or policy.retries_gateway(attempt))
            elapsed = self.clock.monotonic() - started
            delay = policy.delay_s(attempt, elapsed, hint_s, random.random()) if again else None
            if error.status == 402 and self.config.on_billing == "wait":
                delay = self.billing.after_402(may_ask=not request.bare)
            if delay is None and own is not None and policy.max_gateway_answers is not None:
                error = own
            error.attempts, error.elapsed_s = attempt, elapsed
            error.maybe_taken = maybe_taken = (
                maybe_taken
                or error.maybe_taken
                or (reply is not None and leaves_outcome_open(reply.status))
            )
            same, last = (same + 1 if error.message == last else 1), error.message
            if delay is None and same > 1 and reply is not None and reply.status >= 500:
                error.hint = error.hint or broken_route(request, same)
            turned_away = delay is not None and reply is not None and reply.status == 429
            if delay is not None and turned_away:
                self._limiter.back_off(delay)
                if not waits:
                    assert isinstance(error, APIStatusError)
                    error.retry_after_s = error.retry_after_s or delay
            # The error's traceback holds this frame, and the frame the error: without `del`, a
            # cycle that keeps the connection open until the garbage collector runs.
            if delay is None or (turned_away and not waits):
                try:
                    raise error
                finally:
                    del error, own
            level = logging.INFO if attempt in (1, 4) or attempt % 16 == 0 else logging.DEBUG
            logger.log(level, "%s; attempt %d, next in %.1f s", error.message, attempt, delay)
            del error, own
            request.keep_body()
            self._wait(delay, request, channel)
            self.recorder.count("retries")

    def _send_in_turn(self, request: Request, channel: Optional[AnyChannel], key: str) -> Reply:
        """Send one attempt, once the 429s that all with this server and key have got let it go."""
        if not self._limiter.throttled:
            self._wait(0.0, request, channel)
            return self.send_once(request, channel=channel, idempotency_key=key)
        stop = self.closing if channel is None else channel.stopped
        self._limiter.enter(
            lambda delay_s: self._wait(delay_s, request, channel),
            lambda: stop.is_set() or self.closing.is_set(),
        )
        try:
            return self.send_once(request, channel=channel, idempotency_key=key)
        finally:
            self._limiter.leave()

    def _not_now(self, request: Request, attempts: int, maybe_taken: bool) -> RateLimitError:
        """What is raised, instead of sending, while the server wants to be left alone."""
        wait_s = self._limiter.wait_s()
        error = RateLimitError(
            f"{request.name} was not sent: the server has asked to wait, {wait_s:.1f} s to go",
            status=429,
            retry_after_s=wait_s,
            attempts=attempts,
        )
        error.maybe_taken = maybe_taken
        return error

    def _wait(self, delay_s: float, request: Request, channel: Optional[AnyChannel]) -> None:
        stop = self.closing if channel is None else channel.stopped  # which closing sets, too
        if (delay_s > 0 and stop.wait(delay_s)) or stop.is_set() or self.closing.is_set():
            raise ClientClosedError(f"the client was closed before {request.name} was done")

    def status_error(self, request: Request, reply: Reply) -> APIError:
        """Make the typed error for an answer with an error status."""
        body, detail = self._read_error_body(reply)
        return status_error_type(reply.status)(
            f"{request.name} answered {reply.status}{': ' if detail else ''}{detail}",
            status=reply.status,
            body=body,
            retry_after_s=retry_after_s(reply.headers, self.clock.wall()),
            hint=self._hint(reply),
        )

    def _hint(self, reply: Reply) -> Optional[str]:
        if 300 <= reply.status < 400:
            where = shown(reply.headers.get("location", ""))
            return f"The server redirects to {where}, which is not followed. Is base_url right?"
        return _HINTS.get(reply.status)

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
        """Return *text* without the key and the like, should a server have echoed them."""
        return redact(text, self.config.api_key, self._all_secrets(None))

    def _all_secrets(self, request: Optional[Request]) -> List[str]:
        own = () if request is None else request.secrets
        return [*self._secrets, *self.server.tokens.secrets, *own]

    def _no_answer(self, request: Request, error: requests.RequestException) -> NoReturn:
        # They hold the request with its headers, and so the key.
        error.request = error.response = None
        if self.closing.is_set():
            raise ClientClosedError(
                f"the client was closed while {request.name} was under way"
            ) from error
        if are_exhausted(error):
            self._free_descriptors()
        forget_frames(error)  # a hundred lines of urllib3's before the one that tells the reason
        raise connection_error(self.config, request, error, self.redact) from error

    def _free_descriptors(self) -> None:
        """Close idle connections, and report the shortage now and then."""
        self.drop_idle()
        with self._lock:
            private = list(self._private)
        for channel in private:
            channel.close_if_idle()
        now = self.clock.monotonic()
        with self._lock:
            due = now >= self._shortage.report_at
            if due:
                self._shortage.report_at = now + _SHORTAGE_EVERY_S
        if due:
            logger.warning(
                "no file descriptor is free for a connection to %s; waiting for one. %s",
                self.config.host_and_port,
                advice(),
            )

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
        self.pressure.wake()  # who waits finds its channel stopped
