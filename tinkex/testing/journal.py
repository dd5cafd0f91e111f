"""What a `FakeServer` has received and done."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from fnmatch import fnmatchcase
from typing import Any, Dict, List, Mapping, Optional, Tuple

#: POST routes that only read, or that clients repeat by design: a repeated request is not repeated
#: work.
_REPEATABLE = re.compile(
    r"/api/v1/(retrieve_futures?|session_heartbeat|client/.*|telemetry|get_info|weights_info|"
    r"cancel_future|sessions/.*|auth/.*)"
)


@dataclasses.dataclass(frozen=True)
class ReceivedRequest:
    """One request, as the server received it.

    Attributes:
        index: number of the request among all, from 0.
        method, path: as in ``POST`` and ``/api/v1/optim_step``, without the query.
        query: the part after the question mark.
        headers: with lower-case names.
        body: as sent, possibly compressed.
        at: when all of it had arrived, in seconds of the monotonic clock.
    """

    index: int
    method: str
    path: str
    query: str
    headers: Mapping[str, str] = dataclasses.field(repr=False)
    body: bytes = dataclasses.field(repr=False)
    at: float = dataclasses.field(repr=False)

    def json(self) -> Any:
        """Parse the body.  ValueError if it is not JSON."""
        return json.loads(self.body)

    def matches(self, pattern: str) -> bool:
        """Return whether *pattern*, from `route_pattern`, fits method and path."""
        return fnmatchcase(f"{self.method} {self.path}", pattern)


def route_pattern(route: str) -> str:
    """Return the pattern of "METHOD /path" strings that *route* stands for.

    *route* may omit the method (then any fits) and ``/api/v1/``; ``*`` stands for any text.
    """
    method, space, path = route.rpartition(" ")
    if not path.startswith(("/", "*")):
        path = f"/api/v1/{path}"
    return f"{method if space else '*'} {path}"


class Journal:
    """All requests of a server, in order, and the work that they caused.  Thread-safe.

    It survives restarts of the server and can still be read after the server is closed.  Every
    method returns a new snapshot.
    """

    def __init__(self) -> None:
        # Guards both lists.
        self._lock = threading.Lock()
        self._requests: List[ReceivedRequest] = []
        self._executed: List[Tuple[str, str]] = []  # id of the run or sampler, kind of work

    @property
    def requests(self) -> List[ReceivedRequest]:
        """All requests received, in order."""
        with self._lock:
            return list(self._requests)

    def requests_to(self, route: str) -> List[ReceivedRequest]:
        """Return the requests to *route*, such as ``"optim_step"`` or ``"GET *"``."""
        pattern = route_pattern(route)
        return [request for request in self.requests if request.matches(pattern)]

    def duplicates(self) -> List[List[ReceivedRequest]]:
        """Return the requests for work that arrived more than once, each with its repetitions.

        A client sends a request again if it got no response.  The server must then do the work only
        once; see `executed`.
        """
        groups: Dict[Tuple[str, ...], List[ReceivedRequest]] = {}
        for request in self.requests:
            # One key for all attempts of a request: docs/protocol.md, "Idempotency keys".
            key = request.headers.get("x-idempotency-key")
            if request.method != "GET" and key and not _REPEATABLE.fullmatch(request.path):
                groups.setdefault((request.method, request.path, key), []).append(request)
        return [group for group in groups.values() if len(group) > 1]

    def executed(self, run: Any = None) -> List[str]:
        """Return what was executed for *run*, or for all runs and samplers, in order.

        *run* is a `TrainingClient`, a `SamplingClient` or an id.  Entries are ``"create"``,
        ``"forward"``, ``"forward_backward"``, ``"optim_step"``, ``"save"``, ``"export"`` (weights
        for a sampler), ``"load"`` and ``"sample"``, once for each request; failed work is not
        listed.  A call with many datums may take several requests.
        """
        wanted = None if run is None else _id_of(run)
        with self._lock:
            return [what for owner, what in self._executed if wanted in (None, owner)]

    def executed_steps(self, run: Any) -> int:
        """Return the number of optimizer steps that were executed for *run*."""
        return self.executed(run).count("optim_step")

    def add_request(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes
    ) -> ReceivedRequest:
        """Add a request (for the server)."""
        with self._lock:
            request = ReceivedRequest(
                len(self._requests), method, path, query, headers, body, time.monotonic()
            )
            self._requests.append(request)
        return request

    def add_executed(self, owner: str, what: str) -> None:
        """Add work that was done (for the server)."""
        with self._lock:
            self._executed.append((owner, what))


def _id_of(run: Any) -> str:
    for name in ("model_id", "sampling_session_id"):
        found: Optional[str] = getattr(run, name, None)
        if found is not None:
            return found
    return str(run)
