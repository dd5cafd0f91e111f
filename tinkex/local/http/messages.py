"""Reading requests and writing responses, for the views of the routes.

Everything here runs in an HTTP thread, within one request.
"""

from __future__ import annotations

import hashlib
from typing import Any, Dict, Optional, Tuple

from flask import Response, current_app, request

from tinkex.errors import a_type
from tinkex.local.errors import HTTPError
from tinkex.local.http.admission import check_size
from tinkex.local.json_text import read_json, write_json

#: Key of the application's config: most bytes of a body, as sent and decompressed.
MAX_BODY = "TINKEX_MAX_BODY"

# A zstd block of 128 KiB may take four bytes, so that this much input may make 32 MiB.
_ZSTD_STEP = 1024

#: Longest idempotency key.
_MOST_KEY_CHARACTERS = 256

#: Most digits of a number in a query: Python refuses to read numbers of thousands of digits.
_MOST_DIGITS = 100


def json_response(value: Any, status: int = 200) -> Response:
    """Return *value* as a JSON response; numpy arrays are written as lists."""
    return Response(write_json(value), status, mimetype="application/json")


def error_response(error: HTTPError, body: Dict[str, Any]) -> Response:
    """Return the response to a request that failed with *error*; *body* describes it."""
    response = json_response(body, error.status)
    response.headers.extend(error.headers)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = f"{error.retry_after_s:g}"
    return response


def server_failure(error: Exception) -> HTTPError:
    """Return the HTTP 500 for an unexpected *error* raised by a view."""
    return HTTPError(500, f"the server failed: {type(error).__name__}: {error}")


def raw_body() -> bytes:
    """Return the request's body, decompressed.

    Raises:
        HTTPError: 413 if it is too large; 415 if the encoding is unknown, or zstandard is not
            installed; 400 if it is broken.
    """
    limit = int(current_app.config[MAX_BODY])
    check_size(request.content_length or 0, limit)  # before it is read into one piece
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    body = request.get_data(cache=False)
    check_size(len(body), limit)  # a chunked body has no Content-Length
    if encoding in ("", "identity"):
        return body
    if encoding != "zstd":
        raise HTTPError(
            415, f"Content-Encoding {encoding!r:.100} is not known here; send zstd or none"
        )
    return decompressed(body, limit)


def decompressed(body: bytes, limit: int) -> bytes:
    """Decompress zstd in small steps, since a few bytes may stand for gigabytes.

    Raises:
        HTTPError: 413 if it makes more than *limit* bytes; 400 if it is broken; 415 if zstandard is
            not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise HTTPError(
            415, "zstandard is not installed on the server; send the body uncompressed"
        ) from error
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    parts, size = [], 0
    try:
        for start in range(0, len(body), _ZSTD_STEP):
            # The decompressor stops at the end of a frame, and would silently ignore the rest.
            if decompressor.eof:
                raise HTTPError(400, "the zstd body has more than one frame")
            part = decompressor.decompress(body[start : start + _ZSTD_STEP])
            parts.append(part)
            size += len(part)
            check_size(size, limit)
    except zstandard.ZstdError as error:
        raise HTTPError(400, f"the zstd body is broken: {error}") from error
    if not decompressor.eof:
        raise HTTPError(400, "the zstd body is cut short")
    if decompressor.unused_data:
        raise HTTPError(400, "the zstd body has more than one frame")
    return b"".join(parts)


class JsonBody(Dict[str, Any]):
    """The JSON object that a request carries, and its bytes."""

    def __init__(self, value: Dict[str, Any], raw: bytes) -> None:
        super().__init__(value)
        self.raw = raw

    @property
    def digest(self) -> bytes:
        """The digest of the bytes: repetitions of one seq_id must have the same body."""
        return digest(self.raw)

    def digest_without(self, *names: str) -> bytes:
        """Return the digest without the fields *names*, which may change in a retry."""
        kept = {name: value for name, value in self.items() if name not in names}
        return digest(write_json(kept, sort_keys=True))


def json_body() -> JsonBody:
    """Return the request's JSON object; HTTPError 400 if it has none."""
    raw = raw_body()
    value = read_json(raw) if raw else {}
    if not isinstance(value, dict):
        raise HTTPError(400, f"the body must be a JSON object, not {a_type(value)}")
    return JsonBody(value, raw)


def page(default_limit: int) -> Tuple[int, int]:
    """Return limit and offset of the query string; HTTPError 400 if one is not a number."""
    numbers = []
    for name, default in (("limit", default_limit), ("offset", 0)):
        text = request.args.get(name, str(default))
        # `isdigit` alone is true of ², which `int` does not read.
        if not (text.isascii() and text.isdigit()) or len(text) > _MOST_DIGITS:
            raise HTTPError(400, f"{name} is {text!r:.100}; it must be a number, 0 or more")
        numbers.append(min(int(text), 1 << 31))  # SQLite takes no integers beyond 64 bits
    return numbers[0], numbers[1]


def check_scope() -> None:
    """Raise HTTPError 400 unless the query's access_scope is known.

    It makes no other difference, since there is one user.
    """
    scope = request.args.get("access_scope", "owned")
    if scope not in ("owned", "accessible"):
        raise HTTPError(400, f"access_scope is {scope!r:.100}; it must be owned or accessible")


def idempotency_key() -> Optional[str]:
    """Return the key by which a repeated request is recognized, if the client sent one.

    HTTPError 400 if it is too long to be remembered.
    """
    key = request.headers.get("X-Idempotency-Key")
    if key is not None and len(key) > _MOST_KEY_CHARACTERS:
        raise HTTPError(
            400,
            f"X-Idempotency-Key has {len(key)} characters; at most {_MOST_KEY_CHARACTERS}",
        )
    return key


def digest(raw: bytes) -> bytes:
    """Return the digest of a body: repetitions of one seq_id must have the same body."""
    return hashlib.blake2b(raw, digest_size=16).digest()
