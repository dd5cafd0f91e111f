"""Tokens: short-lived JWTs that the embedded server makes and recognizes.

Signed (HS256) with a secret that lives as long as the server: after a restart clients exchange
their key anew.  No threads; immutable once made.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import secrets
from typing import Any, Dict, Optional

from tinkex._runtime.clock import SYSTEM_CLOCK, Clock

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
        """Return a token that says *claims*, and until when."""
        now = self._clock.wall()
        # Fractions, because a test's tokens may live for less than a second.
        times = {"iat": now, "exp": now + self._lifetime_s, "jti": secrets.token_hex(8)}
        payload = json.dumps({**claims, **times}).encode()
        signed = _encode(_HEADER) + b"." + _encode(payload)
        return (signed + b"." + _encode(self._sign(signed))).decode("ascii")

    def fault_of(self, token: str) -> Optional[str]:
        """What is wrong with *token*, in words; None if it is one of ours and still valid."""
        signed, _, signature = token.encode("utf-8", "replace").rpartition(b".")
        if not hmac.compare_digest(_encode(self._sign(signed)), signature):
            return "it was not signed by this server, or before its last start"
        try:
            claims = json.loads(_decode(signed.partition(b".")[2]))
        except (binascii.Error, ValueError):  # not of our making, though signed
            return "it is malformed"
        return "it has expired" if self._clock.wall() >= claims["exp"] else None

    def _sign(self, signed: bytes) -> bytes:
        return hmac.new(self._secret, signed, "sha256").digest()


def _encode(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def _decode(text: bytes) -> bytes:
    return base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))
