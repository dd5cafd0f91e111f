"""A file that is being fetched: the bytes that have arrived, and the facts about the original.

The facts are kept in a note beside the file.  They include the entity tag of the version that the
bytes belong to: bytes of another version are never added.
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

#: A URL is signed again this many seconds before it expires.
EXPIRY_MARGIN_S = 300.0

_PIECE = 1 << 20

# Repr-Digest has colons around the value; the older Digest has none.
_SHA256 = re.compile(r"sha-256=:?([A-Za-z0-9+/]{43}=):?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Source:
    """The URL where a file can be fetched without credentials, and when the URL expires."""

    url: str = dataclasses.field(repr=False)
    expires: Optional[datetime] = None

    def is_stale(self, wall: float) -> bool:
        """Whether the URL must be signed again at time *wall*, in seconds since the epoch."""
        return self.expires is not None and self.expires.timestamp() - wall < EXPIRY_MARGIN_S


@dataclasses.dataclass
class Note:
    """The known facts about a file that is being fetched; kept beside it for the next attempt."""

    etag: Optional[str] = None
    modified: Optional[str] = None
    total: Optional[int] = None
    sha256: Optional[str] = None  # base64

    @property
    def validator(self) -> Optional[str]:
        """The value for ``If-Range``: a strong tag, or a date if there is no tag; else None."""
        # A weak tag means equivalent contents rather than equal bytes (RFC 9110, 8.8.1).
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
            # Without a validator, the file is fetched from the beginning.
            return cls()

    @property
    def digest(self) -> Optional[bytes]:
        """The announced SHA-256 of the complete file, or None."""
        # For a file uploaded in parts, S3 instead sends a checksum of the parts' checksums with the
        # number of parts, which is not base64 of 32 bytes.
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
    """A file that is being fetched: its name for messages, and the paths of file and note."""

    name: str
    file: Path
    note: Path

    @property
    def size(self) -> int:
        """The number of bytes that have arrived."""
        return self.file.stat().st_size if self.file.exists() else 0

    def discard(self) -> None:
        """Delete the file and its note."""
        for path in (self.file, self.note):
            if path.exists():
                path.unlink()


def sha256_of(file: Path, check: Callable[[], None]) -> bytes:
    """Return the SHA-256 of *file*; *check* is called now and then, and may raise to stop."""
    digest = hashlib.sha256()
    with open(file, "rb") as source:
        while True:
            check()
            piece = source.read(_PIECE)
            if not piece:
                return digest.digest()
            digest.update(piece)
