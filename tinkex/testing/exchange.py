"""One request and its reply, as a fault sees them, and sending the reply in pieces.

Runs in the request's HTTP thread (``tinkex-http-i``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import socket
import traceback
from http.client import responses as REASONS
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    NoReturn,
    Optional,
    Tuple,
)

from tinkex.testing.journal import Journal, ReceivedRequest
from tinkex.testing.script import Injection, Script, ServerStopped

if TYPE_CHECKING:
    from tinkex.testing.server import FakeServer

_log = logging.getLogger(__name__)

Environ = Dict[str, Any]
StartResponse = Callable[..., Any]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]


@dataclasses.dataclass(frozen=True)
class Reply:
    """A response, and how to send it.

    Attributes:
        status, headers, body: the response; its Content-Length is the length of *body*.
        close_after: close the connection after this many bytes of the body; None sends it all.
        piece: send at most this many bytes at a time; None sends the body in one piece ...
        pause_s: ... with a pause of this many seconds before each piece.
    """

    status: int
    headers: Tuple[Tuple[str, str], ...] = ()
    body: bytes = b""
    close_after: Optional[int] = None
    piece: Optional[int] = None
    pause_s: float = 0.0


class Exchange:
    """One request that a fault was injected for.

    Attributes:
        request: the request, as received.
        server: the `FakeServer` that received it.
    """

    def __init__(
        self,
        server: FakeServer,
        request: ReceivedRequest,
        injection: Injection,
        script: Script,
        environ: Environ,
        application: Application,
    ) -> None:
        self.server = server
        self.request = request
        self._injection = injection
        self._script = script
        self._environ = environ
        self._application = application
        self._stops = script.stops  # before any wait, so that no stop is missed

    def work(self) -> Reply:
        """Have the server process the request, and return its response."""
        from werkzeug.test import run_wsgi_app

        parts, status, headers = run_wsgi_app(self._application, self._environ, buffered=True)
        # `_send` sets Content-Length, as a fault may change the body.
        kept = tuple((k, v) for k, v in headers if k.lower() != "content-length")
        return Reply(int(status.split()[0]), kept, b"".join(parts))

    def wait(self, seconds: Optional[float] = None) -> None:
        """Block until the injection is released or the server stops, for at most *seconds*."""
        self._script.wait(self._injection, seconds, self._stops)


class FaultLayer:
    """The application, behind the journal and the script of a `FakeServer` (WSGI)."""

    def __init__(
        self, server: FakeServer, journal: Journal, script: Script, application: Application
    ) -> None:
        self._server = server
        self._journal = journal
        self._script = script
        self._application = application

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        request = self._receive(environ)
        injection = self._script.find(request)
        if injection is None:
            return self._application(environ, start_response)
        exchange = Exchange(
            self._server, request, injection, self._script, environ, self._application
        )
        try:
            reply = injection.fault(exchange)
        except ServerStopped:
            reply = None
        except Exception:
            _log.exception("the fault %r failed", injection.fault)
            detail = f"the fault {injection.fault!r} failed: {traceback.format_exc()}"
            reply = Reply(500, (("Content-Type", "text/plain"),), detail.encode())
        return self._send(exchange, reply, environ, start_response)

    def _receive(self, environ: Environ) -> ReceivedRequest:
        # Read the body here, for the journal; the application gets a new stream of it.
        body = environ["wsgi.input"].read()
        environ["wsgi.input"] = io.BytesIO(body)
        headers = {
            name[5:].replace("_", "-").lower(): value
            for name, value in environ.items()
            if name.startswith("HTTP_")
        }
        headers["content-type"] = environ.get("CONTENT_TYPE", "")
        return self._journal.add_request(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"],
            environ.get("QUERY_STRING", ""),
            headers,
            body,
        )

    def _send(
        self,
        exchange: Exchange,
        reply: Optional[Reply],
        environ: Environ,
        start_response: StartResponse,
    ) -> Iterable[bytes]:
        if reply is None:
            _hang_up(environ)
        reason = REASONS.get(reply.status, "Unknown")
        length = ("Content-Length", str(len(reply.body)))
        start_response(f"{reply.status} {reason}", [*reply.headers, length])
        return _pieces(exchange, reply, environ)


def _pieces(exchange: Exchange, reply: Reply, environ: Environ) -> Iterator[bytes]:
    """Yield the body piece by piece; waitress sends each piece immediately."""
    body = reply.body[: reply.close_after]
    step = reply.piece or len(body) or 1
    for start in range(0, len(body), step):
        if reply.pause_s:
            try:
                exchange.wait(reply.pause_s)
            except ServerStopped:
                _hang_up(environ)
        yield body[start : start + step]
    if reply.close_after is not None:
        _hang_up(environ)


def _hang_up(environ: Environ) -> NoReturn:
    """Close the connection after what has been sent so far."""
    from waitress.channel import ClientDisconnected

    # waitress stores a bound method of the connection's channel under this key.
    channel = environ["waitress.client_disconnected"].__self__
    # If the client hung up or the server ended first, there is no socket any more.
    with contextlib.suppress(OSError, AttributeError):
        channel.socket.shutdown(socket.SHUT_RDWR)
    raise ClientDisconnected  # ends the task; waitress does not treat it as an error
