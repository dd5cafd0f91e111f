"""Recorder: a proxy in front of a server that records the traffic, and can change or drop it.

Standard library only: it runs in the environment of the client under test.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import threading
from typing import Any, Callable, Dict, List, Mapping, Optional
from urllib.parse import urlsplit

from support.scripted_server import Answer, Received, ScriptedServer

API = "/api/v1/"

#: How a test may change an answer: status, headers, body -> the body to pass on.
Change = Callable[[bytes], bytes]

#: Response headers that belong to the connection.
_HOP_BY_HOP = ("content-length", "connection", "transfer-encoding", "date", "server")


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


class Recorder(ScriptedServer):
    """Listens on loopback and forwards everything to the server at *url*."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "", parts.port or 80)
        # Guards the four attributes below.
        self._lock = threading.Lock()
        self._exchanges: List[Exchange] = []
        self._changes: Dict[str, Change] = {}
        self._drops: Dict[str, int] = {}
        self._accepted_type: Optional[str] = None
        super().__init__()

    def change(self, route: str, change: Change) -> None:
        """Pass on the answers of *route* as changed by *change*."""
        with self._lock:
            self._changes[route] = change

    def set_flags(self, **flags: Any) -> None:
        """Change flags in the answers to client/config and client/dynamic_config."""

        def changed(body: bytes) -> bytes:
            return json.dumps({**json.loads(body), **flags}).encode()

        self.change("client/config", changed)
        self.change("client/dynamic_config", changed)

    def drop(self, route: str, times: int = 1) -> None:
        """Let the server execute the next *times* requests of *route*, and lose the answers."""
        with self._lock:
            self._drops[route] = times

    def accept_only(self, content_type: str) -> None:
        """Ask the server for *content_type*, whatever the client accepts."""
        with self._lock:
            self._accepted_type = content_type

    def exchanges(self, route: Optional[str] = None) -> List[Exchange]:
        with self._lock:
            return [one for one in self._exchanges if route in (None, one.route)]

    def clear(self) -> None:
        with self._lock:
            self._exchanges.clear()

    def respond(self, received: Received) -> Answer:
        path, _, query = received.path.partition("?")
        route = path[len(API) :] if path.startswith(API) else path
        connection = http.client.HTTPConnection(*self._target, timeout=120)
        try:
            connection.connect()
        except OSError:  # the server is gone, and so the client sees a lost connection
            return Answer(drop=True)
        with self.tracked(connection.sock):
            sent = {k: v for k, v in received.headers.items() if k not in ("host", "connection")}
            if self._accepted_type is not None:
                sent["accept"] = self._accepted_type
            connection.request(received.method, received.path, received.body or None, sent)
            response = connection.getresponse()
            content = response.read()
        kept = {k: v for k, v in response.headers.items() if k.lower() not in _HOP_BY_HOP}
        with self._lock:
            dropped = self._drops.get(route, 0) > 0
            if dropped:
                self._drops[route] -= 1
            change = self._changes.get(route)
            status = 0 if dropped else response.status
            self._exchanges.append(
                Exchange(
                    received.method,
                    route,
                    query,
                    received.headers,
                    received.body,
                    status,
                    response.headers.get("content-type", ""),
                )
            )
        if change is not None and response.status == 200:
            content = change(content)
        return Answer(response.status, content, kept, drop=dropped)
