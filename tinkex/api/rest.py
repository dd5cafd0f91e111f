"""Runs, checkpoints and sessions (protocol reference, section 1.5.5)."""

from __future__ import annotations

from typing import Optional

from tinkex.api._call import call, get, post, segment
from tinkex.transport import Transport
from tinkex.types import (
    CheckpointsListResponse,
    GetSessionResponse,
    ListSessionsResponse,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)

_RUNS = "/api/v1/training_runs"


def _run(run_id: str) -> str:
    return f"{_RUNS}/{segment('the training run id', run_id)}"


def _checkpoint(run_id: str, checkpoint_id: str) -> str:
    """The route of a checkpoint; its id is ``<kind>/<name>``, and the slash is not escaped."""
    parts = [segment("the checkpoint id", part) for part in checkpoint_id.split("/")]
    return f"{_run(run_id)}/checkpoints/{'/'.join(parts)}"


def list_training_runs(
    transport: Transport, *, limit: int, offset: int, access_scope: str, project_id: Optional[str]
) -> TrainingRunsResponse:
    """``GET training_runs``."""
    query = {
        "limit": limit,
        "offset": offset,
        "access_scope": access_scope,
        "project_id": project_id,
    }
    return get(transport, _RUNS, TrainingRunsResponse, query)


def get_training_run(transport: Transport, run_id: str, *, access_scope: str) -> TrainingRun:
    """``GET training_runs/{id}``."""
    return get(transport, _run(run_id), TrainingRun, {"access_scope": access_scope})


def list_checkpoints(transport: Transport, run_id: str) -> CheckpointsListResponse:
    """``GET training_runs/{id}/checkpoints``."""
    return get(transport, f"{_run(run_id)}/checkpoints", CheckpointsListResponse)


def list_user_checkpoints(
    transport: Transport, *, limit: int, offset: int
) -> CheckpointsListResponse:
    """``GET checkpoints``."""
    query = {"limit": limit, "offset": offset}
    return get(transport, "/api/v1/checkpoints", CheckpointsListResponse, query)


def delete_checkpoint(transport: Transport, run_id: str, checkpoint_id: str) -> None:
    """``DELETE training_runs/{id}/checkpoints/{checkpoint}``."""
    call(transport, "DELETE", _checkpoint(run_id, checkpoint_id))


def publish_checkpoint(transport: Transport, run_id: str, checkpoint_id: str) -> None:
    """``POST .../publish``."""
    call(transport, "POST", f"{_checkpoint(run_id, checkpoint_id)}/publish")


def unpublish_checkpoint(transport: Transport, run_id: str, checkpoint_id: str) -> None:
    """``DELETE .../publish``."""
    call(transport, "DELETE", f"{_checkpoint(run_id, checkpoint_id)}/publish")


def set_checkpoint_ttl(
    transport: Transport, run_id: str, checkpoint_id: str, ttl_seconds: Optional[int]
) -> None:
    """``PUT .../ttl``; None removes the limit."""
    path = f"{_checkpoint(run_id, checkpoint_id)}/ttl"
    call(transport, "PUT", path, {"ttl_seconds": ttl_seconds})


def get_weights_info(transport: Transport, tinker_path: str) -> WeightsInfoResponse:
    """``POST weights_info``."""
    body = {"tinker_path": tinker_path}
    return post(transport, "/api/v1/weights_info", body, WeightsInfoResponse)


def list_sessions(
    transport: Transport, *, limit: int, offset: int, access_scope: str
) -> ListSessionsResponse:
    """``GET sessions``."""
    query = {"limit": limit, "offset": offset, "access_scope": access_scope}
    return get(transport, "/api/v1/sessions", ListSessionsResponse, query)


def get_session(transport: Transport, session_id: str, *, access_scope: str) -> GetSessionResponse:
    """``GET sessions/{id}``."""
    path = f"/api/v1/sessions/{segment('the session id', session_id)}"
    return get(transport, path, GetSessionResponse, {"access_scope": access_scope})
