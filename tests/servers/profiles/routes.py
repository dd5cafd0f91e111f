"""Which routes a server has, and its answer to all others: 404, or FastAPI's 405.

Pure functions of a profile's data.
"""

from __future__ import annotations

import re
from typing import List, Optional, Pattern, Sequence, Tuple

PREFIX = "/api/v1/"


class RouteTable:
    """The routes of one server; if *routes* is None, all routes except those in *lacks*."""

    def __init__(self, routes: Optional[Sequence[str]], lacks: Sequence[str]) -> None:
        self._has = None if routes is None else [_compiled(route) for route in routes]
        self._lacks = [_compiled(route) for route in lacks]

    def refusal(self, method: str, path: str) -> Optional[int]:
        """Return None if the server serves *path* (below ``/api/v1/``), or the status: 404, 405."""
        if self._has is None:
            lacking = any(m == method and p.fullmatch(path) for m, p in self._lacks)
            return 404 if lacking else None
        matching = [known for known, pattern in self._has if pattern.fullmatch(path)]
        if method in matching or (method == "HEAD" and "GET" in matching):
            return None
        return 405 if matching else 404


def _compiled(route: str) -> Tuple[str, Pattern[str]]:
    method, path = route.split(" ")
    parts: List[str] = []
    for part in re.split(r"(\{id\}|\{cp\})", path):
        parts.append({"{id}": "[^/]+", "{cp}": ".+"}.get(part) or re.escape(part))
    return method, re.compile("".join(parts))
