"""AdminClient: audit log, billing and storage, for administrators."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from typing import Optional

from tinkex._api import rest as api
from tinkex._runtime.awaiting import result_of
from tinkex.clients.base import Instant, LookupClient
from tinkex.errors import InvalidInputError
from tinkex.futures import APIFuture
from tinkex.types import (
    AuditLogResponse,
    BillingUsageResponse,
    CurrentCheckpointStorageUsageResponse,
)
from tinkex.types._wire import parse_datetime

EVENT_TYPES = ("all", "checkpoints", "projects", "teams", "organizations")

#: The longest period that one request for usage may cover.
LONGEST_USAGE = timedelta(days=14)


class AdminClient(LookupClient):
    """Reports an organization's activity, usage and storage.  Thread-safe.

    Create it directly, ``AdminClient(base_url=..., api_key=...)``; it creates nothing on the
    server.  Every method returns a future and does not block.  Futures raise RouteMissingError if
    the server lacks the route, PermissionDeniedError if the key is not allowed to use it, and
    APIError otherwise.  The arguments are those of LookupClient.
    """

    def get_audit_log(
        self, event_type: str = "all", day: Optional[date] = None
    ) -> APIFuture[AuditLogResponse]:
        """Return the audit log of one day.

        Args:
            event_type: ``"all"``, ``"checkpoints"``, ``"projects"``, ``"teams"`` or
                ``"organizations"``.
            day: the day, in UTC; None leaves the choice to the server.

        Raises:
            InvalidInputError: *event_type* is not one of these, or *day* is not a date.
        """
        if event_type not in EVENT_TYPES:
            raise InvalidInputError(
                f"event_type is {event_type!r}; it must be one of {', '.join(EVENT_TYPES)}"
            )
        if day is not None and (not isinstance(day, date) or isinstance(day, datetime)):
            raise InvalidInputError(f"day is {day!r}; it must be a datetime.date")
        return self._run(api.get_audit_log, event_type=event_type, day=day)

    def get_billing_usage(
        self, starting_on: Instant, ending_before: Instant
    ) -> APIFuture[BillingUsageResponse]:
        """Return the usage from *starting_on* until just before *ending_before*.

        Both are datetimes or RFC 3339 strings that name a whole hour, UTC if they have no time
        zone; a bare date is its first hour.  They may be at most 14 days apart.

        Raises:
            InvalidInputError: an argument is not a whole hour, or the period is empty or too long;
                nothing was sent.
        """
        start = _whole_hour("starting_on", starting_on)
        end = _whole_hour("ending_before", ending_before)
        if not timedelta(0) < end - start <= LONGEST_USAGE:
            raise InvalidInputError(
                f"from {start.isoformat()} to {end.isoformat()}: the end must be later than the "
                f"start, by at most {LONGEST_USAGE.days} days"
            )
        return self._run(api.get_billing_usage, starting_on=start, ending_before=end)

    def get_current_checkpoint_storage_usage(
        self, project_id: Optional[str] = None
    ) -> APIFuture[CurrentCheckpointStorageUsageResponse]:
        """Return the storage that current checkpoints use, and its cost, in one project or all."""
        return self._run(api.get_current_checkpoint_storage_usage, project_id=project_id)

    # Awaitable variants, under the official SDK's names.
    get_audit_log_async = result_of(get_audit_log)
    get_billing_usage_async = result_of(get_billing_usage)
    get_current_checkpoint_storage_usage_async = result_of(get_current_checkpoint_storage_usage)


def _whole_hour(name: str, value: Instant) -> datetime:
    """Return *value* in UTC; raise InvalidInputError unless it is a whole hour."""
    found: Optional[datetime] = None
    if isinstance(value, datetime):
        found = value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)
    elif isinstance(value, str):
        try:
            found = parse_datetime(value if len(value) > len("2026-01-01") else f"{value}T00:00:00")
        except ValueError:
            found = None
    if found is None:
        raise InvalidInputError(
            f"{name} is {value!r}; give a datetime, or RFC 3339 as in 2026-01-01T00:00:00Z"
        )
    found = found.astimezone(timezone.utc)
    if found.minute or found.second or found.microsecond:
        raise InvalidInputError(f"{name} is {value}; usage is counted by whole hours of UTC")
    return found
