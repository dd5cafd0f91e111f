"""Content codings of responses (RFC 9110, section 8.4.1): which we ask for, and undoing them."""

from __future__ import annotations

import importlib.util
import zlib

import requests

from tinkex._runtime.late_import import import_late
from tinkex.errors import ResponseDecodeError

_HAVE_ZSTD = importlib.util.find_spec("zstandard") is not None

#: Codings of responses that can be read here.
ACCEPT_ENCODING = "gzip, deflate" + (", zstd" if _HAVE_ZSTD else "")


def decompress(coding: str, body: bytes) -> bytes:
    """Undo the *coding* (lower case) of a response's *body*.

    Raises:
        ContentDecodingError: of requests; the body is broken.
        ResponseDecodeError: it is compressed in a way that cannot be read here.
    """
    if coding in ("", "identity") or not body:
        return body
    if coding == "zstd":
        return _undo_zstd(body)
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise ResponseDecodeError(f"the server compresses its responses with {coding!r}, unasked")
    try:
        undo = zlib.decompressobj(_window_bits(coding, body))
        plain = undo.decompress(body)
    except zlib.error as error:
        raise _broken(coding, str(error)) from error
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
    if not _HAVE_ZSTD:  # some servers send it unasked
        raise ResponseDecodeError(
            "the server compresses its responses with zstd",
            hint='Install what reads it: python -m pip install "tinkex[zstd]"',
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
