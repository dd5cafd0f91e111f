"""What was done on a day (docs/protocol.md, "Administration")."""

from __future__ import annotations

from datetime import date, datetime, time, timezone
from typing import Optional

from flask import request

from tinkex.local.errors import HTTPError
from tinkex.local.routes.base import Result, Routes, route
from tinkex.types import AuditLogEntry, AuditLogResponse

_EVENT_TYPES = ("all", "checkpoints", "projects", "teams", "organizations")
_DAY_S = 86400.0


class AdminRoutes(Routes):
    """Views for administrators."""

    @route("GET", "audit")
    def audit_log(self) -> Result:
        """Everything that was done on one day in UTC, oldest first; by default today."""
        event_type = request.args.get("event_type", "all")
        if event_type not in _EVENT_TYPES:
            raise HTTPError(
                400,
                f"event_type is {event_type!r:.100}; it must be one of {', '.join(_EVENT_TYPES)}",
            )
        start = self._start_of_day(request.args.get("day"))
        chosen = None if event_type == "all" else event_type
        entries = [
            AuditLogEntry(
                timestamp=datetime.fromtimestamp(row.at, timezone.utc),
                event=row.event,
                event_details=row.details,
                model_id=row.run_id,
                tinker_path=row.tinker_path,
            )
            for row in self._backend.store.audit_log(start, start + _DAY_S, chosen)
        ]
        return AuditLogResponse(entries)

    def _start_of_day(self, day: Optional[str]) -> float:
        """Return when *day* (``YYYY-MM-DD``) begins; HTTPError 400 if it is no day."""
        if not day:
            return self._backend.wall() // _DAY_S * _DAY_S
        try:
            # Not strptime, which imports a module: requests must not, see local/server.py.
            midnight = datetime.combine(date.fromisoformat(day), time(), timezone.utc)
        except ValueError as error:
            raise HTTPError(400, f"day is {day!r:.100}; it must be YYYY-MM-DD") from error
        return midnight.timestamp()
