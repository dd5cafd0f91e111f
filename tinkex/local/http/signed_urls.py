"""URLs that carry their own permission: a path, until when it may be fetched, and a signature.

The secret lives as long as the process: after a restart clients ask for new URLs.  No threads;
thread-safe, since nothing changes.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import Callable, Optional, Tuple
from urllib.parse import quote, urlencode

from tinkex.local.errors import HTTPError


class Signer:
    """Signs paths and checks the signatures.

    Args:
        lifetime_s: a signed path is valid for this long.
        wall: seconds since the epoch.
    """

    def __init__(self, lifetime_s: float, wall: Callable[[], float] = time.time) -> None:
        self._lifetime_s = lifetime_s
        self._wall = wall
        self._secret = secrets.token_bytes(32)

    def sign(self, path: str) -> Tuple[str, int]:
        """Return *path*, quoted, with its query, and the second in which it expires."""
        expires_at = int(self._wall() + self._lifetime_s)
        query = {"expires": str(expires_at), "signature": self._signature(path, expires_at)}
        return f"{quote(path, safe='/:')}?{urlencode(query)}", expires_at

    def check(self, path: str, expires: Optional[str], signature: Optional[str]) -> None:
        """Raise HTTPError 403 unless *signature* is that of *path* and *expires* lies ahead."""
        number = expires if expires and expires.isascii() and expires.isdigit() else ""
        if signature is None or not 0 < len(number) <= 12:
            raise HTTPError(403, "this URL is not signed; ask for a signed one")
        expected = self._signature(path, int(number))
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise HTTPError(403, "the signature of this URL is wrong; ask for a new one")
        if self._wall() >= int(number):
            raise HTTPError(403, "this URL has expired; ask for a new one")

    def _signature(self, path: str, expires_at: int) -> str:
        text = f"{expires_at}\n{path}".encode()
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()
