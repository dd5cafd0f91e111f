"""Runs and checkpoints: list and look at (docs/protocol.md, "REST lists")."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Optional

from flask import Flask, Response, request

from tinkex.local.backend import Backend
from tinkex.local.http.messages import answer, check_scope, page
from tinkex.local.state.rows import CheckpointRow, RunRow
from tinkex.types import (
    Checkpoint,
    CheckpointsListResponse,
    Cursor,
    TrainingRun,
    TrainingRunsResponse,
)
from tinkex.types.checkpoint_path import KINDS


def register(app: Flask, backend: Backend) -> None:
    """Add the routes to *app*."""

    @app.get("/api/v1/training_runs")
    def list_runs() -> Response:
        check_scope()
        limit, offset = page(20)
        rows, total = backend.store.runs(limit, offset, request.args.get("project_id") or None)
        runs = [_run(backend, row) for row in rows]
        return answer(TrainingRunsResponse(runs, Cursor(offset, limit, total)).to_wire())

    @app.get("/api/v1/training_runs/<run_id>")
    def get_run(run_id: str) -> Response:
        check_scope()
        return answer(_run(backend, backend.need_run(run_id)).to_wire())

    @app.get("/api/v1/training_runs/<run_id>/checkpoints")
    def list_checkpoints_of(run_id: str) -> Response:
        backend.need_run(run_id)
        rows = backend.store.checkpoints_of(run_id)
        return answer(CheckpointsListResponse([_checkpoint(row) for row in rows]).to_wire())

    @app.get("/api/v1/checkpoints")
    def list_checkpoints() -> Response:
        limit, offset = page(100)
        rows, total = backend.store.checkpoints(limit, offset)
        found = [_checkpoint(row) for row in rows]
        return answer(CheckpointsListResponse(found, Cursor(offset, limit, total)).to_wire())


def _instant(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _checkpoint(row: CheckpointRow) -> Checkpoint:
    return Checkpoint(
        checkpoint_id=f"{row.kind}/{row.name}",
        checkpoint_type=KINDS[row.kind],
        time=_instant(row.created_at),
        tinker_path=row.tinker_path,
        size_bytes=row.size_bytes,
        public=row.public,
        user_metadata=row.user_metadata,
        expires_at=None if row.expires_at is None else _instant(row.expires_at),
    )


def _run(backend: Backend, row: RunRow) -> TrainingRun:
    def last(kind: str) -> Optional[Checkpoint]:
        found = backend.store.last_checkpoint(row.run_id, kind)
        return None if found is None else _checkpoint(found)

    return TrainingRun(
        training_run_id=row.run_id,
        base_model=row.base_model,
        model_owner=backend.settings.owner_urn,
        is_lora=True,
        last_request_time=_instant(row.last_request_at),
        lora_rank=row.lora.rank,
        last_checkpoint=last("weights"),
        last_sampler_checkpoint=last("sampler_weights"),
        user_metadata=row.user_metadata,
    )
