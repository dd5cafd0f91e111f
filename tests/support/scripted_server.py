"""ScriptedServer: a real HTTP server on loopback that sends the responses that a test scripts."""

from __future__ import annotations

import collections
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
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Tuple, Union

from support.loopback import PATIENCE_S as PATIENCE_S, LoopbackServer, read_http

#: Of the server with ``tls=True``; a client must be configured to trust it.
CERTIFICATE = Path(__file__).parent / "tls" / "cert.pem"

_TLS_GREETING = b"\x16"  # the first byte of a TLS handshake


@dataclasses.dataclass(frozen=True)
class Received:
    """One request, as received."""

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
    """How to answer one request.

    Attributes:
        status, body, headers: of the answer; a body that is not bytes is sent as JSON.
        content_type: of the body.
        hold: answer only once this is set (or the server closes).
        reset: send nothing and end the connection with an RST.
        drop: send nothing and close the connection.
        close_after: send the answer and close the connection, without saying so in a header.
        cut_after: send only this many bytes of the body, then do as `hold` says, then close.
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


class ScriptedServer(LoopbackServer):
    """A server whose routes give scripted answers.

    With *tls* it speaks HTTPS, under CERTIFICATE.

    ::

        with ScriptedServer() as server:
            server.on("POST /api/v1/asample", Answer(503), Answer(body={"request_id": "r"}))

    A route's answers are used in order, and its last one is repeated.  Unknown routes get 404.
    """

    def __init__(self, *, tls: bool = False) -> None:
        self._routes: Dict[str, Deque[Step]] = {}  # guarded by `changed`, like the requests
        self._requests: List[Received] = []
        context = None
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE, CERTIFICATE.with_name("key.pem"))
        super().__init__(self._talk, "scripted", tls=context)

    def on(self, route: str, *steps: Step) -> None:
        """Answer *route* (``"POST /path"``, without the query) with *steps*, one by one."""
        with self.changed:
            self._routes[route] = collections.deque(steps)

    def requests(self, route: Optional[str] = None) -> List[Received]:
        """The requests so far, of one route or of all."""
        with self.changed:
            return [r for r in self._requests if route in (None, _route_of(r))]

    def wait_for(self, route: str, count: int = 1) -> List[Received]:
        """Wait until *route* has had *count* requests."""
        with self.changed:
            came = self.changed.wait_for(
                lambda: sum(_route_of(r) == route for r in self._requests) >= count, PATIENCE_S
            )
        assert came, f"{route} was not asked {count} times: {self.requests()}"
        return self.requests(route)

    def respond(self, received: Received) -> Answer:
        """Record a request; return the answer to it."""
        with self.changed:
            steps = self._routes.get(_route_of(received))
            step: Step = Answer(404, {"detail": f"no route {_route_of(received)}"})
            if steps:
                step = steps.popleft() if len(steps) > 1 else steps[0]
            self._requests.append(received)
            self.changed.notify_all()
        return step(received) if callable(step) else step

    def _talk(self, connection: socket.socket, index: int) -> None:
        with connection.makefile("rb") as stream:
            if not isinstance(connection, ssl.SSLSocket) and stream.peek(1)[:1] == _TLS_GREETING:
                _refuse_tls(connection, stream)
                return
            while not self.closing.is_set():
                received = _read_request(stream, index)
                if received is None or not self._send(connection, self.respond(received)):
                    return

    def _send(self, connection: socket.socket, answer: Answer) -> bool:
        """Send an answer; return whether the connection stays open."""
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
            if self.closing.is_set() or time.monotonic() > deadline:
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


def _read_request(stream: Any, index: int) -> Optional[Received]:
    """Read one request; return None if the client left before it had sent the whole request."""
    request = read_http(stream)
    if request is None:
        return None
    first, *lines = request[0].decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3:
        return None
    method, path, _ = words
    pairs = (line.partition(":") for line in lines if line)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    return Received(method, path, headers, request[1], index, time.monotonic())
