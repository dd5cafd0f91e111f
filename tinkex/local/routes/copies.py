"""Copies of checkpoints, each a training run of its own (docs/protocol.md, "Copies")."""

from __future__ import annotations

import uuid
from typing import Optional

from tinkex.local.backend import Backend
from tinkex.local.state.rows import CheckpointRow


def copy_checkpoint(
    backend: Backend,
    source: CheckpointRow,
    *,
    project_id: Optional[str],
    ttl_s: Optional[float],
    idempotency_key: Optional[str],
) -> str:
    """Copy a checkpoint into a run of its own, and return the path of the copy.

    The same *idempotency_key* again stands for the same copy.
    """
    store = backend.store

    def copy() -> str:
        run = backend.need_run(source.run_id)
        copy_id = f"copy-{uuid.uuid4()}"
        store.add_run(
            copy_id, "", run.base_model, run.lora, run.optimizer, run.user_metadata, project_id
        )
        try:
            with store.saving(
                copy_id, source.kind, source.name,
                overwrite=False, ttl_s=ttl_s, user_metadata=source.user_metadata,
            ) as folder:  # fmt: skip
                store.copy_files(source, folder)
        except BaseException:
            store.drop_run(copy_id)
            raise
        return f"tinker://{copy_id}/{source.kind}/{source.name}"

    return backend.once.get(idempotency_key, copy)
