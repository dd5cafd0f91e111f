"""HttpServer: sockets and HTTP of the embedded server, by waitress.

Subclasses of waitress's server, channel, parser and tasks change what it has no option for:

- all waiting connections are accepted, and accepting pauses when file descriptors run out;
- the body of a request that will be rejected for its headers is read and dropped, so that a sender
  without the key fills neither memory nor disk, and still gets the response;
- waitress's own errors (a body too large, a malformed request line) are JSON like the rest;
- there can be an access log.

tests/test_foundations.py lists the undocumented parts of waitress that are used here.  Sockets, and
the bodies of requests, belong to the thread tinkex-server; tasks run in the HTTP threads.
"""

from __future__ import annotations

import functools
import io
import logging
import socket
import time
from typing import Any, Callable, Dict, Optional, Tuple

import orjson
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, WSGITask

from tinkex._runtime.descriptors import advice, are_exhausted
from tinkex.local.http.admission import Admission, Head
from tinkex.local.http.threads import HttpThreads
from tinkex.local.settings import ServerSettings

_log = logging.getLogger(__name__)

#: When no descriptor is free, accepting pauses for this long, in seconds.
PAUSE_S = 0.1
#: Connections that have been idle for this long are closed then, in seconds.
IDLE_S = 1.0
#: Least time between two reports of the shortage, in seconds.
_REPORT_S = 60.0

#: Gets one line of the access log, without its newline; called from several threads.
WriteLine = Callable[[str], None]


class HttpServer(TcpWSGIServer):  # type: ignore[misc]  # waitress has no types
    """Serves a WSGI application on a bound socket, for as long as `serve_once` is called.

    Args:
        application: responds to requests, in *threads*.
        listener: a bound socket; closed with the server.
        admission: admits or rejects requests by their headers.
        access_log: called with a line for each response; None keeps no log.

    Attributes:
        sockets: every open socket, by its descriptor.
    """

    def __init__(
        self,
        application: Callable[..., Any],
        listener: socket.socket,
        threads: HttpThreads,
        settings: ServerSettings,
        admission: Admission,
        access_log: Optional[WriteLine] = None,
    ) -> None:
        self.sockets: Dict[int, Any] = {}
        self.channel_class = functools.partial(_Channel, admission, access_log)
        self._resume_at: Optional[float] = None  # while accepting pauses
        self._report_at = 0.0
        adjustments = Adjustments(
            ident="tinkex",
            log_socket_errors=False,  # a client that goes away is not an error of the server
            # Each held poll, and each request of the OpenAI endpoint, occupies a connection.
            connection_limit=2 * settings.max_held_polls + 1024,
            channel_timeout=600,
            asyncore_use_poll=True,
            # Makes waitress read from a client while it responds, so that it notices when the
            # client hangs up; views learn of it by `waitress.client_disconnected` in their
            # environment.
            channel_request_lookahead=1,
            # Bodies of a few MB are read in few system calls, and never put on disk.
            recv_bytes=1 << 18,
            inbuf_overflow=1 << 27,
            outbuf_overflow=1 << 27,
            # A body that is somewhat too large is still read, so that its sender gets the response.
            max_request_body_size=4 * settings.max_body_bytes,
        )
        super().__init__(
            application,
            map=self.sockets,
            _sock=listener,
            dispatcher=threads,
            adj=adjustments,
            bind_socket=False,
            sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
        )

    def serve_once(self, timeout_s: float) -> None:
        """Wait at most *timeout_s* for sockets that are ready, and serve each of them once.

        Raises:
            OSError: a socket was closed during the wait; waitress drops it the next time.
        """
        if self._resume_at is not None:
            pause_s = self._resume_at - time.monotonic()
            if pause_s <= 0:
                self._resume_at = None
            else:
                timeout_s = min(timeout_s, pause_s)
        wasyncore.loop(timeout=timeout_s, use_poll=True, map=self.sockets, count=1)

    def flush(self) -> None:
        """Send the rest of all responses, as far as possible without waiting."""
        # A copy, since a channel that fails removes itself.
        for channel in list(self.sockets.values()):
            if getattr(channel, "total_outbufs_len", 0):
                channel.handle_write()

    def close_all(self) -> None:
        """Close every socket."""
        wasyncore.close_all(map=self.sockets, ignore_all=True)

    def readable(self) -> bool:
        """Return whether to accept connections; waitress's method also closes idle ones."""
        # In this order, so that idle connections are closed during a pause, too, which frees
        # descriptors.
        return super().readable() and self._resume_at is None

    def handle_accept(self) -> None:
        """Accept all waiting connections, not one in each round.

        A round also serves every socket that is ready.  With a hundred busy sockets, rounds take so
        long that a client's last connections would wait for nearly a minute.
        """
        known = -1
        while known < len(self.sockets) < self.adj.connection_limit:
            known = len(self.sockets)  # unchanged once nothing more was accepted
            super().handle_accept()

    def accept(self) -> Optional[Tuple[Any, Any]]:
        """Accept a connection; None if none waits, or if no file descriptor is free for it."""
        try:
            accepted: Optional[Tuple[Any, Any]] = super().accept()
            return accepted
        except OSError as error:
            if not are_exhausted(error):
                raise
        # waitress would try again in a busy loop.
        now = time.monotonic()
        self._resume_at = now + PAUSE_S
        # Told a later time, waitress closes connections that have been idle for IDLE_S, instead of
        # for its own limit.
        self.maintenance(time.time() + self.adj.channel_timeout - IDLE_S)
        if now >= self._report_at:
            self._report_at = now + _REPORT_S
            _log.warning(
                "no file descriptor is free for another connection; clients wait. %s", advice()
            )
        return None


class _LoggedTask:
    """A task of waitress that writes a line to the access log, if the server keeps one."""

    channel: Any
    request: Any
    status: str

    def service(self) -> None:
        """Respond to the request."""
        write: Optional[WriteLine] = self.channel.access_log
        began = time.monotonic()
        try:
            super().service()  # type: ignore[misc]
        finally:
            if write is not None:
                write(_access_line(self.request, self.status, time.monotonic() - began))


def _access_line(request: Any, status: str, seconds: float) -> str:
    """Return time, method, path, status and milliseconds of a request, which may be unreadable."""
    # Without the query, which may hold a signature; escaped, since a path may hold anything.
    path = ascii(getattr(request, "request_uri", "-").partition("?")[0])[1:-1]
    method = ascii(getattr(request, "command", None) or "-")[1:-1]
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{stamp} {method} {path} {status[:3]} {seconds * 1000:.1f} ms"


class _ApplicationTask(_LoggedTask, WSGITask):  # type: ignore[misc]
    """Has the application respond to a request."""


class _ErrorTask(_LoggedTask, ErrorTask):  # type: ignore[misc]
    """Responds to a request that never reaches the application, and closes the connection."""

    def execute(self) -> None:
        """Write the response."""
        error = self.request.error
        body = orjson.dumps({"detail": f"{error.reason}: {error.body}"})
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.content_length = len(body)
        # The request was not read to its end, so its rest would be taken for the next request.
        self.set_close_on_finish()
        self.write(body)


class _NullBuffer:
    """Replaces the buffer of a body, and keeps only its size."""

    def __init__(self) -> None:
        self._size = 0

    def append(self, data: bytes) -> None:
        self._size += len(data)

    def __len__(self) -> int:
        return self._size

    def getfile(self) -> io.BytesIO:
        return io.BytesIO()

    def close(self) -> None:
        pass


class _Parser(HTTPRequestParser):  # type: ignore[misc]
    """Reads a request, and drops its body unless *admission* admits the request."""

    def __init__(self, admission: Admission, adj: Any) -> None:
        super().__init__(adj)
        self._admission = admission

    def parse_header(self, header_plus: bytes) -> None:
        """Read the header, then decide whether to keep the body."""
        try:
            super().parse_header(header_plus)
        except ValueError as error:
            # An address such as http://[ in the first line, or a length of thousands of digits:
            # waitress would log a traceback and hang up.
            raise ParsingError("the URL or the Content-Length is malformed") from error
        if self.body_rcv is None:
            return
        # A body that is dropped is still read: a client may read no response before it has sent it.
        size = None if self.chunked else self.content_length
        head = Head(self.command, self.path, self.headers, size)
        if not self._admission.admits(head):
            self.body_rcv.buf = _NullBuffer()


class _Channel(HTTPChannel):  # type: ignore[misc]
    """A connection with the parser and the tasks above."""

    task_class = _ApplicationTask
    error_task_class = _ErrorTask

    def __init__(
        self, admission: Admission, access_log: Optional[WriteLine], *args: Any, **options: Any
    ) -> None:
        self.access_log = access_log
        self.parser_class = functools.partial(_Parser, admission)
        super().__init__(*args, **options)
