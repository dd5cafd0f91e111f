"""SessionTable: which sessions are alive.

Pure: the caller passes the time.  No thread and no lock: the backend's session lock guards it.
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
        # All sessions have the same lifetime, so they expire in the order of their last heartbeats.
        self._due: Dict[str, float] = {}

    def add(self, session_id: str, now: float) -> None:
        """Add a new session."""
        self._due[session_id] = now + self.ttl_s

    def alive(self, session_id: str, now: float) -> bool:
        """True if *session_id* was added, and has neither ended nor expired."""
        # The time is compared, since an expired session stays here until the next housekeeping.
        due = self._due.get(session_id)
        return due is not None and now < due

    def beat(self, session_id: str, now: float) -> bool:
        """Note a heartbeat; return False if there is no such session, or it has expired."""
        if not self.alive(session_id, now):
            return False
        del self._due[session_id]  # move it to the end of the order
        self._due[session_id] = now + self.ttl_s
        return True

    def remove(self, session_id: str) -> bool:
        """Remove a session; return False if it was not in the table."""
        return self._due.pop(session_id, None) is not None

    def drop_expired(self, now: float) -> List[str]:
        """Remove and return the expired sessions, in order of expiry."""
        expired = []
        for session_id, due in self._due.items():
            if now < due:
                break
            expired.append(session_id)
        for session_id in expired:
            del self._due[session_id]
        return expired

    def next_due(self) -> Optional[float]:
        """Return when the next session expires; None without sessions."""
        return next(iter(self._due.values()), None)

    def ages(self, now: float) -> Dict[str, float]:
        """Return the seconds since the last heartbeat, or creation, of each session."""
        return {session_id: now + self.ttl_s - due for session_id, due in self._due.items()}

    def ids(self) -> List[str]:
        """Return the ids of all sessions in the table."""
        return list(self._due)
