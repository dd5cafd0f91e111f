"""SessionRegistry: the live sessions of one manager, and the heartbeats that are due.

Plain data behind one lock: no threads, no I/O.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Dict, List, NamedTuple, Optional, Tuple

from tinkex._runtime.clock import Clock
from tinkex._runtime.inbox import Inbox
from tinkex._sessions.beat_queue import BeatQueue
from tinkex._sessions.session_record import MAX_WORKERS, Message
from tinkex._sessions.session_table import (
    HeartbeatPolicy,
    SessionSnapshot,
    SessionTable,
    Verdict,
)
from tinkex.errors import ClientClosedError, InvalidInputError

if TYPE_CHECKING:
    from tinkex._sessions.session_record import SessionRecord

#: The reasons of at most this many lost sessions are kept: dropped clients never fetch theirs.
MAX_LOST = 1000


class Beat(NamedTuple):
    """A heartbeat in flight, sent at the monotonic instant *sent_at*.

    *host* is the host it was queued for.  That differs from the record's host if the session was
    stopped in the meantime and its id now belongs to a session on another host.
    """

    record: SessionRecord
    host: str
    sent_at: float


class SessionRegistry:
    """The sessions that a manager keeps alive.  Thread-safe; no method blocks.

    Attributes:
        inbox: messages to the heartbeat thread, e.g. from the owners' finalizers.
    """

    def __init__(self, clock: Clock) -> None:
        self.inbox: Inbox[Message] = Inbox()
        self._clock = clock
        # Guards everything below.  Never held during I/O, logging or callbacks.
        self._lock = threading.Lock()
        self._table = SessionTable()
        self._records: Dict[str, SessionRecord] = {}
        #: Sessions whose owners were all collected, while their end is being reported.
        self._ending: Dict[SessionRecord, None] = {}
        self._lost: Dict[str, str] = {}  # why and when it was lost, until the session is stopped
        self._beats = BeatQueue(MAX_WORKERS)
        self._closed = False

    @property
    def closed(self) -> bool:
        """True once the manager was closed; no session can be added then."""
        # Only an early answer, read without the lock: `add` checks again with the lock held.
        return self._closed

    def add(
        self, record: SessionRecord, policy: HeartbeatPolicy, phase: float, owner: Optional[object]
    ) -> SessionRecord:
        """Add a session, or another *owner* of an adopted one; return the record in use.

        The first beat is due after the fraction *phase* (in [0, 1)) of the heartbeat interval.

        Raises:
            ClientClosedError: the manager was closed.
            InvalidInputError: there is another session with this id.
        """
        with self._lock:
            if self._closed:
                raise closed_error()
            known = self._records.get(record.session_id)
            # A session adopted by two clients of this process is one session here.
            if known is None:
                now = self._clock.monotonic()
                self._records[record.session_id] = record
                self._table.add(record.session_id, policy, now=now, phase=phase)
            elif known.owned or not known.has_owners:
                raise InvalidInputError(
                    f"this manager already keeps a session {record.session_id} alive",
                    hint="If two servers use the same ids, give each its own SessionManager.",
                )
            used = known or record
            if owner is not None:
                used.add_owner(owner, self.inbox)
            return used

    def get(self, session_id: str) -> Optional[SessionRecord]:
        """Return the record of a live session, or None."""
        with self._lock:
            return self._records.get(session_id)

    def remove(self, session_id: str) -> Optional[SessionRecord]:
        """Remove and return a session that is being stopped; None if no such session lives."""
        with self._lock:
            self._lost.pop(session_id, None)
            return self._remove_locked(session_id)

    def remove_record(self, record: SessionRecord) -> bool:
        """Remove *record*; return False if another live session has its id."""
        with self._lock:
            known = self._records.get(record.session_id)
            if known is record:
                self._remove_locked(record.session_id)
            return known is None or known is record

    def remove_owner(self, session_id: str, token: object) -> Optional[SessionRecord]:
        """Note that an owner was collected; if it was the last, remove and return its session."""
        with self._lock:
            record = self._records.get(session_id)
            if record is None or not record.remove_owner(token):
                return None
            self._ending[record] = None
            return self._remove_locked(session_id)

    def forget_ending(self, record: SessionRecord) -> None:
        """Note that the end of a session from `ending` was reported, or cannot be."""
        with self._lock:
            self._ending.pop(record, None)

    def ending(self) -> List[SessionRecord]:
        """Return the sessions whose owners were all collected and whose end is being reported."""
        with self._lock:
            return list(self._ending)

    def remove_all(self) -> List[SessionRecord]:
        """Remove and return all sessions, those with successful heartbeats first."""
        with self._lock:
            # Failing sessions last: the time to end them all is bounded, and their servers may
            # hang.
            failing = {s.session_id for s in self._table.snapshots() if s.consecutive_failures}
            records = sorted(self._records.values(), key=lambda r: r.session_id in failing)
            self._records, self._lost, self._table = {}, {}, SessionTable()
            self._beats = BeatQueue(MAX_WORKERS)
        for record in records:
            record.detach_owners()
        return records

    def close(self) -> None:
        """Refuse new sessions from now on."""
        with self._lock:
            self._closed = True

    def __len__(self) -> int:
        with self._lock:
            return len(self._records)

    def records(self) -> List[SessionRecord]:
        """Return all live sessions."""
        with self._lock:
            return list(self._records.values())

    def snapshots(self) -> List[SessionSnapshot]:
        """Return what is known about each live session."""
        with self._lock:
            return self._table.snapshots()

    def lost_reason(self, session_id: str) -> Optional[str]:
        """Return why and when a session was lost, in words; None if it was not lost."""
        with self._lock:
            return self._lost.get(session_id)

    def next_due(self) -> Optional[float]:
        """Return when the next beat is due, in monotonic seconds; None if there are no sessions."""
        with self._lock:
            return self._table.next_due()

    def queue_due_beats(self, now: float, *, all_sessions: bool) -> Tuple[int, bool]:
        """Queue the beats that are due, or with *all_sessions* one for every session.

        A session whose last beat is still queued or in flight is skipped.  Returns how many beats
        were queued, and whether there is only one session.
        """
        with self._lock:
            if all_sessions:
                self._table.beat_all_at(now)
            due = self._table.take_due(now)
            for session_id in due:
                self._beats.put(self._records[session_id].host, session_id)
            return len(due), len(self._records) == 1

    def next_beat(self) -> Optional[Beat]:
        """Take a queued beat, to be sent now; None if there is none that may be sent."""
        with self._lock:
            while True:
                now = self._clock.monotonic()
                item = self._beats.take(now)
                if item is None:
                    return None
                host, session_id = item
                record = self._records.get(session_id)
                if record is not None:
                    return Beat(record, host, now)
                # The session was stopped while its beat was queued: there is nothing to send.
                self._beats.done(host, now, now, responded=True)
                self._forget_host_locked(host)

    def beat_ended(self, beat: Beat, *, responded: bool) -> None:
        """Note that a beat is no longer in flight."""
        with self._lock:
            now = self._clock.monotonic()
            self._beats.done(beat.host, beat.sent_at, now, responded=responded)
            known = self._records.get(beat.record.session_id)
            if known is None or known.host != beat.host:
                self._forget_host_locked(beat.host)

    def record_heartbeat_reply(
        self, record: SessionRecord, status: Optional[int], error: Optional[str]
    ) -> Optional[Verdict]:
        """Judge the response to a beat: its HTTP *status*, or None and an *error*.

        Returns None if the session was stopped in the meantime.
        """
        with self._lock:
            session_id = record.session_id
            # Compare by identity: after a stop, the id may belong to a session on another server.
            if self._records.get(session_id) is not record:
                return None
            now = self._clock.monotonic()
            verdict = self._table.record(session_id, status=status, error=error, now=now)
            if verdict is not None and verdict.removed:
                self._remove_locked(session_id)
                # Kept until the session is stopped, to explain the failures of its work.
                self._note_lost_locked(session_id, verdict.reason)
            return verdict

    def _remove_locked(self, session_id: str) -> Optional[SessionRecord]:
        self._table.remove(session_id)
        record = self._records.pop(session_id, None)
        if record is not None:
            record.detach_owners()
            self._forget_host_locked(record.host)
        return record

    def _forget_host_locked(self, host: str) -> None:
        if all(record.host != host for record in self._records.values()):
            self._beats.forget(host)

    def _note_lost_locked(self, session_id: str, reason: str) -> None:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._clock.wall()))
        self._lost[session_id] = f"{reason}, at {at}"
        if len(self._lost) > MAX_LOST:
            del self._lost[next(iter(self._lost))]


def closed_error() -> ClientClosedError:
    """Return the error of a manager that was closed."""
    return ClientClosedError("the session manager was closed", hint="Make a new SessionManager.")
