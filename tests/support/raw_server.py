"""RawServer: answers every request with the same bytes, HTTP or not, and hangs up."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import List, Optional, Type

PATIENCE_S = 10.0


class RawServer:
    """Reads a request to the end of its body, sends *answer*, and closes the connection."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: List[threading.Thread] = []
        self._start(self._accept)

    def __enter__(self) -> RawServer:
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        with contextlib.suppress(OSError):  # not connected; it wakes accept on Linux all the same
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a thread of the raw server hangs"

    def _start(self, target: object, *args: socket.socket) -> None:
        thread = threading.Thread(target=target, args=args, name="raw", daemon=True)  # type: ignore[arg-type]  # any callable
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_S)
        with connection, contextlib.suppress(OSError), connection.makefile("rb") as stream:
            length = 0
            while True:
                line = stream.readline(65537)
                if not line.strip():
                    break
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            stream.read(length)
            connection.sendall(self.answer)
            connection.shutdown(socket.SHUT_WR)
            stream.read(1)  # until the client leaves: closing earlier could reset the connection
