"""Which sessions are alive: a pure table, to which the time is handed in.

No thread and no lock: the backend's session lock guards it.
"""

from __future__ import annotations

from typing import Dict, List, Optional


class SessionTable:
    """Sessions and the instants at which they expire.

    Args:
        ttl_s: a session expires this many seconds after its creation or last heartbeat.
    """

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        # All sessions live equally long, so the order of the last beat is the order of expiry.
        self._due: Dict[str, float] = {}

    def add(self, session_id: str, now: float) -> None:
        """Start the life of *session_id*."""
        self._due[session_id] = now + self.ttl_s

    def alive(self, session_id: str, now: float) -> bool:
        """True if *session_id* was added, has not ended and has not missed its time."""
        # Compared, since an expired session stays in the table until the next housekeeping.
        due = self._due.get(session_id)
        return due is not None and now < due

    def beat(self, session_id: str, now: float) -> bool:
        """Note a heartbeat; False if there is no such session, or it comes too late."""
        if not self.alive(session_id, now):
            return False
        del self._due[session_id]  # move it to the end of the order
        self._due[session_id] = now + self.ttl_s
        return True

    def remove(self, session_id: str) -> bool:
        """End a session; False if it was not in the table."""
        return self._due.pop(session_id, None) is not None

    def drop_expired(self, now: float) -> List[str]:
        """Remove and return the sessions whose time has passed, oldest first."""
        expired = []
        for session_id, due in self._due.items():
            if now < due:
                break
            expired.append(session_id)
        for session_id in expired:
            del self._due[session_id]
        return expired

    def next_due(self) -> Optional[float]:
        """The instant at which the next session expires, or None."""
        return next(iter(self._due.values()), None)

    def ages(self, now: float) -> Dict[str, float]:
        """Return the seconds since the last heartbeat, or creation, of each session."""
        return {session_id: now + self.ttl_s - due for session_id, due in self._due.items()}

    def ids(self) -> List[str]:
        """Return the ids of all sessions in the table."""
        return list(self._due)
