"""BeatQueue: which of the due heartbeats a free worker sends next.

A pure core like SessionTable.  A host that hangs must not take the workers from the others,
and a busy healthy host must be able to use them all.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Deque, Dict, List, Optional, Tuple

#: A beat in flight for twice its host's usual time, but no less than this many seconds, is overdue.
OVERDUE_S = 0.1


@dataclasses.dataclass
class _Host:
    waiting: Deque[str] = dataclasses.field(default_factory=collections.deque)
    sent: List[float] = dataclasses.field(default_factory=list)  # when, for each in flight
    responds: Optional[bool] = None  # to the last beat; None before the first
    usual_s: float = 0.0  # a moving average of the time that a response takes

    def overdue(self, now: float) -> bool:
        """True if a beat takes much longer than usual."""
        return any(now - sent > max(OVERDUE_S, 2 * self.usual_s) for sent in self.sent)


class BeatQueue:
    """Due beats, by host.  Not thread-safe: its owner locks.

    Args:
        workers: how many beats may be in flight in all.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._hosts: Dict[str, _Host] = {}

    def put(self, host: str, session_id: str) -> None:
        """Add a due beat."""
        self._hosts.setdefault(host, _Host()).waiting.append(session_id)

    def take(self, now: float) -> Optional[Tuple[str, str]]:
        """The next beat to send as ``(host, session_id)``, noted as in flight; None if none may be.

        Hosts take turns.
        """
        for name, host in list(self._hosts.items()):
            if host.waiting and len(host.sent) < self._allowed(host, now):
                self._hosts[name] = self._hosts.pop(name)  # to the end: dicts keep their order
                host.sent.append(now)
                return name, host.waiting.popleft()
        return None

    def done(self, host: str, sent: float, now: float, *, responded: bool) -> None:
        """Note the end, at *now*, of a beat taken at *sent*."""
        entry = self._hosts.get(host)
        if entry is not None:
            entry.sent.remove(sent)  # of two with the same time, either
            if responded:
                took_s = now - sent
                # A moving average; the first response sets it.
                weight = 0.2 if entry.responds is not None else 1.0
                entry.usual_s += weight * (took_s - entry.usual_s)
            entry.responds = responded

    def forget(self, host: str) -> None:
        """Forget a host that no session uses any more, unless a beat to it is in flight."""
        entry = self._hosts.get(host)
        if entry is not None and not entry.sent:
            del self._hosts[host]

    def _allowed(self, host: _Host, now: float) -> int:
        """How many beats to *host* may be in flight at the same time."""
        if host.responds is False:
            # Hosts that did not respond last time get half of the workers at most, all together.
            troubled = sum(len(h.sent) for h in self._hosts.values() if h.responds is False)
            return 1 if troubled < self._workers // 2 else 0
        if len(self._hosts) == 1:  # there is no other host to keep workers free for
            return self._workers
        if host.responds is None:  # not known yet: an equal share
            return max(2, self._workers // len(self._hosts))
        # It may begin to hang at this very moment: some workers stay free for the others.
        return 1 if host.overdue(now) else self._workers - self._workers // 4
