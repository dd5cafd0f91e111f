"""Runs and checkpoints: list, look at, delete, publish (protocol reference, section 1.5.5)."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Optional

from flask import Flask, Response

from tinkex.local.backend import Backend
from tinkex.local.http import answer, json_body, need, page, ttl_seconds
from tinkex.local.problems import Problem
from tinkex.local.store import CheckpointRow, RunRow
from tinkex.types import (
    Checkpoint,
    CheckpointsListResponse,
    Cursor,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from tinkex.types.checkpoint_path import KINDS

_CHECKPOINT = "/api/v1/training_runs/<run_id>/checkpoints/<kind>/<name>"


def register(app: Flask, backend: Backend) -> None:
    """Add the routes to *app*."""
    _register_lists(app, backend)
    _register_changes(app, backend)


def _register_lists(app: Flask, backend: Backend) -> None:
    @app.get("/api/v1/training_runs")
    def list_runs() -> Response:
        limit, offset = page(20)
        rows, total = backend.store.runs(limit, offset)
        runs = [_run(backend, row) for row in rows]
        return answer(TrainingRunsResponse(runs, Cursor(offset, limit, total)).to_wire())

    @app.get("/api/v1/training_runs/<run_id>")
    def get_run(run_id: str) -> Response:
        return answer(_run(backend, _need_run(backend, run_id)).to_wire())

    @app.get("/api/v1/training_runs/<run_id>/checkpoints")
    def list_checkpoints_of(run_id: str) -> Response:
        _need_run(backend, run_id)
        rows = backend.store.checkpoints_of(run_id)
        return answer(CheckpointsListResponse([_checkpoint(row) for row in rows]).to_wire())

    @app.get("/api/v1/checkpoints")
    def list_checkpoints() -> Response:
        limit, offset = page(100)
        rows, total = backend.store.checkpoints(limit, offset)
        found = [_checkpoint(row) for row in rows]
        return answer(CheckpointsListResponse(found, Cursor(offset, limit, total)).to_wire())

    @app.post("/api/v1/weights_info")
    def weights_info() -> Response:
        body, _ = json_body()
        checkpoint = backend.checkpoint_at(need(body, "tinker_path", str))
        run = _need_run(backend, checkpoint.run_id)
        lora = run.lora
        found = WeightsInfoResponse(
            base_model=run.base_model,
            is_lora=True,
            lora_rank=lora.rank,
            train_unembed=lora.train_unembed,
            train_mlp=lora.train_mlp,
            train_attn=lora.train_attn,
            optimizer_config=run.optimizer,
        )
        return answer(found.to_wire())


def _register_changes(app: Flask, backend: Backend) -> None:
    @app.delete(_CHECKPOINT)
    def delete_checkpoint(run_id: str, kind: str, name: str) -> Response:
        backend.store.delete_checkpoint(_need_checkpoint(backend, run_id, kind, name))
        return answer({})

    @app.post(f"{_CHECKPOINT}/publish")
    def publish(run_id: str, kind: str, name: str) -> Response:
        return _set_public(backend, _need_checkpoint(backend, run_id, kind, name), True)

    @app.delete(f"{_CHECKPOINT}/publish")
    def unpublish(run_id: str, kind: str, name: str) -> Response:
        return _set_public(backend, _need_checkpoint(backend, run_id, kind, name), False)

    @app.put(f"{_CHECKPOINT}/ttl")
    def set_ttl(run_id: str, kind: str, name: str) -> Response:
        body, _ = json_body()
        ttl_s = ttl_seconds(body)
        backend.store.set_ttl(_need_checkpoint(backend, run_id, kind, name), ttl_s)
        return answer({})


def _set_public(backend: Backend, checkpoint: CheckpointRow, public: bool) -> Response:
    if checkpoint.public is public:
        state = "public" if public else "private"
        raise Problem(409, f"{checkpoint.tinker_path} is {state} already")
    backend.store.set_public(checkpoint, public)
    return answer({})


def _need_run(backend: Backend, run_id: str) -> RunRow:
    row = backend.store.run(run_id)
    if row is None:
        raise Problem(404, f"training run {run_id} is unknown")
    return row


def _need_checkpoint(backend: Backend, run_id: str, kind: str, name: str) -> CheckpointRow:
    if kind not in KINDS:
        raise Problem(
            400, f"{kind}/{name} is not a checkpoint id; it must begin with one of {list(KINDS)}"
        )
    return backend.checkpoint(run_id, kind, name)


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
    checkpoints = backend.store.checkpoints_of(row.run_id)

    def last(kind: str) -> Optional[Checkpoint]:
        return next((_checkpoint(found) for found in checkpoints if found.kind == kind), None)

    return TrainingRun(
        training_run_id=row.run_id,
        base_model=row.base_model,
        model_owner="local",
        is_lora=True,
        last_request_time=_instant(row.last_request_at),
        lora_rank=row.lora.rank,
        last_checkpoint=last("weights"),
        last_sampler_checkpoint=last("sampler_weights"),
        user_metadata=row.user_metadata,
    )
