"""PauseNotices: logs that the server has paused a sampler or a run, and why.

Waiting futures show it, too (`FutureStatus`); the log is for programs that do not look there.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from typing import Dict, Optional

from tinkex._runtime.clock import SYSTEM_CLOCK, Clock

logger = logging.getLogger(__name__)

#: About one sampler or run there is at most one warning in this time, in seconds.
EVERY_S = 60.0
#: This many samplers and runs are remembered.
_KEPT = 256


@dataclasses.dataclass
class _Pause:
    since: Optional[float] = None  # of the pause that lasts, if one does
    logged_at: float = -math.inf
    logged: bool = False  # the pause that lasts


class PauseNotices:
    """Gets the queue state of every pending response.  Thread-safe."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        # Guards _pauses.
        self._lock = threading.Lock()
        self._pauses: Dict[str, _Pause] = {}

    def note(
        self, owner: str, state: Optional[str], reason: Optional[str], grace_s: float = 0.0
    ) -> None:
        """Note that work of *owner* is in *state*; a pause is logged after *grace_s*."""
        if state is None:
            return
        now = self._clock.monotonic()
        with self._lock:
            if state == "active" and owner not in self._pauses:
                return
            pause = self._pauses.setdefault(owner, _Pause())
            if len(self._pauses) > _KEPT:
                del self._pauses[next(iter(self._pauses))]
            resumed = state == "active" and pause.logged
            if state == "active":
                pause.since, pause.logged = None, False
            elif pause.since is None:
                pause.since = now
            due = (
                pause.since is not None
                and now - pause.since >= grace_s
                and now - pause.logged_at >= EVERY_S
            )
            if due:
                pause.logged, pause.logged_at = True, now
        if due:
            logger.warning(
                "the server has paused %s: %s (%s)", owner, state, reason or "no reason given"
            )
        elif resumed:
            logger.info("%s resumed", owner)
