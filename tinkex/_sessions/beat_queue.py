"""BeatQueue: decides which due heartbeat a free worker sends next.

Pure logic, like SessionTable.  A host that hangs must not take the workers that other hosts need,
and a healthy host with many sessions must be able to use them all.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Deque, Dict, List, Optional, Tuple

#: A beat is overdue once it has been in flight for more than twice its host's usual response time,
#: and for more than this many seconds.
OVERDUE_S = 0.1


@dataclasses.dataclass
class _Host:
    waiting: Deque[str] = dataclasses.field(default_factory=collections.deque)
    sent: List[float] = dataclasses.field(default_factory=list)  # start times of beats in flight
    responds: Optional[bool] = None  # whether it responded to the last beat; None before the first
    usual_s: float = 0.0  # a moving average of its response times

    def overdue(self, now: float) -> bool:
        """Return whether a beat in flight is overdue."""
        return any(now - sent > max(OVERDUE_S, 2 * self.usual_s) for sent in self.sent)


class BeatQueue:
    """Due beats, by host.  Not thread-safe: its owner must lock.

    Args:
        workers: how many beats may be in flight in total.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._hosts: Dict[str, _Host] = {}

    def put(self, host: str, session_id: str) -> None:
        """Add a due beat."""
        self._hosts.setdefault(host, _Host()).waiting.append(session_id)

    def take(self, now: float) -> Optional[Tuple[str, str]]:
        """Take the next beat to send, as ``(host, session_id)``; None if no beat may be sent now.

        The beat counts as in flight until `done`.  Hosts take turns.
        """
        for name, host in list(self._hosts.items()):
            if host.waiting and len(host.sent) < self._allowed(host, now):
                self._hosts[name] = self._hosts.pop(name)  # move it to the end of the ordered dict
                host.sent.append(now)
                return name, host.waiting.popleft()
        return None

    def done(self, host: str, sent: float, now: float, *, responded: bool) -> None:
        """Note that a beat taken at *sent* ended at *now*."""
        entry = self._hosts.get(host)
        if entry is not None:
            entry.sent.remove(sent)  # if two beats have the same time, either will do
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
        """Return how many beats to *host* may be in flight at the same time."""
        if host.responds is False:
            # All hosts that did not respond last time share at most half of the workers.
            troubled = sum(len(h.sent) for h in self._hosts.values() if h.responds is False)
            return 1 if troubled < self._workers // 2 else 0
        if len(self._hosts) == 1:  # there is no other host to keep workers free for
            return self._workers
        if host.responds is None:  # unknown so far: an equal share
            return max(2, self._workers // len(self._hosts))
        # The host may start to hang at any moment: keep some workers free for the others.
        return 1 if host.overdue(now) else self._workers - self._workers // 4
