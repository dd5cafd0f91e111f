"""TokenSource: the credential of each request (docs/protocol.md, "Authentication").

Shared by all transports of the process that use the same server and credential.  It has no thread:
the request that finds a token due for renewal renews it, while other requests still use the old
one.  Heartbeats alone are frequent enough to renew it in time.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import threading
from typing import TYPE_CHECKING, List, Mapping, NoReturn, Optional, Tuple

import orjson

from tinkex._runtime.single_flight import SingleFlight
from tinkex._transport.credential_command import COMMAND, run_command
from tinkex._transport.request import Request
from tinkex._transport.server_flags import ABSENT, ServerFlags, flags_for
from tinkex.config import Config, check_header
from tinkex.credentials import is_jwt, read_claims
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    ConfigError,
    CredentialError,
    ResponseDecodeError,
)

if TYPE_CHECKING:
    from tinkex._transport.transport import Sender

logger = logging.getLogger(__name__)

#: One exchange may take this long, in seconds.
EXCHANGE_TIMEOUT_S = 10.0

#: Requests wait for a new token once the old one is valid for less than this, in seconds, or for
#: less than a quarter of its lifetime, whichever is shorter.
URGENT_S = 60.0

#: Pauses after a failed renewal, in seconds: before the renewal is urgent, and from then on.
RETRY_S = 60.0
URGENT_RETRY_S = 5.0

#: A request with a timeout of no more than this, in seconds, does not renew a token that is still
#: valid: it may be the last request before the process exits.
NO_RENEWAL_S = 5.0

# The client's and the server's clocks may differ by this much, in seconds.
_SKEW_S = 60.0

# How many tokens and command outputs are remembered, to keep them out of messages: requests with
# older ones may still be in flight.
_SECRETS_KEPT = 3

_KEY_HEADER = "X-API-Key"


@dataclasses.dataclass(frozen=True)
class Token:
    """The value of ``X-API-Key``, and its lifetime; instants are seconds since the epoch.

    Attributes:
        renew_at: when about half of its lifetime is over.
        urgent_at: when it is about to expire.
        renewable: it can be replaced by fetching another.
        exchanged: the server issued it in exchange; False for a key or the command's output.
    """

    # Wall-clock time, like the claims of a token.

    text: str = dataclasses.field(repr=False)
    renewable: bool = False
    exchanged: bool = False
    renew_at: float = math.inf
    urgent_at: float = math.inf
    expires_at: float = math.inf

    @classmethod
    def received(cls, text: str, now: float, rand: float, *, exchanged: bool = True) -> Token:
        """Plan the renewal of a token received at *now*; *rand* is uniform in [0, 1).

        A token that is not a JWT, or has no expiry, is valid until the server refuses it.
        """
        claims = read_claims(text)
        if claims is None or claims.expires_at is None:
            return cls(text, True, exchanged)
        began = now if claims.issued_at is None else claims.issued_at
        life_s = max(0.0, claims.expires_at - began)
        expires_at = claims.expires_at
        margin_s = min(URGENT_S, life_s / 4)
        if life_s and not began - _SKEW_S <= now < expires_at - margin_s:
            # A new token that by our clock is not yet valid, or about to expire: the clocks
            # disagree.  The lifetime is still right; count it from now.
            began, expires_at = now, now + life_s
        urgent_at = expires_at - margin_s
        # Randomized, so that many processes do not renew at the same moment.
        renew_at = min(began + life_s * (0.45 + 0.1 * rand), urgent_at)
        return cls(text, True, exchanged, renew_at, urgent_at, expires_at)


class TokenSource:
    """The credential of one server, and the tokens made from it.  Thread-safe.

    Precedence: a key that is itself a token is sent as it is.  If the server enables tokens, the
    credential is exchanged for one.  Otherwise the key, or the command's output, is sent.
    """

    def __init__(self, config: Config) -> None:
        self._key = config.api_key
        self._command = config.credential_cmd
        self._static = config.api_key is not None and is_jwt(config.api_key)
        self._host = config.host_and_port
        self._flight: SingleFlight[Token] = SingleFlight()
        # Guards what follows.  Never held during I/O.
        self._lock = threading.Lock()
        self._token: Optional[Token] = None
        self._not_before = 0.0  # no renewal of a valid token before this wall time
        self._secrets: List[str] = [] if self._key is None else [self._key]

    @property
    def secrets(self) -> Tuple[str, ...]:
        """The key and the latest tokens, which must not appear in any message."""
        with self._lock:
            return tuple(self._secrets)

    def token_for(self, sender: Sender, request: Request) -> Optional[Token]:
        """Return the token to send *request* with; None if there is no credential.

        Blocks for an exchange only if there is no valid token, or if this request is the one that
        renews it.  Tries once: the caller retries.

        Raises:
            CredentialError: the token has expired and cannot be renewed, or the command failed.
            APIError: the server refused the exchange or cannot be reached.
            ClientClosedError: the client was closed in the meantime.
        """
        if self._key is None and self._command is None:
            return None
        if self._static:
            return self._static_token(sender.clock.wall())
        # The request for the flags itself takes this branch: it must not wait for the flags below.
        if request.raw_credential:
            return Token(self._raw(sender, forced=False))
        flags = _flags(sender)
        forced = self._command is not None and flags.credential_default_source == "credential_cmd"
        if self._key is not None and not forced and not flags.pjwt_auth_enabled:
            return Token(self._key)
        return self._good_token(sender, request, flags)

    def renew(self, sender: Sender, request: Request, refused: Token) -> Token:
        """Replace a token that the server *refused*: one exchange serves all waiting requests."""
        flags = _flags(sender)

        def work() -> Token:
            token = self._current()
            if token is not None and token.text != refused.text:
                return token  # another thread has already renewed it
            return self._obtain(sender, request, flags)

        return self._flight.run(work, sender.closing)

    def forget(self, refused: Token) -> None:
        """Note a 401 for this token: the next request runs the credential command again."""
        with self._lock:
            # Keep a token that the server issued: only a 401 that calls it invalid replaces it (see
            # `renew`), and any other 401 is about the request.
            if self._token is refused and not refused.exchanged:
                self._token = None

    def _current(self) -> Optional[Token]:
        with self._lock:
            return self._token

    def _static_token(self, now: float) -> Token:
        assert self._key is not None
        claims = read_claims(self._key)
        if claims is not None and claims.expires_at is not None and now >= claims.expires_at:
            raise CredentialError(
                f"the token given as api_key expired {now - claims.expires_at:.0f} s ago",
                hint="Get a new token, or use a key, which does not expire.",
            )
        return Token(self._key)

    def _good_token(self, sender: Sender, request: Request, flags: ServerFlags) -> Token:
        """Return the current token, or a new one."""
        now = sender.clock.wall()
        with self._lock:
            token, not_before = self._token, self._not_before
        if token is not None and now < token.renew_at:
            return token
        good = token is not None and now < token.expires_at
        urgent = token is None or now >= token.urgent_at
        if token is not None and good:
            is_short = (request.read_timeout_s or NO_RENEWAL_S + 1) <= NO_RENEWAL_S
            # Another thread is renewing it: no need to wait unless the old token is about to
            # expire.
            renewing = self._flight.busy and not urgent
            if now < not_before or is_short or renewing:
                return token

        def work() -> Token:
            current = self._current()
            if current is not None and current is not token:
                return current  # another thread has renewed it since we looked
            return self._obtain(sender, request, flags)

        try:
            return self._flight.run(work, sender.closing)
        except (APIError, CredentialError) as error:
            if token is None or not good or (urgent and error.status == 401):
                raise
            pause_s = URGENT_RETRY_S if urgent else RETRY_S
            with self._lock:
                self._not_before = now + pause_s
            logger.warning(
                "the token for %s could not be renewed; using the old one: %s", self._host, error
            )
            return token

    def _obtain(self, sender: Sender, request: Request, flags: ServerFlags) -> Token:
        """Fetch a new token and store it.  Called only by the leader of a flight."""
        forced = flags.credential_default_source == "credential_cmd"
        raw = text = self._raw(sender, forced=forced)
        if flags.pjwt_auth_enabled:
            text = self._exchange(sender, request, raw)
        now = sender.clock.wall()
        token = Token.received(text, now, random.random(), exchanged=text != raw)
        with self._lock:
            self._token, self._not_before = token, 0.0
            self._remember_locked(text)
        logger.debug("fetched a new token for %s", self._host)
        return token

    def _remember_locked(self, secret: str) -> None:
        if secret not in self._secrets:
            self._secrets.append(secret)
            del self._secrets[1:-_SECRETS_KEPT]  # the first is the key, if there is one

    def _raw(self, sender: Sender, *, forced: bool) -> str:
        """Return the credential itself."""
        if self._key is not None and not (forced and self._command):
            return self._key
        assert self._command is not None
        text = run_command(self._command, sender.closing)
        with self._lock:
            self._remember_locked(text)
        claims = read_claims(text) if is_jwt(text) else None
        now = sender.clock.wall()
        if claims is not None and claims.expires_at is not None and now >= claims.expires_at:
            raise CredentialError(f"the token that {COMMAND} printed has expired")
        return text

    def _exchange(self, sender: Sender, request: Request, raw: str) -> str:
        """Send ``POST auth/token``, once.  Returns *raw* itself after 404, 405 or 501."""
        # *request* waits for the exchange, which must not take longer than the request itself may.
        limit_s = min(EXCHANGE_TIMEOUT_S, request.read_timeout_s or EXCHANGE_TIMEOUT_S)
        exchange = Request(
            "POST",
            "/api/v1/auth/token",
            b"{}",
            traffic="control",
            read_timeout_s=limit_s,
            headers={_KEY_HEADER: raw},
            secrets=(raw,),
            secret_reply=True,
        )
        reply = sender.send_once(exchange)
        if reply.status in ABSENT:
            logger.info("%s has no auth/token; sending the key itself", self._host)
            return raw
        if not 200 <= reply.status < 300:
            _raise_as_outage(sender.status_error(exchange, reply))
        text = _read_jwt(reply.body)
        if text is None:
            # The response is left out of the message: it may hold a token.
            error = ResponseDecodeError(f"{exchange.name}: the response holds no token in 'jwt'")
            if reply.is_damaged:
                raise APIConnectionError(error.message, status=reply.status) from error
            raise error
        return text


def _flags(sender: Sender) -> ServerFlags:
    try:
        return flags_for(sender, once=True)
    except APIStatusError as error:
        _raise_as_outage(error)


def _raise_as_outage(error: APIError) -> NoReturn:
    """Raise *error*, a temporary one as an outage of the request that needs the token."""
    # An APIStatusError would be taken for the response to that request.
    if error.retryable:
        raise APIConnectionError(error.message, status=error.status) from error
    raise error


def _read_jwt(body: bytes) -> Optional[str]:
    """Return the token in a response, or None if it holds none."""
    # Let no exception out: its traceback would hold the response, and so the token.
    try:
        payload = orjson.loads(body)
        text = payload.get("jwt") if isinstance(payload, dict) else None
        if isinstance(text, str) and text:
            check_header("the token", text)
            return text
    except (orjson.JSONDecodeError, ConfigError):
        pass
    return None


def is_invalid_token(headers: Mapping[str, str]) -> bool:
    """True if the *headers* of a 401 mean that the token, not the request, is at fault."""
    return 'error="invalid_token"' in headers.get("www-authenticate", "")
