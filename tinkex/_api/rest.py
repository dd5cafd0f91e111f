"""Runs, checkpoints, sessions, audit and billing: routes for what the server stores.

See docs/protocol.md, "Checkpoints", "REST lists" and "Administration".

Every function blocks, and raises RouteMissingError if the server lacks the route.
"""

from __future__ import annotations

import logging
from datetime import date, datetime, timezone
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional, Tuple, Type, TypeVar, Union

from tinkex import types
from tinkex._api._call import call, encode, get, post, read, segment
from tinkex._api._optional import optional_route, was_done_before
from tinkex._transport.request import Request
from tinkex.errors import APIStatusError, InvalidInputError
from tinkex.retry import RetryPolicy

if TYPE_CHECKING:
    from tinkex._transport.transport import Sender
    from tinkex.types._wire import Wire

logger = logging.getLogger(__name__)

W = TypeVar("W", bound="Wire")

_API = "/api/v1/"
_CHECKPOINT = "training_runs/{id}/checkpoints/{checkpoint}"
_TOKEN_HEADER = "X-Tinker-Weights-Access-Token"


def _run(run_id: str) -> str:
    return f"{_API}training_runs/{segment('the training run id', run_id)}"


def checkpoint_route(run_id: str, checkpoint_id: str) -> str:
    """Return the route of a checkpoint.  Its id is ``<kind>/<name>``; the slash is not escaped."""
    if not isinstance(checkpoint_id, str):
        raise InvalidInputError(f"the checkpoint id is {checkpoint_id!r}; it must be a string")
    parts = [segment("the checkpoint id", part) for part in checkpoint_id.split("/")]
    return f"{_run(run_id)}/checkpoints/{'/'.join(parts)}"


def _session(session_id: str) -> str:
    return f"{_API}sessions/{segment('the session id', session_id)}"


def _list(transport: Sender, route: str, response_type: Type[W], query: Mapping[str, Any]) -> W:
    with optional_route(transport, f"GET {route}", names_nothing=True):
        return get(transport, f"{_API}{route}", response_type, query)


def _change(
    transport: Sender,
    method: str,
    path: str,
    route: str,
    body: Optional[Mapping[str, Any]] = None,
    *,
    done: Tuple[int, ...] = (),
) -> None:
    """Send a change; *done* are the statuses that mean an earlier attempt has already made it."""
    with optional_route(transport, f"{method} {route}"):
        try:
            call(transport, method, path, body, reads_response=False)
        except APIStatusError as error:
            if not was_done_before(error, *done):
                raise
            logger.info("%s %s was done by an earlier attempt: %s", method, route, error.message)


def list_training_runs(
    transport: Sender, *, limit: int, offset: int, access_scope: str, project_id: Optional[str]
) -> types.TrainingRunsResponse:
    """``GET training_runs``."""
    query = {
        "limit": limit,
        "offset": offset,
        "access_scope": access_scope,
        "project_id": project_id,
    }
    return _list(transport, "training_runs", types.TrainingRunsResponse, query)


def get_training_run(transport: Sender, run_id: str, *, access_scope: str) -> types.TrainingRun:
    """``GET training_runs/{id}``."""
    with optional_route(transport, "GET training_runs/{id}"):
        return get(transport, _run(run_id), types.TrainingRun, {"access_scope": access_scope})


def list_checkpoints(transport: Sender, run_id: str) -> types.CheckpointsListResponse:
    """``GET training_runs/{id}/checkpoints``."""
    with optional_route(transport, "GET training_runs/{id}/checkpoints"):
        return get(transport, f"{_run(run_id)}/checkpoints", types.CheckpointsListResponse)


def list_user_checkpoints(
    transport: Sender, *, limit: int, offset: int
) -> types.CheckpointsListResponse:
    """``GET checkpoints``."""
    query = {"limit": limit, "offset": offset}
    return _list(transport, "checkpoints", types.CheckpointsListResponse, query)


def delete_checkpoint(transport: Sender, run_id: str, checkpoint_id: str) -> None:
    """``DELETE training_runs/{id}/checkpoints/{checkpoint}``."""
    path = checkpoint_route(run_id, checkpoint_id)
    _change(transport, "DELETE", path, _CHECKPOINT, done=(404, 410))


def publish_checkpoint(transport: Sender, run_id: str, checkpoint_id: str) -> None:
    """``POST .../publish``."""
    path = f"{checkpoint_route(run_id, checkpoint_id)}/publish"
    _change(transport, "POST", path, f"{_CHECKPOINT}/publish", done=(409,))


def unpublish_checkpoint(transport: Sender, run_id: str, checkpoint_id: str) -> None:
    """``DELETE .../publish``."""
    path = f"{checkpoint_route(run_id, checkpoint_id)}/publish"
    _change(transport, "DELETE", path, f"{_CHECKPOINT}/publish", done=(409,))


def set_checkpoint_ttl(
    transport: Sender, run_id: str, checkpoint_id: str, ttl_seconds: Optional[int]
) -> None:
    """``PUT .../ttl``; None removes the limit."""
    path = f"{checkpoint_route(run_id, checkpoint_id)}/ttl"
    _change(transport, "PUT", path, f"{_CHECKPOINT}/ttl", {"ttl_seconds": ttl_seconds})


def get_external_weights_urls(
    transport: Sender, run_id: str, checkpoint_id: str
) -> types.ExternalWeightsUrlsResponse:
    """``GET .../external_weights_urls``; only for ``external_weights/<name>``."""
    path = f"{checkpoint_route(run_id, checkpoint_id)}/external_weights_urls"
    with optional_route(transport, f"GET {_CHECKPOINT}/external_weights_urls"):
        return get(transport, path, types.ExternalWeightsUrlsResponse)


def get_weights_info(transport: Sender, tinker_path: str) -> types.WeightsInfoResponse:
    """``POST weights_info``."""
    body = {"tinker_path": tinker_path}
    with optional_route(transport, "POST weights_info"):
        return post(transport, f"{_API}weights_info", body, types.WeightsInfoResponse)


def copy_weights(
    transport: Sender,
    *,
    source_path: str,
    destination_project_id: Optional[str] = None,
    ttl_seconds: Optional[int] = None,
    weights_access_token: Optional[str] = None,
) -> types.CopyWeightsResponse:
    """``POST copy_weights``; all attempts have one idempotency key, so the server copies once."""
    fields = {
        "source_path": source_path,
        "destination_project_id": destination_project_id,
        "ttl_seconds": ttl_seconds,
    }
    body = {name: value for name, value in fields.items() if value is not None}
    token = weights_access_token
    request = Request(
        "POST",
        f"{_API}copy_weights",
        encode(body),
        headers={_TOKEN_HEADER: token} if token else {},
        secrets=(token,) if token else (),
    )
    with optional_route(transport, "POST copy_weights"):
        policy = RetryPolicy(max_elapsed_s=transport.config.max_outage_s)
        return read(types.CopyWeightsResponse, transport.send(request, policy), request.name)


def list_sessions(
    transport: Sender, *, limit: int, offset: int, access_scope: str
) -> types.ListSessionsResponse:
    """``GET sessions``."""
    query = {"limit": limit, "offset": offset, "access_scope": access_scope}
    return _list(transport, "sessions", types.ListSessionsResponse, query)


def get_session(
    transport: Sender, session_id: str, *, access_scope: str
) -> types.GetSessionResponse:
    """``GET sessions/{id}``."""
    with optional_route(transport, "GET sessions/{id}"):
        query = {"access_scope": access_scope}
        return get(transport, _session(session_id), types.GetSessionResponse, query)


def assign_session_project(transport: Sender, session_id: str, project_id: str) -> None:
    """``PUT sessions/{id}/project``."""
    path = f"{_session(session_id)}/project"
    _change(transport, "PUT", path, "sessions/{id}/project", {"project_id": project_id})


def get_trace_export(transport: Sender, session_id: str) -> types.SessionTraceExport:
    """``GET sessions/{id}/trace_export``: starts the export, then reports its progress."""
    with optional_route(transport, "GET sessions/{id}/trace_export"):
        return get(transport, f"{_session(session_id)}/trace_export", types.SessionTraceExport)


def search_sessions(
    transport: Sender, request: types.SessionSearchRequest
) -> types.SessionSearchResponse:
    """``POST sessions/search``."""
    body: Dict[str, Any] = {
        "user_metadata": dict(request.user_metadata),
        "owner": _plain(request.owner),
    }
    if request.session_id is not None:
        body["session_id"] = request.session_id
    if request.project_ids is not None:
        body["project_ids"] = list(request.project_ids)
    if request.display_name is not None:
        body["display_name"] = request.display_name
    if request.statuses is not None:
        body["statuses"] = [_plain(status) for status in request.statuses]
    # Don't send defaults: some servers reject unknown fields.
    if request.limit != types.SessionSearchRequest.limit:
        body["limit"] = request.limit
    if request.cursor is not None:
        body["cursor"] = request.cursor.to_wire()
    with optional_route(transport, "POST sessions/search", names_nothing=True):
        return post(transport, f"{_API}sessions/search", body, types.SessionSearchResponse)


def _plain(value: Union[Wire, Mapping[str, Any]]) -> Dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else value.to_wire()


# ---- Administration ----


def get_audit_log(
    transport: Sender, *, event_type: str, day: Optional[date]
) -> types.AuditLogResponse:
    """``GET audit``; the server may redirect to another host, which gets no credentials."""
    query = {"event_type": event_type, "day": None if day is None else day.isoformat()}
    return _list(transport, "audit", types.AuditLogResponse, query)


def get_billing_usage(
    transport: Sender, *, starting_on: datetime, ending_before: datetime
) -> types.BillingUsageResponse:
    """``GET billing/usage/events``; the times are whole hours."""
    query = {"starting_on": _rfc3339(starting_on), "ending_before": _rfc3339(ending_before)}
    return _list(transport, "billing/usage/events", types.BillingUsageResponse, query)


def get_current_checkpoint_storage_usage(
    transport: Sender, *, project_id: Optional[str]
) -> types.CurrentCheckpointStorageUsageResponse:
    """``GET billing/usage/checkpoints/current``."""
    route = "billing/usage/checkpoints/current"
    query = {"project_id": project_id}
    return _list(transport, route, types.CurrentCheckpointStorageUsageResponse, query)


def _rfc3339(instant: datetime) -> str:
    return instant.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
