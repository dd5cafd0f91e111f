"""TokenMint and Signer: tokens in place of a key, and signed URLs, which need no key.

Both secrets live as long as the process: after a restart clients exchange their key again, and ask
for new URLs.  No threads; immutable once made.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from typing import Any, Callable, Dict, Optional, Tuple
from urllib.parse import quote, urlencode

from tinkex._runtime.clock import SYSTEM_CLOCK, Clock
from tinkex.local.errors import HTTPError

# The header of a token is never read, so that a token cannot choose its algorithm.
_HEADER = b'{"alg":"HS256","typ":"JWT"}'


class TokenMint:
    """Makes tokens and checks them.  Thread-safe.

    Args:
        lifetime_s: a token is valid for this long, by the wall *clock*.
    """

    def __init__(self, lifetime_s: float, clock: Clock = SYSTEM_CLOCK) -> None:
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._secret = secrets.token_bytes(32)

    def make(self, claims: Dict[str, Any]) -> str:
        """Return a token with *claims* and an expiry."""
        now = self._clock.wall()
        # Not rounded, because a test's tokens may live for less than a second.
        times = {"iat": now, "exp": now + self._lifetime_s, "jti": secrets.token_hex(8)}
        payload = json.dumps({**claims, **times}).encode()
        signed = _encode(_HEADER) + b"." + _encode(payload)
        return (signed + b"." + _encode(self._sign(signed))).decode("ascii")

    def fault_of(self, token: str) -> Optional[str]:
        """Return what is wrong with *token*; None if it was made here and is still valid."""
        # The signature first, so that only tokens that were made here are parsed.
        signed, _, signature = token.encode("utf-8", "replace").rpartition(b".")
        if not hmac.compare_digest(_encode(self._sign(signed)), signature):
            return "this server did not sign it, or was restarted since"
        claims = json.loads(_decode(signed.partition(b".")[2]))
        return "it has expired" if self._clock.wall() >= claims["exp"] else None

    def _sign(self, signed: bytes) -> bytes:
        return hmac.new(self._secret, signed, "sha256").digest()


def _encode(raw: bytes) -> bytes:
    # JSON Web Tokens leave the padding out.
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def _decode(text: bytes) -> bytes:
    return base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))


class Signer:
    """Signs paths and checks the signatures.

    Args:
        lifetime_s: a signed path is valid for this long.
        wall: returns seconds since the epoch.
    """

    def __init__(self, lifetime_s: float, wall: Callable[[], float] = time.time) -> None:
        self._lifetime_s = lifetime_s
        self._wall = wall
        self._secret = secrets.token_bytes(32)

    def sign(self, path: str) -> Tuple[str, int]:
        """Return *path*, quoted, with a signed query, and its expiry in seconds since the epoch."""
        expires_at = int(self._wall() + self._lifetime_s)
        query = {"expires": str(expires_at), "signature": self._signature(path, expires_at)}
        return f"{quote(path, safe='/:')}?{urlencode(query)}", expires_at

    def check(self, path: str, expires: Optional[str], signature: Optional[str]) -> None:
        """Raise HTTPError 403 unless *signature* fits *path*, and *expires* is in the future."""
        number = expires if expires and expires.isascii() and expires.isdigit() else ""
        # Bounded, since `int` raises ValueError for thousands of digits.
        if signature is None or not 0 < len(number) <= 12:
            raise HTTPError(403, "this URL is not signed; ask for a signed one")
        # The signature first: an expiry that was not signed means nothing.
        expected = self._signature(path, int(number))
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise HTTPError(403, "the signature of this URL is wrong; ask for a new one")
        if self._wall() >= int(number):
            raise HTTPError(403, "this URL has expired; ask for a new one")

    def _signature(self, path: str, expires_at: int) -> str:
        # One signature for both, so that neither can be changed, nor combined with another.
        text = f"{expires_at}\n{path}".encode()
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()
