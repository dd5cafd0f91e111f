"""Recorder: a proxy before a server that writes down what passes, and can change or drop it.

Standard library only: it runs in the environment of the client under test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import json
import socket
import threading
from types import TracebackType
from typing import Any, Callable, Dict, List, Mapping, Optional, Type
from urllib.parse import urlsplit

API = "/api/v1/"

#: What a test may do to an answer: status, headers, body -> the body to pass on.
Change = Callable[[bytes], bytes]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One request and the status of its answer."""

    method: str
    route: str  # the path after /api/v1/, without its query
    query: str
    headers: Mapping[str, str]  # lower-case names
    body: bytes
    status: int
    answer_type: str

    def json(self) -> Any:
        return json.loads(self.body)


class Recorder:
    """Listens on loopback and passes everything on to the server at *url*."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "", parts.port or 80)
        # Guards the four below.
        self._lock = threading.Lock()
        self._exchanges: List[Exchange] = []
        self._changes: Dict[str, Change] = {}
        self._drops: Dict[str, int] = {}
        self._accept: Optional[str] = None
        recorder = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                recorder._pass_on(self)

            do_GET = do_POST = do_PUT = do_DELETE = _pass_on

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def change(self, route: str, change: Change) -> None:
        """Pass the answers of *route* on as *change* makes them."""
        with self._lock:
            self._changes[route] = change

    def set_flags(self, **flags: Any) -> None:
        """Change flags in the answers to client/config and client/dynamic_config."""

        def changed(body: bytes) -> bytes:
            return json.dumps({**json.loads(body), **flags}).encode()

        self.change("client/config", changed)
        self.change("client/dynamic_config", changed)

    def drop(self, route: str, times: int = 1) -> None:
        """Have the server do the next *times* requests of *route*, and lose the answers."""
        with self._lock:
            self._drops[route] = times

    def accept_only(self, content_type: str) -> None:
        """Ask the server for *content_type*, whatever the client accepts."""
        with self._lock:
            self._accept = content_type

    def exchanges(self, route: Optional[str] = None) -> List[Exchange]:
        with self._lock:
            return [one for one in self._exchanges if route in (None, one.route)]

    def clear(self) -> None:
        with self._lock:
            self._exchanges.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def _pass_on(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        path, _, query = handler.path.partition("?")
        route = path[len(API) :] if path.startswith(API) else path
        headers = {name.lower(): value for name, value in handler.headers.items()}
        connection = http.client.HTTPConnection(*self._target, timeout=120)
        with contextlib.closing(connection):
            try:
                connection.connect()
            except OSError:  # the server is gone; so let the client believe
                handler.close_connection = True
                return
            sent = {k: v for k, v in headers.items() if k not in ("host", "connection")}
            if self._accept is not None:
                sent["accept"] = self._accept
            connection.request(handler.command, handler.path, body or None, sent)
            answer = connection.getresponse()
            content = answer.read()
        content_type = answer.headers.get("content-type", "")
        with self._lock:
            dropped = self._drops.get(route, 0) > 0
            if dropped:
                self._drops[route] -= 1
            change = self._changes.get(route)
            status = 0 if dropped else answer.status
            self._exchanges.append(
                Exchange(handler.command, route, query, headers, body, status, content_type)
            )
        if dropped:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        if change is not None and answer.status == 200:
            content = change(content)
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in (
                "content-length",
                "connection",
                "transfer-encoding",
                "date",
                "server",
            ):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        with contextlib.suppress(OSError):  # the client left
            handler.wfile.write(content)
