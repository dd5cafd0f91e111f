"""Checkpoints: what is in them, copy, delete, publish, expire (docs/protocol.md, "Checkpoints")."""

from __future__ import annotations

from flask import Flask, Response

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.fields import need, optional, ttl_seconds
from tinkex.local.http.messages import answer, idempotency_key, json_body
from tinkex.local.routes.copies import copy_checkpoint
from tinkex.local.state.rows import CheckpointRow
from tinkex.types import WeightsInfoResponse
from tinkex.types.checkpoint_path import KINDS

CHECKPOINT = "/api/v1/training_runs/<run_id>/checkpoints/<kind>/<name>"


def register(app: Flask, backend: Backend) -> None:
    """Add the routes to *app*."""
    _register_contents(app, backend)
    _register_changes(app, backend)


def _register_contents(app: Flask, backend: Backend) -> None:
    @app.post("/api/v1/weights_info")
    def weights_info() -> Response:
        body, _ = json_body()
        checkpoint = backend.checkpoint_at(need(body, "tinker_path", str))
        run = backend.need_run(checkpoint.run_id)
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

    @app.post("/api/v1/copy_weights")
    def copy_weights() -> Response:
        body, _ = json_body()
        path = copy_checkpoint(
            backend,
            backend.checkpoint_at(need(body, "source_path", str)),
            project_id=optional(body, "destination_project_id", str),
            ttl_s=ttl_seconds(body),
            idempotency_key=idempotency_key(),
        )
        return answer({"tinker_path": path})


def _register_changes(app: Flask, backend: Backend) -> None:
    @app.delete(CHECKPOINT)
    def delete_checkpoint(run_id: str, kind: str, name: str) -> Response:
        backend.store.delete_checkpoint(need_checkpoint(backend, run_id, kind, name))
        return answer({})

    @app.post(f"{CHECKPOINT}/publish")
    def publish(run_id: str, kind: str, name: str) -> Response:
        return _set_public(backend, need_checkpoint(backend, run_id, kind, name), True)

    @app.delete(f"{CHECKPOINT}/publish")
    def unpublish(run_id: str, kind: str, name: str) -> Response:
        return _set_public(backend, need_checkpoint(backend, run_id, kind, name), False)

    @app.put(f"{CHECKPOINT}/ttl")
    def set_ttl(run_id: str, kind: str, name: str) -> Response:
        body, _ = json_body()
        ttl_s = ttl_seconds(body)
        backend.store.set_ttl(need_checkpoint(backend, run_id, kind, name), ttl_s)
        return answer({})


def _set_public(backend: Backend, checkpoint: CheckpointRow, public: bool) -> Response:
    if checkpoint.public is public:
        state = "public" if public else "private"
        raise HTTPError(409, f"{checkpoint.tinker_path} is {state} already")
    backend.store.set_public(checkpoint, public)
    return answer({})


def need_checkpoint(backend: Backend, run_id: str, kind: str, name: str) -> CheckpointRow:
    """Return a checkpoint; HTTPError 400 or 404 says what is wrong with its address."""
    if kind not in KINDS:
        raise HTTPError(
            400, f"{kind}/{name} is not a checkpoint id; it must begin with one of {list(KINDS)}"
        )
    return backend.checkpoint(run_id, kind, name)
