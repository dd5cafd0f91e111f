"""Finding sessions by their attributes (docs/protocol.md, "Session search").

Pure: rows in, rows out.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime, timezone
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple

from tinkex.local.errors import HTTPError
from tinkex.local.fields import optional, required
from tinkex.local.state.rows import SessionRow, timestamp

#: Project of a session without one of its own.
DEFAULT_PROJECT = "default"

#: Reasons that a client may give for ending a session.
REASONS = ("success", "errored", "interrupted")
_STATUSES = ("active", "cancelled", "failed", "client_finished")

#: State of a row -> status; a session that expired, or was ended by a restart, was cancelled.
_STATUS_OF = {
    "live": "active",
    "finished": "client_finished",
    "expired": "cancelled",
    "lost": "cancelled",
}


def project_of(row: SessionRow) -> str:
    """Return the project of a session."""
    return row.project_id or DEFAULT_PROJECT


def status_of(row: SessionRow) -> Dict[str, Any]:
    """Return the status of a session in the form of the protocol."""
    status: Dict[str, Any] = {"type": _STATUS_OF[row.state]}
    if row.state == "finished":
        status.update(reason={"type": row.end_reason or "success"}, detail=row.end_detail)
    elif row.state != "live":
        status.update(detail=row.reason)
    return status


@dataclasses.dataclass(frozen=True)
class Search:
    """The criteria of a search; None matches everything."""

    limit: int
    after: Optional[Tuple[str, str]]  # created_at and session_id of the last page's last session
    session_id: Optional[str]
    project_ids: Optional[FrozenSet[str]]
    user_metadata: Mapping[str, Any]
    display_name: Optional[str]
    owner_urns: Optional[FrozenSet[str]]
    statuses: Optional[FrozenSet[Tuple[str, Optional[str]]]]  # type, and reason, or None for any

    @classmethod
    def read(cls, body: Dict[str, Any]) -> Search:
        """Read a request body; HTTPError 400 says what is wrong with it."""
        limit = optional(body, "limit", int)
        if limit is not None and not 1 <= limit <= 200:
            raise HTTPError(400, f"limit is {limit}; it must lie between 1 and 200")
        display_name = body.get("display_name")
        if display_name == "":
            raise HTTPError(400, "display_name is empty; leave it out")
        project_ids = optional(body, "project_ids", list)
        return cls(
            limit=50 if limit is None else limit,
            after=_cursor(optional(body, "cursor", dict)),
            session_id=optional(body, "session_id", str),
            project_ids=None if project_ids is None else frozenset(map(str, project_ids)),
            user_metadata=optional(body, "user_metadata", dict) or {},
            display_name=optional(body, "display_name", str),
            owner_urns=_owner(optional(body, "owner", dict)),
            statuses=_statuses(optional(body, "statuses", list)),
        )

    def page(
        self, rows: Sequence[SessionRow], owner_urn: str
    ) -> Tuple[List[SessionRow], Optional[Dict[str, str]]]:
        """Return the next matching *rows*, newest first, and a cursor if there are more."""
        if self.owner_urns is not None and owner_urn not in self.owner_urns:
            return [], None
        # Sorted by the time as text, as in the cursor, not as a float: a difference in rounding
        # would make a page repeat or skip a session.  The id orders sessions of one microsecond.
        keyed = {(timestamp(row.created_at), row.session_id): row for row in rows}
        found: List[SessionRow] = []
        for key, row in sorted(keyed.items(), reverse=True):
            if (self.after is not None and key >= self.after) or not self._fits(row):
                continue
            # Only one more match shows that there is another page: the last page has no cursor.
            if len(found) == self.limit:
                last = found[-1]
                return found, {
                    "last_created_at": timestamp(last.created_at),
                    "last_session_id": last.session_id,
                }
            found.append(row)
        return found, None

    def _fits(self, row: SessionRow) -> bool:
        metadata = row.facts.get("user_metadata") or {}
        status = _STATUS_OF[row.state]
        return (
            self.session_id in (None, row.session_id)
            and (self.project_ids is None or project_of(row) in self.project_ids)
            and all(metadata.get(name) == value for name, value in self.user_metadata.items())
            and self.display_name in (None, row.facts.get("display_name"))
            and (
                self.statuses is None
                or (status, None) in self.statuses
                or (status, row.end_reason) in self.statuses
            )
        )


def _cursor(cursor: Optional[Dict[str, Any]]) -> Optional[Tuple[str, str]]:
    if cursor is None:
        return None
    created_at = required(cursor, "last_created_at", str)
    try:
        # Python reads the Z only from 3.11 on.
        moment = datetime.fromisoformat(created_at.replace("Z", "+00:00"))
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        last = timestamp(moment.timestamp())  # raises outside of the years 1 to 9999 in UTC
    except (ValueError, OverflowError, OSError) as error:
        raise HTTPError(
            400,
            f"last_created_at {created_at!r:.80} is not an ISO 8601 time in the years 1 to 9999",
        ) from error
    return last, required(cursor, "last_session_id", str)


def _owner(owner: Optional[Dict[str, Any]]) -> Optional[FrozenSet[str]]:
    kind = "own" if owner is None else owner.get("type")
    if kind in ("own", "accessible") or owner is None:
        return None  # there is one user
    if kind != "user":
        raise HTTPError(400, f"owner {kind!r:.80} is unknown; it must be own, accessible or user")
    urns = required(owner, "owner_urns", list)
    if not 1 <= len(urns) <= 10:
        raise HTTPError(400, f"there are {len(urns)} owner_urns; there must be 1 to 10")
    return frozenset(map(str, urns))


def _statuses(
    statuses: Optional[List[Any]],
) -> Optional[FrozenSet[Tuple[str, Optional[str]]]]:
    if statuses is None:
        return None
    wanted: List[Tuple[str, Optional[str]]] = []
    for status in statuses:
        kind = status.get("type") if isinstance(status, dict) else None
        if kind not in _STATUSES:
            raise HTTPError(
                400, f"status {kind!r:.80} is unknown; there are {', '.join(_STATUSES)}"
            )
        reasons = status.get("reasons") if kind == "client_finished" else None
        if reasons is None:
            wanted.append((kind, None))
            continue
        if not isinstance(reasons, list) or not all(reason in REASONS for reason in reasons):
            raise HTTPError(400, f"reasons must be a list of {', '.join(REASONS)}")
        wanted += [(kind, reason) for reason in reasons]
    return frozenset(wanted)
