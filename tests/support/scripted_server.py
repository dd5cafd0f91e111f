"""ScriptedServer: a real HTTP server on loopback that answers what a test tells it to.

Its threads are called ``scripted-...``: one accepts, one serves each connection.  `close` ends
them all and fails if one stays, so that no test leaves a thread or a socket behind.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gzip
import json
import socket
import ssl
import struct
import threading
import time
from http.client import responses as REASONS
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Tuple, Type, Union

#: Of the server with ``tls=True``; a client must be told to trust it.
CERTIFICATE = Path(__file__).parent / "tls" / "cert.pem"

#: Nothing in a test takes longer than this, in seconds; waiting for it is a failure.
PATIENCE_S = 10.0

_TLS_GREETING = b"\x16"  # the first byte of a TLS handshake


@dataclasses.dataclass(frozen=True)
class Received:
    """One request, as it came in."""

    method: str
    path: str
    headers: Mapping[str, str]  # lower-case names
    body: bytes
    connection: int  # counts accepted connections from 0
    at: float  # monotonic

    def json(self) -> Any:
        return json.loads(self.body)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What to do with one request.

    Attributes:
        status, body, headers: the answer; a body that is not bytes is sent as JSON.
        content_type: of the body.
        hold: answer only once this is set (or the server closes).
        reset: send nothing and break the connection off with an RST.
        drop: send nothing and close the connection.
        close_after: send the answer and close the connection, without saying so in a header.
        cut_after: send only so many bytes of the body, then do as `hold` says, then close.
        use_gzip: compress the body.
    """

    status: int = 200
    body: Any = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    content_type: str = "application/json"
    hold: Optional[threading.Event] = None
    reset: bool = False
    drop: bool = False
    close_after: bool = False
    cut_after: Optional[int] = None
    use_gzip: bool = False

    def payload(self) -> bytes:
        raw = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        return gzip.compress(raw) if self.use_gzip else raw


Step = Union[Answer, Callable[[Received], Answer]]


class ScriptedServer:
    """A server whose routes answer from a script.

    With *tls* it speaks HTTPS, under CERTIFICATE.

    ::

        with ScriptedServer() as server:
            server.on("POST /api/v1/asample", Answer(503), Answer(body={"request_id": "r"}))

    A route's answers are used up in order; its last one is repeated.  What has no route gets 404.
    """

    def __init__(self, *, tls: bool = False) -> None:
        self._tls: Optional[ssl.SSLContext] = None
        if tls:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(CERTIFICATE, CERTIFICATE.with_name("key.pem"))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        # Guards everything below, and is notified of each request.
        self._changed = threading.Condition()
        self._routes: Dict[str, Deque[Step]] = {}
        self._requests: List[Received] = []
        self._connections: Dict[int, socket.socket] = {}
        self._accepted = 0
        self._threads: List[threading.Thread] = []
        self._closing = threading.Event()
        self._start(self._accept, "scripted-accept")

    # What a test says

    def on(self, route: str, *steps: Step) -> None:
        """Answer *route*, ``"POST /path"`` without the query, with *steps*, one after the other."""
        with self._changed:
            self._routes[route] = collections.deque(steps)

    def requests(self, route: Optional[str] = None) -> List[Received]:
        """The requests so far, of one route or of all."""
        with self._changed:
            return [r for r in self._requests if route in (None, _route_of(r))]

    def wait_for(self, route: str, count: int = 1) -> List[Received]:
        """Wait until *route* was asked *count* times."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: sum(_route_of(r) == route for r in self._requests) >= count, PATIENCE_S
            )
        assert came, f"{route} was not asked {count} times: {self.requests()}"
        return self.requests(route)

    @property
    def connections(self) -> int:
        """How many connections were accepted."""
        with self._changed:
            return self._accepted

    def open_connections(self) -> int:
        """How many connections are open now."""
        with self._changed:
            return len(self._connections)

    def wait_until_idle(self) -> None:
        """Wait until every connection is closed."""
        with self._changed:
            idle = self._changed.wait_for(lambda: not self._connections, PATIENCE_S)
        assert idle, "connections are still open"

    def drop_connections(self) -> None:
        """Close every connection, as a server does with idle ones."""
        with self._changed:
            connections = list(self._connections.values())
        for connection in connections:
            _shut(connection)
        self.wait_until_idle()

    # How it works

    def close(self) -> None:
        self._closing.set()
        _shut(self._listener)  # wakes accept
        self._listener.close()
        with self._changed:
            connections, threads = list(self._connections.values()), list(self._threads)
        for connection in connections:
            _shut(connection)
        deadline = time.monotonic() + PATIENCE_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stayed = [thread.name for thread in threads if thread.is_alive()]
        assert not stayed, f"threads of the scripted server left: {stayed}"

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def _start(self, target: Callable[..., None], name: str, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        with self._changed:
            self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # the listener was closed
            with self._changed:
                number, self._accepted = self._accepted, self._accepted + 1
                self._connections[number] = connection
            self._start(self._serve, f"scripted-{number}", connection, number)

    def _serve(self, connection: socket.socket, number: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
                with self._changed:  # the plain socket is of no use any more
                    self._connections[number] = connection
                connection.do_handshake()
        except OSError:  # the client does not trust us
            self._forget(connection, number)
            return
        stream = connection.makefile("rb")
        try:
            if self._tls is None and stream.peek(1)[:1] == _TLS_GREETING:
                _refuse_tls(connection, stream)
                return
            while not self._closing.is_set():
                received = _read_request(stream, number)
                if received is None or not self._reply(connection, received):
                    return
        except OSError:
            pass  # the client went away, or close broke it off
        finally:
            stream.close()
            self._forget(connection, number)

    def _forget(self, connection: socket.socket, number: int) -> None:
        connection.close()
        with self._changed:
            del self._connections[number]
            self._changed.notify_all()

    def _reply(self, connection: socket.socket, received: Received) -> bool:
        """Answer; return whether the connection stays open."""
        with self._changed:
            steps = self._routes.get(_route_of(received))
            step: Step = Answer(404, {"detail": f"no route {_route_of(received)}"})
            if steps:
                step = steps.popleft() if len(steps) > 1 else steps[0]
            self._requests.append(received)
            self._changed.notify_all()
        answer = step(received) if callable(step) else step
        if answer.cut_after is None:
            self._hold(answer)
        if answer.reset:
            # Linger 0: close sends an RST instead of a FIN.
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return False
        if answer.drop:
            return False
        head, payload = _encode(answer)
        if answer.cut_after is not None:
            connection.sendall(head + payload[: answer.cut_after])
            self._hold(answer)
            return False
        connection.sendall(head + payload)
        return not answer.close_after

    def _hold(self, answer: Answer) -> None:
        if answer.hold is None:
            return
        deadline = time.monotonic() + PATIENCE_S
        while not answer.hold.wait(0.01):
            if self._closing.is_set() or time.monotonic() > deadline:
                raise ConnectionAbortedError("the server closed while it held an answer")


def _route_of(received: Received) -> str:
    return f"{received.method} {received.path.partition('?')[0]}"


def _encode(answer: Answer) -> Tuple[bytes, bytes]:
    payload = answer.payload()
    headers = {"Content-Type": answer.content_type, "Content-Length": str(len(payload))}
    if answer.use_gzip:
        headers["Content-Encoding"] = "gzip"
    headers.update(answer.headers)
    lines = [f"HTTP/1.1 {answer.status} {REASONS.get(answer.status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"), payload


def _refuse_tls(connection: socket.socket, stream: Any) -> None:
    """Answer a TLS greeting in plain text, as web servers do, and wait for the client to leave.

    Closing with part of the greeting unread would send an RST, and the client might never see
    the answer.
    """
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    connection.shutdown(socket.SHUT_WR)
    while stream.read1(65536):
        pass


def _read_request(stream: Any, number: int) -> Optional[Received]:
    """Read one request; None if the client left, or before it had sent all of it."""
    words = stream.readline(65537).decode("latin-1").split(" ")
    if len(words) != 3:
        return None
    method, path, _ = words
    headers: Dict[str, str] = {}
    while True:
        line = stream.readline(65537).decode("latin-1")
        if not line.endswith("\n"):
            return None
        if not line.strip():
            break
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    length = int(headers.get("content-length", "0"))
    body = stream.read(length)
    if len(body) < length:
        return None
    return Received(method, path, headers, body, number, time.monotonic())


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected any more
        connection.shutdown(socket.SHUT_RDWR)
