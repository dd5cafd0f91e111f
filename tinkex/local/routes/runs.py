"""Training runs: create, load weights, unload, describe (docs/protocol.md, "Training runs").

Each submission is checked, then queued; the response is a request id to poll for.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from tinkex.local.backend import session_of
from tinkex.local.engines.engine import EngineError
from tinkex.local.fields import metadata, optional, read_wire, required, required_seq_id
from tinkex.local.http.messages import JsonBody
from tinkex.local.routes.base import Result, Routes, route
from tinkex.local.scheduling.checks import check_lora, check_optimizer
from tinkex.local.scheduling.lanes import Job, Work
from tinkex.local.state.rows import CheckpointRow
from tinkex.types import GetInfoResponse, LoraConfig, ModelData

_ADAMW = {"type": "adamw"}


class RunRoutes(Routes):
    """Views of training runs."""

    @route("POST", "create_model")
    def create(self, body: JsonBody) -> Result:
        """Queue the creation of a run with a fresh adapter."""
        model_id = self._new_model_id(body)
        self._backend.catalog.check_base_model(required(body, "base_model", str))
        lora = read_wire(LoraConfig, optional(body, "lora_config", dict) or {}, "lora_config")
        check_lora(lora)
        check_optimizer(optional(body, "optimizer_config", dict))
        create = functools.partial(self._create_fresh, model_id, lora)
        return self._create_run(model_id, body, lora, create)

    @route("POST", "load_weights")
    def load_weights(self, body: JsonBody) -> Result:
        """Queue the loading of a checkpoint, into an existing run or into a new one."""
        if body.get("model_id") is None:
            return self._load_into_new_run(body)
        return self._submit(body, self._prepare_load)

    @route("POST", "unload_model")
    def unload(self, body: JsonBody) -> Result:
        """Queue the end of a run."""
        model_id = required(body, "model_id", str)
        request_id = f"{model_id}:unload"
        if self._backend.futures.wait(request_id, 0.0) is None:  # not requested before
            self._backend.check_model(model_id)
            self._backend.scheduler.unload_model(model_id, request_id)
        return {"request_id": request_id, "model_id": model_id}

    @route("POST", "get_info")
    def describe(self, body: JsonBody) -> Result:
        """Describe what a run trains."""
        model_id = required(body, "model_id", str)
        run = self._backend.catalog.get_model(model_id)
        info = self._backend.info
        found = GetInfoResponse(
            model_id=model_id,
            model_data=ModelData(info.arch, run.base_model, info.tokenizer_id),
            is_lora=True,
            lora_rank=run.lora.rank,
            model_name=run.base_model,
            optimizer_config=run.optimizer,
            adapted_modules=self._backend.engine.adapted(run.lora) or None,
        )
        return {**found.to_wire(), "type": "get_info"}

    # New runs

    def _new_model_id(self, body: Dict[str, Any]) -> str:
        session_id = required(body, "session_id", str)
        self._backend.check_session(session_id)
        return f"{session_id}:train:{required_seq_id(body, 'model_seq_id')}"

    def _create_run(self, model_id: str, body: JsonBody, lora: LoraConfig, create: Work) -> Result:
        """Queue *create* as request 0 of a new run."""
        # A function, which the backend does not call for a repetition.
        add = functools.partial(
            self._backend.store.add_run,
            model_id,
            session_of(model_id),
            self._backend.info.model_name,
            lora,
            _ADAMW,
            metadata(body),
        )
        # Number 0 is the request that creates the run (docs/protocol.md, "Sequence numbers").
        job = Job(f"{model_id}:0", create, creates=True)
        request_id = self._backend.create_run(model_id, body.digest, job, add)
        return {"request_id": request_id, "model_id": model_id}

    def _create_fresh(self, model_id: str, lora: LoraConfig) -> object:
        try:
            self._backend.engine.create(model_id, lora)
        except Exception:
            # The run's row was added when the request was queued, but it has no model now.
            self._backend.store.drop_run(model_id)
            raise
        return {"model_id": model_id, "type": "create_model"}

    def _load_into_new_run(self, body: JsonBody) -> Result:
        """Make a run from a checkpoint: form 1 of load_weights."""
        model_id = self._new_model_id(body)
        checkpoint, with_optimizer = self._checkpoint_to_load(body)
        if body.get("base_model") is not None:
            self._backend.catalog.check_base_model(required(body, "base_model", str))
        check_optimizer(optional(body, "optimizer_config", dict))
        source = self._backend.store.run(checkpoint.run_id)
        return self._create_run(
            model_id,
            body,
            LoraConfig() if source is None else source.lora,
            functools.partial(self._create_from, model_id, checkpoint, with_optimizer),
        )

    def _create_from(
        self, model_id: str, checkpoint: CheckpointRow, with_optimizer: bool
    ) -> object:
        engine = self._backend.engine
        try:
            folder = self._folder(checkpoint)
            # The configuration comes from the files: another checkpoint may have been saved under
            # the name since the request was queued.
            engine.create(model_id, engine.lora_config(folder))
            engine.load(model_id, folder, with_optimizer=with_optimizer)
        except Exception:
            engine.unload(model_id)
            self._backend.store.drop_run(model_id)
            raise
        return _loaded(checkpoint, model_id)

    # Loading

    def _prepare_load(self, model_id: str, body: JsonBody) -> Work:
        checkpoint, with_optimizer = self._checkpoint_to_load(body)
        return functools.partial(self._load, model_id, checkpoint, with_optimizer)

    def _load(self, model_id: str, checkpoint: CheckpointRow, with_optimizer: bool) -> object:
        folder = self._folder(checkpoint)
        self._backend.engine.load(model_id, folder, with_optimizer=with_optimizer)
        return _loaded(checkpoint, model_id)

    def _checkpoint_to_load(self, body: Dict[str, Any]) -> Tuple[CheckpointRow, bool]:
        with_optimizer = bool(optional(body, "optimizer", bool))
        # Only training checkpoints hold the state of the optimizer.
        kind: Optional[str] = "weights" if with_optimizer else None
        path = required(body, "path", str)
        return self._backend.catalog.loadable_at(path, kind=kind), with_optimizer

    def _folder(self, checkpoint: CheckpointRow) -> Path:
        """Return the current folder of a checkpoint, which may have been replaced since.

        EngineError if it has been deleted.
        """
        store = self._backend.store
        current = store.checkpoints.find(checkpoint.run_id, checkpoint.kind, checkpoint.name)
        if current is None:
            raise EngineError(
                f"checkpoint {checkpoint.tinker_path} was deleted before it was loaded"
            )
        return store.checkpoints.folder_of(current)


def _loaded(checkpoint: CheckpointRow, model_id: str) -> Dict[str, str]:
    return {"path": checkpoint.tinker_path, "model_id": model_id, "type": "load_weights"}
