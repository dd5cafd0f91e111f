"""Accepting: how the embedded server takes in connections, also when descriptors run out.

Used by the thread tinkex-server alone.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Dict, Optional, Tuple

from tinkex._runtime.descriptors import advice, are_exhausted

_log = logging.getLogger(__name__)

#: Without a free descriptor, nothing is accepted for this long, in seconds.
PAUSE_S = 0.1
#: Connections without a request for this long are closed then, in seconds.
IDLE_S = 1.0
#: The shortage is reported this often at most, in seconds.
_REPORT_S = 60.0


class Accepting:
    """Replaces the accepting of waitress's server *http*, whose sockets are in *sockets*.

    All connections that wait are accepted, not one in each round: in a round every socket that is
    ready is served too, and with a hundred of them busy, rounds are so few that a client's last
    connections would wait for most of a minute.

    Without a free file descriptor, accepting pauses (waitress would try in a busy loop) and idle
    connections are closed, so that those that wait get their turn.
    """

    def __init__(self, http: Any, sockets: Dict[int, Any]) -> None:
        self._http = http
        self._sockets = sockets
        self._accept_one = http.accept
        self._handle_one = http.handle_accept
        self._readable = http.readable
        self._resume_at: Optional[float] = None
        self._report_at = 0.0
        http.accept = self._accept
        http.handle_accept = self._accept_all
        http.readable = self._is_readable

    def resume(self, timeout_s: float) -> float:
        """Go on accepting if the pause is over; return how long the loop may wait."""
        if self._resume_at is None:
            return timeout_s
        left_s = self._resume_at - time.monotonic()
        if left_s <= 0:
            self._resume_at = None
            return timeout_s
        return min(timeout_s, left_s)

    def _is_readable(self) -> bool:
        readable: bool = self._readable()  # cleans up, too
        return readable and self._resume_at is None

    def _accept_all(self) -> None:
        known = -1
        limit = self._http.adj.connection_limit
        while (
            known < len(self._sockets) < limit
        ):  # the last one accepted nothing, and added nothing
            known = len(self._sockets)
            self._handle_one()

    def _accept(self) -> Optional[Tuple[Any, Any]]:
        try:
            accepted: Optional[Tuple[Any, Any]] = self._accept_one()
            return accepted
        except OSError as error:
            if not are_exhausted(error):
                raise
            self._pause()
            return None

    def _pause(self) -> None:
        now = time.monotonic()
        self._resume_at = now + PAUSE_S
        # Closes what has been idle for as long as waitress's own limit.
        self._http.maintenance(time.time() + self._http.adj.channel_timeout - IDLE_S)
        if now >= self._report_at:
            self._report_at = now + _REPORT_S
            _log.warning(
                "no file descriptor is free for another connection; clients wait. %s", advice()
            )
