"""Audit, billing and storage (docs/protocol.md, "Administration").

Every function blocks, and raises RouteMissingError where the server does not have the route.
"""

from __future__ import annotations

from datetime import date, datetime, timezone
from typing import TYPE_CHECKING, Any, Mapping, Optional, Type, TypeVar

from tinkex import types
from tinkex._api._call import get
from tinkex._api._optional import optional_route

if TYPE_CHECKING:
    from tinkex._transport.transport import Sender
    from tinkex.types._wire import Wire

W = TypeVar("W", bound="Wire")


def get_audit_log(
    transport: Sender, *, event_type: str = "all", day: Optional[date] = None
) -> types.AuditLogResponse:
    """``GET audit``; may be answered by another host, which gets no credentials."""
    query = {"event_type": event_type, "day": None if day is None else day.isoformat()}
    return _get(transport, "audit", types.AuditLogResponse, query)


def get_billing_usage(
    transport: Sender, *, starting_on: datetime, ending_before: datetime
) -> types.BillingUsageResponse:
    """``GET billing/usage/events``; the times are whole hours."""
    query = {"starting_on": _rfc3339(starting_on), "ending_before": _rfc3339(ending_before)}
    return _get(transport, "billing/usage/events", types.BillingUsageResponse, query)


def get_current_checkpoint_storage_usage(
    transport: Sender, *, project_id: Optional[str] = None
) -> types.CurrentCheckpointStorageUsageResponse:
    """``GET billing/usage/checkpoints/current``."""
    route = "billing/usage/checkpoints/current"
    query = {"project_id": project_id}
    return _get(transport, route, types.CurrentCheckpointStorageUsageResponse, query)


def _get(transport: Sender, route: str, response_type: Type[W], query: Mapping[str, Any]) -> W:
    with optional_route(transport, f"GET {route}", names_nothing=True):
        return get(transport, f"/api/v1/{route}", response_type, query)


def _rfc3339(instant: datetime) -> str:
    return instant.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
