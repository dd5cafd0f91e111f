"""What both kinds of connections check of a response: its length, its end, and its pace.

http.client takes a response that is cut off inside its headers for a complete one without a body,
ignores lengths that are not numbers, and waits for a body as long as a byte comes now and then.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any, Optional

#: A response may take one second longer for each of these many bytes that have come.
MIN_BYTES_PER_S = 1024
#: A request with a body up to this size is sent in no time: the time of its response begins with
#: the request.
SMALL_BODY = 65536
#: Digits of a Content-Length; more bytes than that fit nowhere.
_MAX_DIGITS = 15
_MAX_HEX_DIGITS = 12
_HEX_DIGITS = b"0123456789abcdefABCDEF"


def content_length(text: str) -> int:
    """Read a Content-Length; the same number several times counts as one (RFC 9110, 8.6).

    Raises:
        ValueError: it is not a length; the message shows the beginning.
    """
    values = {part.strip() for part in text.split(",")}
    value = values.pop()
    if values or not (value.isascii() and value.isdigit() and len(value) <= _MAX_DIGITS):
        raise ValueError(f"its Content-Length is {text[:40]!r}")
    return int(value)


def chunk_size(text: bytes) -> int:
    """Read the size of a chunk, in hexadecimal digits (RFC 9112, 7.1).

    Raises:
        ValueError: it is not a size; the message shows the beginning.
    """
    digits = text.lstrip(b"0") or text[-1:]
    if not 0 < len(digits) <= _MAX_HEX_DIGITS or digits.translate(None, _HEX_DIGITS):
        raise ValueError(f"the size of a chunk is {text[:40]!r}")
    return int(digits, 16)


class Pace:
    """Bounds the time that one response takes, by what has come so far.

    Used by one thread.

    Args:
        pause_s: the longest pause, in seconds, and what the response may take beyond the time that
            its size allows.
        starts_now: its time begins now, and not with the first read.
    """

    def __init__(self, pause_s: float, *, starts_now: bool) -> None:
        self._pause_s = pause_s
        self._began: Optional[float] = time.monotonic() if starts_now else None
        self._received = 0

    def limit_next(self, sock: Any) -> None:
        """Set the timeout of the next read from *sock*.

        Raises:
            ConnectionAbortedError: the response has taken too long.
        """
        left_s = self._left_s()
        if self._received and left_s <= 0:
            raise self._too_slow()
        sock.settimeout(max(0.001, min(left_s, self._pause_s)))

    def check_after_timeout(self) -> None:
        """After a read that timed out: ConnectionAbortedError if it was the response's time."""
        if self._received and self._left_s() <= 0:
            raise self._too_slow()

    def note(self, size: int) -> None:
        """Note that *size* bytes have come."""
        self._received += size

    def _left_s(self) -> float:
        return self._pause_s + self._received / MIN_BYTES_PER_S - self._took_s()

    def _took_s(self) -> float:
        now = time.monotonic()
        if self._began is None:
            self._began = now
        return now - self._began

    def _too_slow(self) -> ConnectionAbortedError:
        took_s = self._took_s()
        return ConnectionAbortedError(
            f"the response comes too slowly: {self._received} bytes in {took_s:.1f} s"
        )


class _WatchedRaw(io.RawIOBase):
    """Reads from *sock*, at the *pace* that is asked for, and notes the end of the stream."""

    def __init__(self, sock: Any, pace: Optional[Pace]) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._pace = pace
        self.ended = False

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        number: int = self._raw.fileno()
        return number

    def readinto(self, buffer: Any) -> Optional[int]:
        pace = self._pace
        try:
            if pace is not None:
                pace.limit_next(self._sock)
            size: Optional[int] = self._raw.readinto(buffer)
        except socket.timeout:
            if pace is not None:
                pace.check_after_timeout()
            raise
        self.ended = size == 0
        if pace is not None:
            pace.note(size or 0)
        return size

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _Watched:
    """Stands in for a socket where http.client makes a file of it."""

    def __init__(self, sock: Any, pace: Optional[Pace]) -> None:
        self.raw = _WatchedRaw(sock, pace)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self.raw)


class CheckedResponse(http.client.HTTPResponse):
    """A response whose headers must be complete, and whose length must be a number."""

    def __init__(self, sock: Any, *args: Any, pace: Optional[Pace], **kwargs: Any) -> None:
        watched = _Watched(sock, pace)
        self._raw = watched.raw
        super().__init__(watched, *args, **kwargs)  # type: ignore[arg-type]  # it calls makefile only

    def begin(self) -> None:
        """Read the status line and the headers.

        Raises:
            ConnectionResetError: the connection was closed before they were complete.
            http.client.HTTPException: they make no sense.
        """
        super().begin()
        if self._raw.ended:
            raise ConnectionResetError("the connection was closed in the middle of the headers")
        lengths = self.headers.get_all("content-length")
        if lengths and "transfer-encoding" not in self.headers:
            try:
                content_length(", ".join(lengths))
            except ValueError as error:
                raise http.client.HTTPException(f"malformed HTTP response: {error}") from error

    def _safe_read(self, amt: int) -> bytes:
        """Read one chunk for urllib3, which takes the size of a chunk with its sign."""
        if amt < 0:
            raise http.client.HTTPException(f"malformed HTTP response: a chunk has the size {amt}")
        data: bytes = super()._safe_read(amt)  # type: ignore[misc]  # not in typeshed
        return data
