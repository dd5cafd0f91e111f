"""One HTTP request in front of the application, and the answers that bypass the application."""

from __future__ import annotations

import io
from typing import Any, Callable, Dict, Iterable, Iterator

from servers.profiles.routes import PREFIX
from werkzeug.wrappers import Request, Response

from tinkex.local.errors import HTTPError
from tinkex.local.http.messages import decompressed
from tinkex.local.json_text import write_json
from tinkex.wire.codec import JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE

Environ = Dict[str, Any]
StartResponse = Callable[..., Any]

#: Routes that take a training batch.
PASSES = ("forward_backward", "forward")


class Refusal(Exception):
    """Raised to answer a request that does not reach the application; None is a plain 500."""

    def __init__(self, status: int, detail: Any = None) -> None:
        super().__init__(status)
        self.response = crash() if detail is None else json_answer({"detail": detail}, status)


class Call:
    """One request: its body is read once, decompressed, and may be replaced.

    Without *with_body*, the request is to be refused for its headers, and its body was not kept.
    """

    def __init__(self, environ: Environ, *, max_body_bytes: int, with_body: bool = True) -> None:
        self.environ = environ
        request = Request(environ)
        path = request.path
        self.method = request.method
        self.route = path[len(PREFIX) :] if path.startswith(PREFIX) else None
        media = (request.content_type or "").partition(";")[0].strip().lower()
        #: Whether the body is a batch in protobuf; any other body is taken for JSON.
        self.in_protobuf = media == PROTOBUF_CONTENT_TYPE and self.route in PASSES
        self.accept = request.headers.get("Accept", "")
        self.accept_encoding = request.headers.get("Accept-Encoding", "")
        self.raw = b""
        if with_body:
            encoding = request.headers.get("Content-Encoding", "")
            self.raw = _decompressed(request.get_data(), encoding, max_body_bytes)
        self.body: Any = None

    def replace(self, raw: bytes) -> None:
        """Have the application read *raw*, which is not compressed."""
        self.raw = raw
        self.environ["wsgi.input"] = io.BytesIO(raw)
        self.environ["CONTENT_LENGTH"] = str(len(raw))
        self.environ.pop("HTTP_CONTENT_ENCODING", None)

    def change(self, **fields: Any) -> None:
        """Set fields of the JSON body."""
        self.body = {**self.body, **fields}
        self.replace(write_json(self.body))


def json_answer(value: Any, status: int) -> Response:
    return Response(write_json(value), status, content_type=JSON_CONTENT_TYPE)


class _Crash(Response):
    """A plain-text 500 that closes the connection without announcing it, as after an exception."""

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        parts = super().__call__(environ, start_response)
        # waitress's: a bound method of the connection's channel.
        channel = getattr(environ.get("waitress.client_disconnected"), "__self__", None)
        return parts if channel is None else _then_hang_up(parts, channel)


def _then_hang_up(parts: Iterable[bytes], channel: Any) -> Iterator[bytes]:
    yield from parts
    # When this generator is asked for more, the whole answer is in the channel's buffer.
    channel.close_when_flushed = True


def crash() -> Response:
    return _Crash("Internal Server Error", 500, content_type="text/plain; charset=utf-8")


def _decompressed(raw: bytes, encoding: str, most: int) -> bytes:
    """Return the body as the application would read it; unchanged if it is unreadable.

    Raises:
        Refusal: 413, it decompresses to more than *most* bytes.
    """
    if encoding.strip().lower() != "zstd":
        return raw
    try:
        return decompressed(raw, most)
    except HTTPError as problem:
        if problem.status == 413:
            raise Refusal(413, problem.detail) from problem
        return raw
