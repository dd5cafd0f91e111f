"""A relay in front of a server, which can be cut to simulate a network outage."""

from __future__ import annotations

import contextlib
import socket
from urllib.parse import urlsplit

from support.loopback import LoopbackServer


class Relay(LoopbackServer):
    """Forwards bytes to *url* while it is up; refuses connections while it is cut."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "", parts.port or 80)
        super().__init__(self._pass_on, "relay")

    def restore(self) -> None:
        """Listen again, on the same port."""
        self.listen()

    def cut(self) -> None:
        """Break every connection, and refuse new ones."""
        self.close()

    def _pass_on(self, near: socket.socket, index: int) -> None:
        far = socket.create_connection(self._target)
        with self.tracked(far):
            back = self.start(_copy, f"{index}-back", far, near)
            _copy(near, far)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            data = source.recv(65536)
            if not data:
                break
            target.sendall(data)
    for sock in (source, target):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
