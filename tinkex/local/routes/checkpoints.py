"""Runs and checkpoints: list, describe, copy, delete, publish, expire (docs/protocol.md)."""

from __future__ import annotations

import functools
import uuid
from datetime import datetime, timezone
from typing import Optional

from flask import request

from tinkex.local.errors import HTTPError
from tinkex.local.fields import optional, required, ttl_seconds
from tinkex.local.http.messages import JsonBody, check_scope, idempotency_key, page
from tinkex.local.routes.base import Result, Routes, route
from tinkex.local.state.rows import CheckpointRow, RunRow
from tinkex.types import (
    Checkpoint,
    CheckpointsListResponse,
    Cursor,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from tinkex.types.checkpoint_path import KINDS

#: Path of a checkpoint.
CHECKPOINT = "training_runs/<run_id>/checkpoints/<kind>/<name>"


class CheckpointRoutes(Routes):
    """Views of runs and checkpoints."""

    # Lists

    @route("GET", "training_runs")
    def list_runs(self) -> Result:
        """List a page of the runs, last used first."""
        check_scope()
        limit, offset = page(20)
        project_id = request.args.get("project_id") or None
        rows, total = self._backend.store.runs(limit, offset, project_id)
        runs = [self._run(row) for row in rows]
        return TrainingRunsResponse(runs, Cursor(offset, limit, total))

    @route("GET", "training_runs/<run_id>")
    def describe_run(self, run_id: str) -> Result:
        """Describe a run."""
        check_scope()
        return self._run(self._backend.catalog.get_run(run_id))

    @route("GET", "training_runs/<run_id>/checkpoints")
    def list_checkpoints_of(self, run_id: str) -> Result:
        """List every checkpoint of a run, newest first."""
        self._backend.catalog.get_run(run_id)
        found = [_as_checkpoint(row) for row in self._backend.store.checkpoints.of_run(run_id)]
        return CheckpointsListResponse(found)

    @route("GET", "checkpoints")
    def list_checkpoints(self) -> Result:
        """List a page of all checkpoints, newest first."""
        limit, offset = page(100)
        rows, total = self._backend.store.checkpoints.page(limit, offset)
        found = [_as_checkpoint(row) for row in rows]
        cursor = Cursor(offset, limit, total)
        return CheckpointsListResponse(found, cursor)

    # One checkpoint

    @route("POST", "weights_info")
    def weights_info(self, body: JsonBody) -> Result:
        """Describe what a checkpoint was trained from, and how."""
        checkpoint = self._backend.catalog.checkpoint_at(required(body, "tinker_path", str))
        run = self._backend.catalog.get_run(checkpoint.run_id)
        return WeightsInfoResponse(
            base_model=run.base_model,
            is_lora=True,
            lora_rank=run.lora.rank,
            train_unembed=run.lora.train_unembed,
            train_mlp=run.lora.train_mlp,
            train_attn=run.lora.train_attn,
            optimizer_config=run.optimizer,
        )

    @route("POST", "copy_weights")
    def copy(self, body: JsonBody) -> Result:
        """Copy a checkpoint into a new run; a repeated idempotency key gets the same copy."""
        copy = functools.partial(
            self._copy,
            self._backend.catalog.checkpoint_at(required(body, "source_path", str)),
            optional(body, "destination_project_id", str),
            ttl_seconds(body),
        )
        # The request has no sequence number, so only its key shows a repetition (docs/protocol.md,
        # "Idempotency keys").
        return {"tinker_path": self._backend.idempotency.get(idempotency_key(), copy)}

    def _copy(
        self, source: CheckpointRow, project_id: Optional[str], ttl_s: Optional[float]
    ) -> str:
        store, run = self._backend.store, self._backend.catalog.get_run(source.run_id)
        copy_id = f"copy-{uuid.uuid4()}"
        # In no session: the run of a copy takes no requests, and only holds the checkpoint.
        store.add_run(
            copy_id, "", run.base_model, run.lora, run.optimizer, run.user_metadata, project_id
        )
        try:
            with store.checkpoints.saving(
                copy_id, source.kind, source.name,
                overwrite=False, ttl_s=ttl_s, user_metadata=source.user_metadata,
            ) as folder:  # fmt: skip
                store.checkpoints.copy_files(source, folder)
        # Otherwise the lists would show a run without the checkpoint that it was made for.
        except BaseException:
            store.drop_run(copy_id)
            raise
        return f"tinker://{copy_id}/{source.kind}/{source.name}"

    @route("DELETE", CHECKPOINT)
    def delete(self, run_id: str, kind: str, name: str) -> Result:
        """Delete a checkpoint."""
        self._backend.store.checkpoints.delete(self._checkpoint(run_id, kind, name))
        return {}

    @route("POST", f"{CHECKPOINT}/publish")
    @route("DELETE", f"{CHECKPOINT}/publish")
    def set_public(self, run_id: str, kind: str, name: str) -> Result:
        """Mark a checkpoint as published, or as private."""
        public = request.method == "POST"
        row = self._checkpoint(run_id, kind, name)
        # docs/protocol.md, "Expiry and publication": this is a conflict, not a success.
        if row.public is public:
            state = "public" if public else "private"
            raise HTTPError(409, f"{row.tinker_path} is {state} already")
        self._backend.store.checkpoints.set_public(row, public)
        return {}

    @route("PUT", f"{CHECKPOINT}/ttl")
    def set_ttl(self, body: JsonBody, run_id: str, kind: str, name: str) -> Result:
        """Set or remove the expiry of a checkpoint."""
        ttl_s = ttl_seconds(body)
        self._backend.store.checkpoints.set_ttl(self._checkpoint(run_id, kind, name), ttl_s)
        return {}

    def _run(self, row: RunRow) -> TrainingRun:
        return TrainingRun(
            training_run_id=row.run_id,
            base_model=row.base_model,
            model_owner=self._backend.settings.owner_urn,
            is_lora=True,
            last_request_time=_instant(row.last_request_at),
            lora_rank=row.lora.rank,
            last_checkpoint=self._last(row.run_id, "weights"),
            last_sampler_checkpoint=self._last(row.run_id, "sampler_weights"),
            user_metadata=row.user_metadata,
        )

    def _last(self, run_id: str, kind: str) -> Optional[Checkpoint]:
        found = self._backend.store.checkpoints.newest(run_id, kind)
        return None if found is None else _as_checkpoint(found)


def _instant(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _as_checkpoint(row: CheckpointRow) -> Checkpoint:
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
