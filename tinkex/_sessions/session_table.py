"""SessionTable: which sessions live, which heartbeats are due, and what a response means.

Pure logic: callers pass ``now`` (monotonic seconds), and there are no threads, locks or network.
Its owner, the SessionRegistry, guards it with a lock.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import Dict, List, Optional, Tuple

from tinkex.config import Config

#: After the first warning about a session's failing heartbeats, the next ones are at least this
#: many seconds apart.
WARN_EVERY_S = 60.0
#: After a beat was refused, the next one is due after this many seconds (or the interval, if that
#: is shorter): one stray response, e.g. of a gateway during a deployment, must not cost a session.
CONFIRM_AFTER_S = 2.0


@dataclasses.dataclass(frozen=True)
class HeartbeatPolicy:
    """How one session is kept alive; see Config for the meaning of each setting."""

    interval_s: float = 10.0
    warn_after_s: float = 120.0
    max_failures: Optional[int] = None
    max_failure_s: Optional[float] = None

    @classmethod
    def of(cls, config: Config) -> HeartbeatPolicy:
        """Take the policy from a client's settings."""
        return cls(
            config.heartbeat_interval_s,
            config.heartbeat_warn_after_s,
            config.max_heartbeat_failures,
            config.max_heartbeat_failure_s,
        )


@dataclasses.dataclass(frozen=True)
class SessionSnapshot:
    """What is known about a live session; times are in monotonic seconds.  Contains no secrets."""

    session_id: str
    created: float
    last_success: float
    consecutive_failures: int
    last_error: Optional[str]
    state: str  # "alive", or "failing" while heartbeats get no response


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the response to a heartbeat means.

    Attributes:
        kind: ``"fine"``, ``"failing"`` (not worth a warning), ``"warn"``, ``"recovered"``, or, if
            the session was removed: ``"gone"`` (404, 410), ``"refused"`` (another 4xx, twice in a
            row), ``"limit"``.
        silent_s: seconds since the last success (or the start).
        failures: failures in a row, this one included.
        first_beat: True if this was the session's very first heartbeat, and it failed.
        error: the failure, in words.
        status: the HTTP status of the response, if it was not a success.
        confirm: the beat was refused for the first time; the next one is due soon.
    """

    kind: str
    silent_s: float = 0.0
    failures: int = 0
    first_beat: bool = False
    error: Optional[str] = None
    status: Optional[int] = None
    confirm: bool = False

    @property
    def removed(self) -> bool:
        """True if the session was removed from the table."""
        return self.kind in ("gone", "refused", "limit")

    @property
    def reason(self) -> str:
        """Why the session was removed, in words."""
        if self.kind == "gone":
            return "the server ended it or let it expire"
        if self.kind == "refused":
            return f"the server refused its heartbeat ({self.error})"
        return f"no heartbeat succeeded for {self.silent_s:.0f} s ({self.error})"


@dataclasses.dataclass
class _Entry:
    session_id: str
    policy: HeartbeatPolicy
    created: float
    due: float
    last_success: float
    in_flight: bool = False
    ever_succeeded: bool = False
    failures: int = 0
    last_error: Optional[str] = None
    last_warning: Optional[float] = None
    refused: Optional[int] = None  # the status of the last beat, if it was refused


class SessionTable:
    """The live sessions.  Not thread-safe: its owner must lock."""

    def __init__(self) -> None:
        self._entries: Dict[str, _Entry] = {}
        # (due, session id); entries that were removed or re-armed leave stale items behind,
        # which are recognized by their time and dropped when they surface.
        self._heap: List[Tuple[float, str]] = []

    def add(self, session_id: str, policy: HeartbeatPolicy, *, now: float, phase: float) -> None:
        """Add a session; its first beat is due after *phase* (in [0, 1)) of its interval."""
        # A random phase spreads the beats of sessions that are created together.
        due = now + phase * policy.interval_s
        self._entries[session_id] = _Entry(session_id, policy, now, due, last_success=now)
        heapq.heappush(self._heap, (due, session_id))

    def remove(self, session_id: str) -> None:
        """Remove a session, if it is on the table."""
        self._entries.pop(session_id, None)

    def next_due(self) -> Optional[float]:
        """Return when the next beat is due; None if there are no sessions."""
        while self._heap:
            due, session_id = self._heap[0]
            entry = self._entries.get(session_id)
            if entry is not None and entry.due == due:
                return due
            heapq.heappop(self._heap)
        return None

    def take_due(self, now: float) -> List[str]:
        """Return the sessions whose beat is due; mark each in flight and schedule its next beat.

        Several missed beats become one.  A session whose last beat is still in flight is skipped
        until its next beat is due.
        """
        due: List[str] = []
        while True:
            instant = self.next_due()
            if instant is None or instant > now:
                return due
            entry = self._entries[heapq.heappop(self._heap)[1]]
            interval = entry.policy.interval_s
            # The next beat is scheduled before this one is sent, so that a beat that hangs or fails
            # does not delay it.  A multiple of the interval keeps the session's phase and skips
            # missed beats.
            entry.due += interval * (1 + (now - entry.due) // interval)
            heapq.heappush(self._heap, (entry.due, entry.session_id))
            if not entry.in_flight:
                entry.in_flight = True
                due.append(entry.session_id)

    def beat_all_at(self, now: float) -> None:
        """Make every session due at *now*, e.g. after the machine slept."""
        # The items already in the heap become stale; `next_due` drops them.
        for entry in self._entries.values():
            entry.due = now
            heapq.heappush(self._heap, (now, entry.session_id))

    def record(
        self, session_id: str, *, status: Optional[int], error: Optional[str], now: float
    ) -> Optional[Verdict]:
        """Judge the response to a beat: its HTTP *status*, or None and an *error*.

        Returns None for a session that is no longer on the table.
        """
        entry = self._entries.get(session_id)
        if entry is None:
            return None
        entry.in_flight = False
        if status is not None and 200 <= status < 300:
            return self._succeeded(entry, now)
        entry.failures += 1
        entry.last_error = error or f"status {status}"
        verdict = self._failed(entry, status, now)
        if verdict.removed:
            self.remove(session_id)
        elif verdict.confirm:
            soon = now + min(CONFIRM_AFTER_S, entry.policy.interval_s)
            entry.due = min(entry.due, soon)
            heapq.heappush(self._heap, (entry.due, session_id))
        return verdict

    def snapshots(self) -> List[SessionSnapshot]:
        """Return what is known about each live session."""
        return [
            SessionSnapshot(
                e.session_id,
                e.created,
                e.last_success,
                e.failures,
                e.last_error,
                "failing" if e.failures else "alive",
            )
            for e in self._entries.values()
        ]

    @staticmethod
    def _succeeded(entry: _Entry, now: float) -> Verdict:
        silent_s = now - entry.last_success
        kind = "recovered" if entry.last_warning is not None else "fine"
        verdict = Verdict(kind, silent_s, entry.failures, error=entry.last_error)
        entry.ever_succeeded = True
        entry.last_success = now
        entry.refused = None
        entry.failures, entry.last_error, entry.last_warning = 0, None, None
        return verdict

    @staticmethod
    def _failed(entry: _Entry, status: Optional[int], now: float) -> Verdict:
        policy = entry.policy
        silent_s = now - entry.last_success
        kind = "failing"
        # Only the same status twice confirms: two different ones, e.g. 401 and then 403, may be two
        # accidents.
        before, entry.refused = entry.refused, status if _refuses(status) else None
        confirmed = entry.refused is not None and entry.refused == before
        # The order matters: the server's decision comes before the user's limits, and these before
        # a mere warning.  See docs/protocol.md, "Heartbeats".
        if status in (404, 410):
            kind = "gone"
        elif confirmed:
            kind = "refused"
        elif (policy.max_failures is not None and entry.failures >= policy.max_failures) or (
            policy.max_failure_s is not None and silent_s >= policy.max_failure_s
        ):
            kind = "limit"
        elif silent_s >= policy.warn_after_s and (
            entry.last_warning is None or now - entry.last_warning >= WARN_EVERY_S
        ):
            kind = "warn"
            entry.last_warning = now
        first_beat = entry.failures == 1 and not entry.ever_succeeded
        confirm = entry.refused is not None and not confirmed
        return Verdict(
            kind, silent_s, entry.failures, first_beat, entry.last_error, status, confirm
        )


def _refuses(status: Optional[int]) -> bool:
    """Return whether an HTTP status refuses a beat, as it would probably refuse the next one."""
    passing_or_gone = (404, 408, 410, 429)
    return status is not None and 400 <= status < 500 and status not in passing_or_gone
