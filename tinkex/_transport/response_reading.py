"""Reading responses on both kinds of connections: length, end, pace and content coding.

http.client takes a response that is cut off inside its headers for a complete one without a body,
ignores lengths that are not numbers, and waits for a body as long as a byte arrives now and then.
"""

from __future__ import annotations

import http.client
import importlib.util
import io
import socket
import time
import zlib
from typing import Any, Optional

import requests

from tinkex._runtime.late_import import import_late
from tinkex.errors import ResponseDecodeError

_HAVE_ZSTD = importlib.util.find_spec("zstandard") is not None

#: The content codings that can be undone here.
ACCEPT_ENCODING = "gzip, deflate" + (", zstd" if _HAVE_ZSTD else "")

#: The slowest pace of a response: for each of these many bytes it may take one more second.
MIN_BYTES_PER_S = 1024
#: A request body up to this size fits into the socket's buffers, so the response's time begins with
#: the request.  A larger body may take long to send.
SMALL_BODY = 65536
#: The most digits of a Content-Length and of a chunk's size; no larger body fits into memory.
_MAX_DIGITS = 15
_MAX_HEX_DIGITS = 12
_HEX_DIGITS = b"0123456789abcdefABCDEF"


def content_length(text: str) -> int:
    """Read a Content-Length; the same number several times counts as one (RFC 9110, 8.6).

    Raises:
        ValueError: *text* is not a length; the message shows its beginning.
    """
    values = {part.strip() for part in text.split(",")}
    value = values.pop()
    # int() alone would accept "+5", "1_000" and digits of other scripts, which other readers of the
    # same response interpret differently.
    if values or not (value.isascii() and value.isdigit() and len(value) <= _MAX_DIGITS):
        raise ValueError(f"its Content-Length is {text[:40]!r}")
    return int(value)


def chunk_size(text: bytes) -> int:
    """Read the size of a chunk, in hexadecimal digits (RFC 9112, 7.1).

    Raises:
        ValueError: *text* is not a size; the message shows its beginning.
    """
    digits = text.lstrip(b"0") or text[-1:]
    if not 0 < len(digits) <= _MAX_HEX_DIGITS or digits.translate(None, _HEX_DIGITS):
        raise ValueError(f"the size of a chunk is {text[:40]!r}")
    return int(digits, 16)


class Pace:
    """Bounds the time that one response takes by how much of it has arrived.  For one thread.

    Args:
        pause_s: the longest pause, in seconds, and also the extra time that the response may take
            beyond what its size allows.
        starts_now: the response's time begins now, not with the first read.
    """

    def __init__(self, pause_s: float, *, starts_now: bool) -> None:
        self._pause_s = pause_s
        self._began: Optional[float] = time.monotonic() if starts_now else None
        self._received = 0

    def limit_next(self, sock: Any) -> None:
        """Set the timeout of the next read from *sock*.

        Only the longest pause limits the wait for the first byte: the server may be working.

        Raises:
            ConnectionAbortedError: the response has taken too long.
        """
        left_s = self._left_s()
        if self._received and left_s <= 0:
            raise self._too_slow()
        # Never 0, which makes the socket non-blocking.
        sock.settimeout(max(0.001, min(left_s, self._pause_s)))

    def check_after_timeout(self) -> None:
        """After a read timed out, raise ConnectionAbortedError if the response's time is over."""
        if self._received and self._left_s() <= 0:
            raise self._too_slow()

    def note(self, size: int) -> None:
        """Note that *size* bytes have arrived."""
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
    """Reads from *sock*, no slower than *pace*, and notes the end of the stream."""

    # Ctrl-C may interrupt __init__ before it sets this; the finalizer still calls close.
    _raw: Any = None

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
        # None means "nothing yet", on a non-blocking socket; only 0 is the end of the stream.
        self.ended = size == 0
        if pace is not None:
            pace.note(size or 0)
        return size

    def close(self) -> None:
        if self._raw is not None and not self.closed:
            self._raw.close()
        super().close()


class _Watched:
    """Stands in for the socket that http.client makes a file of."""

    def __init__(self, sock: Any, pace: Optional[Pace]) -> None:
        self.raw = _WatchedRaw(sock, pace)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self.raw)


class CheckedResponse(http.client.HTTPResponse):
    """A response whose headers must be complete, and whose length must be a number."""

    # Ctrl-C may interrupt http.client before it sets this; the finalizer still calls close, and an
    # AttributeError there would be printed.
    fp: Any = None

    def __init__(self, sock: Any, *args: Any, pace: Optional[Pace], **kwargs: Any) -> None:
        watched = _Watched(sock, pace)
        self._raw = watched.raw
        super().__init__(watched, *args, **kwargs)  # type: ignore[arg-type]  # it calls makefile only

    def begin(self) -> None:
        """Read the status line and the headers.

        Raises:
            ConnectionResetError: the connection was closed before the headers were complete.
            http.client.HTTPException: the headers are malformed.
        """
        super().begin()
        # http.client takes the end of the stream for the empty line after the headers.
        if self._raw.ended:
            raise ConnectionResetError("the connection was closed in the middle of the headers")
        lengths = self.headers.get_all("content-length")
        # A chunked body overrides a length (RFC 9112, section 6.3).
        if lengths and "transfer-encoding" not in self.headers:
            try:
                content_length(", ".join(lengths))
            except ValueError as error:
                raise http.client.HTTPException(f"malformed HTTP response: {error}") from error

    def _safe_read(self, amt: int) -> bytes:
        """Read one chunk for urllib3."""
        # urllib3 accepts a sign before the size, and http.client would then read to the end.
        if amt < 0:
            raise http.client.HTTPException(f"malformed HTTP response: a chunk has the size {amt}")
        data: bytes = super()._safe_read(amt)  # type: ignore[misc]  # not in typeshed
        return data


# ---- Content codings (RFC 9110, section 8.4.1) ----


def decompress(coding: str, body: bytes) -> bytes:
    """Undo the *coding* (lower case) of a response's *body*.

    Raises:
        requests.exceptions.ContentDecodingError: the body is broken.
        ResponseDecodeError: the coding is not supported here.
    """
    if coding in ("", "identity") or not body:
        return body
    if coding == "zstd":
        return _undo_zstd(body)
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise ResponseDecodeError(
            f"the server compresses its responses with {coding!r}, which was not requested"
        )
    try:
        undo = zlib.decompressobj(_window_bits(coding, body))
        plain = undo.decompress(body)
    except zlib.error as error:
        raise _broken(coding, str(error)) from error
    # A truncated body decompresses without an error, to less data.
    if not undo.eof:
        raise _broken(coding, "it ends too soon")
    return plain


def _window_bits(coding: str, body: bytes) -> int:
    if coding != "deflate":
        return zlib.MAX_WBITS | 16
    # Some servers leave out the zlib header, whose first byte names the method (8, deflate).
    has_header = body[0] & 0x0F == 8
    return zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS


def _undo_zstd(body: bytes) -> bytes:
    if not _HAVE_ZSTD:  # some servers send it unrequested
        raise ResponseDecodeError(
            "the server compresses its responses with zstd",
            hint='Install the extra that reads it: python -m pip install "tinkex[zstd]"',
        )
    zstandard = import_late("zstandard")
    try:
        with zstandard.ZstdDecompressor().stream_reader(body, read_across_frames=True) as reader:
            plain: bytes = reader.read()
            return plain
    except zstandard.ZstdError as error:
        raise _broken("zstd", str(error)) from error


def _broken(coding: str, why: str) -> requests.RequestException:
    return requests.exceptions.ContentDecodingError(f"the {coding} body is broken: {why}")
