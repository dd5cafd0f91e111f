"""RawServer: sends the given bytes, whether or not they are HTTP."""

from __future__ import annotations

import contextlib
import socket
from typing import List, Optional

from support.loopback import PATIENCE_S, LoopbackServer, read_http


class RawServer(LoopbackServer):
    """Answers each request with the next of *responses*; the last one is repeated.

    Each connection is closed after one response, unless *keep_alive*.  With *piece*, only that many
    bytes are sent at a time.
    """

    def __init__(
        self, *responses: bytes, piece: Optional[int] = None, keep_alive: bool = False
    ) -> None:
        self._responses = list(responses)
        self._piece = piece
        self._keep_alive = keep_alive
        self.requests: List[bytes] = []
        super().__init__(self._respond, "raw")

    def _respond(self, connection: socket.socket, index: int) -> None:
        connection.settimeout(PATIENCE_S)
        with connection.makefile("rb") as stream:
            while True:
                request = read_http(stream)
                if request is None:
                    return
                self.requests.append(b"".join(request))
                many = len(self._responses) > 1
                response = self._responses.pop(0) if many else self._responses[0]
                step = self._piece or len(response) or 1
                for start in range(0, len(response), step):
                    connection.sendall(response[start : start + step])
                if not self._keep_alive:
                    break
            connection.shutdown(socket.SHUT_WR)
            # Read until the client leaves: closing earlier could reset the connection.
            with contextlib.suppress(OSError):
                stream.read(1)
