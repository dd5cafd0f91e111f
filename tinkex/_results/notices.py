"""Warnings about a sampler or a run, logged not too often: pauses by the server, NaN logprobs."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from typing import Dict, Optional

from tinkex._runtime.clock import SYSTEM_CLOCK, Clock

logger = logging.getLogger(__name__)

#: The shortest time between two warnings about the same sampler or run, in seconds.
EVERY_S = 60.0
#: The most samplers and runs that are remembered.
_KEPT = 256


@dataclasses.dataclass
class _Pause:
    since: Optional[float] = None  # when the current pause began; None if there is none
    logged_at: float = -math.inf
    logged: bool = False  # whether the current pause was logged


class PauseNotices:
    """Logs that the server has paused a sampler or a run, and why.  Thread-safe.

    Waiting futures report it, too (`FutureStatus`); the log is for programs that do not look there.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        # Guards _pauses.
        self._lock = threading.Lock()
        self._pauses: Dict[str, _Pause] = {}

    def note(
        self, owner: str, state: Optional[str], reason: Optional[str], grace_s: float = 0.0
    ) -> None:
        """Note the queue *state* of work of *owner*; a pause is logged once it lasts *grace_s*."""
        if state is None:
            return
        now = self._clock.monotonic()
        with self._lock:
            if state == "active" and owner not in self._pauses:  # the usual case
                return
            pause = self._pauses.setdefault(owner, _Pause())
            # A program may make any number of samplers, so drop the oldest entry.
            if len(self._pauses) > _KEPT:
                del self._pauses[next(iter(self._pauses))]
            resumed = state == "active" and pause.logged
            if state == "active":
                pause.since, pause.logged = None, False
            elif pause.since is None:
                pause.since = now
            # Decide under the lock, so that only one of many threads with the same news logs it,
            # but log outside of it, since a log handler may block.
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


class NaNWarning:
    """Logs once that logprobs of *owner*, ``"run ..."`` or ``"sampler ..."``, are NaN.

    Attributes:
        shown: whether the warning was logged.  Two threads that race may both log it.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self.shown = False

    def show(self, where: str) -> None:
        """Log that logprobs of *where* are NaN, unless a warning was logged before."""
        if self.shown:
            return
        self.shown = True
        logger.warning(
            "%s: the server returned NaN for logprobs of %s. This usually means a token id beyond "
            "the model's vocabulary: does the tokenizer belong to the base model? "
            "(this warning is shown once)",
            self._owner,
            where,
        )
