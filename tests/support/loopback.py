"""LoopbackServer: the sockets and threads of every hand-made server.

Standard library only, because some servers run where tinkex is not installed.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from types import TracebackType
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Type, TypeVar

#: No step of a test takes longer than this, in seconds, even on the busiest machine: a longer wait
#: is a failure.
PATIENCE_S = 60.0

ServerT = TypeVar("ServerT", bound="LoopbackServer")


class LoopbackServer:
    """Listens on a free port of 127.0.0.1, and serves each connection in its own thread.

    Its threads are called NAME-accept, NAME-0, NAME-1, ...  `close` ends them all and fails if one
    remains, so that no test leaks a thread or a socket.

    Args:
        serve: called with each connection and its index, counted from 0.  The connection is closed
            when *serve* returns; an OSError, such as a client that went away, ends it silently.
        name: of the threads.
        tls: speak TLS, with this context.
    """

    def __init__(
        self,
        serve: Callable[[socket.socket, int], None],
        name: str = "loopback",
        *,
        tls: Optional[ssl.SSLContext] = None,
    ) -> None:
        self._serve = serve
        self._name = name
        self._tls = tls
        self.port = 0
        # Guards everything below, and is notified when a connection comes or goes.
        self.changed = threading.Condition()
        self._accepted = 0
        self._open: Dict[int, socket.socket] = {}  # by index
        self._tracked: List[socket.socket] = []
        self._threads: List[threading.Thread] = []
        self.listen()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections were accepted."""
        with self.changed:
            return self._accepted

    def open_connections(self) -> int:
        """How many connections are open now."""
        with self.changed:
            return len(self._open)

    def wait_until_idle(self) -> None:
        """Wait until every connection is closed."""
        with self.changed:
            idle = self.changed.wait_for(lambda: not self._open, PATIENCE_S)
        assert idle, "connections are still open"

    def drop_connections(self) -> None:
        """Close every connection, as a server closes idle ones."""
        with self.changed:
            connections = list(self._open.values())
        for connection in connections:
            _shut(connection)
        self.wait_until_idle()

    def listen(self) -> None:
        """Accept connections; after `close`, once more on the same port."""
        self.closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        self.start(self._accept, "accept", self._listener)

    def close(self) -> None:
        """Break every connection, refuse new ones and wait for the threads."""
        self.closing.set()
        _shut(self._listener)  # wakes accept
        self._listener.close()
        deadline = time.monotonic() + PATIENCE_S
        with self.changed:
            sockets = [*self._open.values(), *self._tracked]
            threads, self._threads = self._threads, []
        for sock in sockets:
            _shut(sock)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stayed = [thread.name for thread in threads if thread.is_alive()]
        assert not stayed, f"threads of the server left behind: {stayed}"

    def __enter__(self: ServerT) -> ServerT:
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def start(self, target: Callable[..., None], name: object, *args: Any) -> threading.Thread:
        """Start a thread that `close` waits for."""
        thread = threading.Thread(
            target=target, args=args, name=f"{self._name}-{name}", daemon=True
        )
        with self.changed:
            self._threads.append(thread)
        thread.start()
        return thread

    @contextlib.contextmanager
    def tracked(self, sock: socket.socket) -> Iterator[None]:
        """During the block, have `close` break *sock*, too; close it at the end of the block."""
        with self.changed:
            self._tracked.append(sock)
        try:
            yield
        finally:
            sock.close()
            with self.changed:
                self._tracked.remove(sock)

    def _accept(self, listener: socket.socket) -> None:
        while not self.closing.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # the listener was closed
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                connection = self._tls.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
            with self.changed:
                index, self._accepted = self._accepted, self._accepted + 1
                self._open[index] = connection
            self.start(self._run, index, connection, index)

    def _run(self, connection: socket.socket, index: int) -> None:
        try:
            # OSError: the client rejected the certificate or left, or `close` broke the connection.
            with contextlib.suppress(OSError):
                if isinstance(connection, ssl.SSLSocket):
                    connection.do_handshake()
                self._serve(connection, index)
        finally:
            connection.close()
            with self.changed:
                del self._open[index]
                self.changed.notify_all()


def read_http(stream: Any) -> Optional[Tuple[bytes, bytes]]:
    """Read one HTTP request; return its head, with the empty line at its end, and its body.

    Return None if the client left before it had sent the whole request.
    """
    head = b""
    length = 0
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline(65537)
        if not line.endswith(b"\n"):
            return None
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
        head += line
    body = stream.read(length)
    return (head, body) if len(body) == length else None


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected any more
        sock.shutdown(socket.SHUT_RDWR)
