"""A file that is being fetched: what has arrived, and what is known of the original.

Each has a note beside it, with the entity tag of the version that its bytes are of.  Bytes are only
added to the same version.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Callable, Mapping, Optional

#: A URL is signed again this long before it expires, in seconds.
EXPIRY_MARGIN_S = 300.0

_PIECE = 1 << 20

# Repr-Digest has colons around the value, the older Digest has not.
_SHA256 = re.compile(r"sha-256=:?([A-Za-z0-9+/]{43}=):?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a file can be fetched without credentials, and until when."""

    url: str = dataclasses.field(repr=False)
    expires: Optional[datetime] = None

    def is_stale(self, wall: float) -> bool:
        """Whether it has to be signed again at *wall*, in seconds since the epoch."""
        return self.expires is not None and self.expires.timestamp() - wall < EXPIRY_MARGIN_S


@dataclasses.dataclass
class Note:
    """What is known of a file that is being fetched: kept beside it for the next attempt."""

    etag: Optional[str] = None
    modified: Optional[str] = None
    total: Optional[int] = None
    sha256: Optional[str] = None  # base64

    @property
    def validator(self) -> Optional[str]:
        """What ``If-Range`` may carry: a strong tag, or else a date."""
        # A weak tag stands for equivalent contents, not for equal bytes (RFC 9110, 8.8.1).
        if self.etag and not self.etag.startswith("W/"):
            return self.etag
        return None if self.etag else self.modified

    @classmethod
    def of(cls, headers: Mapping[str, str], total: Optional[int]) -> Note:
        """Take the facts from the headers of a response with the complete file."""
        digest = _SHA256.search(headers.get("Repr-Digest") or headers.get("Digest") or "")
        sha256 = digest[1] if digest else headers.get("x-amz-checksum-sha256")
        return cls(headers.get("ETag"), headers.get("Last-Modified"), total, sha256)

    @classmethod
    def load(cls, path: Path) -> Note:
        """Read a note; return an empty one if there is none, or it cannot be read."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(**found)
        except (OSError, ValueError, TypeError):
            # Without a validator the file is fetched from its beginning.
            return cls()

    @property
    def digest(self) -> Optional[bytes]:
        """The SHA-256 that was announced for the complete file, if it was."""
        # For an upload in parts, S3 sends the checksum of the parts' checksums and the number of
        # parts, which is not base64 of 32 bytes.
        try:
            raw = base64.b64decode(self.sha256 or "", validate=True)
        except (binascii.Error, ValueError):
            return None
        return raw if len(raw) == 32 else None

    def save(self, path: Path) -> None:
        """Write the note to *path*."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Part:
    """A file that is being fetched: its name for messages, where it is, and its note's place."""

    name: str
    file: Path
    note: Path

    @property
    def size(self) -> int:
        """How many bytes have arrived."""
        return self.file.stat().st_size if self.file.exists() else 0

    def discard(self) -> None:
        """Delete what has arrived."""
        for path in (self.file, self.note):
            if path.exists():
                path.unlink()


def sha256_of(file: Path, check: Callable[[], None]) -> bytes:
    """Read *file* and return its digest; *check* is called now and then, and may raise."""
    digest = hashlib.sha256()
    with open(file, "rb") as source:
        while True:
            check()
            piece = source.read(_PIECE)
            if not piece:
                return digest.digest()
            digest.update(piece)
