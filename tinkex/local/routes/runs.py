"""Training runs: create, load weights, unload, look at (docs/protocol.md, "Training runs").

Each submission is checked, then queued; its answer is a request id to poll for.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Tuple

from flask import Flask, Response

from tinkex.local.backend import Backend, session_of
from tinkex.local.engines.engine import EngineError
from tinkex.local.errors import HTTPError
from tinkex.local.fields import metadata, need, need_seq_id, optional, read_wire
from tinkex.local.http.messages import answer, digest, json_body
from tinkex.local.routes.submission import submit
from tinkex.local.scheduling.checks import check_lora, check_optimizer
from tinkex.local.scheduling.lanes import Job
from tinkex.local.state.rows import CheckpointRow
from tinkex.types import GetInfoResponse, LoraConfig, ModelData

_ADAMW = {"type": "adamw"}


def register(app: Flask, backend: Backend) -> None:
    """Add the routes to *app*."""

    @app.post("/api/v1/create_model")
    def create_model() -> Response:
        body, raw = json_body()
        model_id = _new_model_id(backend, body)
        base_model = backend.check_base_model(need(body, "base_model", str))
        lora = read_wire(LoraConfig, optional(body, "lora_config", dict) or {}, "lora_config")
        check_lora(lora)
        check_optimizer(optional(body, "optimizer_config", dict))
        user_metadata = metadata(body)

        def make() -> Job:
            backend.store.add_run(
                model_id, session_of(model_id), base_model, lora, _ADAMW, user_metadata
            )
            return Job(f"{model_id}:0", create, creates=True)

        def create() -> object:
            try:
                backend.engine.create(model_id, lora)
            except Exception:
                backend.store.drop_run(model_id)
                raise
            return {"model_id": model_id, "type": "create_model"}

        request_id = backend.create_run(model_id, digest(raw), make)
        return answer({"request_id": request_id, "model_id": model_id})

    @app.post("/api/v1/load_weights")
    def load_weights() -> Response:
        body, raw = json_body()
        if body.get("model_id") is None:
            return _load_into_new_run(backend, body, digest(raw))
        model_id = need(body, "model_id", str)

        def prepare() -> Callable[[], object]:
            checkpoint, with_optimizer = _checkpoint_to_load(backend, body)

            def load() -> object:
                backend.engine.load(
                    model_id, _folder(backend, checkpoint), with_optimizer=with_optimizer
                )
                return _loaded(checkpoint, model_id)

            return load

        return submit(backend, model_id, need_seq_id(body), digest(raw), prepare)

    @app.post("/api/v1/unload_model")
    def unload_model() -> Response:
        body, _ = json_body()
        model_id = need(body, "model_id", str)
        request_id = f"{model_id}:unload"
        if backend.futures.wait(request_id, 0.0) is None:  # else it was asked for before
            backend.check_model(model_id)
            backend.scheduler.unload_model(model_id, request_id)
        return answer({"request_id": request_id, "model_id": model_id})

    @app.post("/api/v1/get_info")
    def get_info() -> Response:
        body, _ = json_body()
        model_id = need(body, "model_id", str)
        run = backend.store.run(model_id)
        if run is None:
            raise HTTPError(404, f"model {model_id} is unknown; create_model returns the id")
        info = backend.info
        found = GetInfoResponse(
            model_id=model_id,
            model_data=ModelData(info.arch, run.base_model, info.tokenizer_id),
            is_lora=True,
            lora_rank=run.lora.rank,
            model_name=run.base_model,
            optimizer_config=run.optimizer,
            adapted_modules=backend.engine.adapted(run.lora) or None,
        )
        return answer({**found.to_wire(), "type": "get_info"})


def _new_model_id(backend: Backend, body: Dict[str, Any]) -> str:
    session_id = need(body, "session_id", str)
    backend.check_session(session_id)
    return f"{session_id}:train:{need_seq_id(body, 'model_seq_id')}"


def _load_into_new_run(backend: Backend, body: Dict[str, Any], body_digest: bytes) -> Response:
    """Make a run from a checkpoint: form 1 of load_weights, request 0 of the new model."""
    model_id = _new_model_id(backend, body)
    checkpoint, with_optimizer = _checkpoint_to_load(backend, body)
    if body.get("base_model") is not None:
        backend.check_base_model(need(body, "base_model", str))
    check_optimizer(optional(body, "optimizer_config", dict))
    user_metadata = metadata(body)
    engine = backend.engine

    def make() -> Job:
        source = backend.store.run(checkpoint.run_id)
        lora = LoraConfig() if source is None else source.lora
        backend.store.add_run(
            model_id, session_of(model_id), backend.info.model_name, lora, _ADAMW, user_metadata
        )
        return Job(f"{model_id}:0", create, creates=True)

    def create() -> object:
        try:
            folder = _folder(backend, checkpoint)
            engine.create(model_id, engine.lora_config(folder))
            engine.load(model_id, folder, with_optimizer=with_optimizer)
        except Exception:
            engine.unload(model_id)
            backend.store.drop_run(model_id)
            raise
        return _loaded(checkpoint, model_id)

    request_id = backend.create_run(model_id, body_digest, make)
    return answer({"request_id": request_id, "model_id": model_id})


def _checkpoint_to_load(backend: Backend, body: Dict[str, Any]) -> Tuple[CheckpointRow, bool]:
    with_optimizer = bool(optional(body, "optimizer", bool))
    kind = "weights" if with_optimizer else None  # only training checkpoints hold the optimizer
    checkpoint = backend.checkpoint_at(need(body, "path", str), kind=kind)
    run = backend.store.run(checkpoint.run_id)
    if run is not None and run.base_model != backend.info.model_name:
        raise HTTPError(
            400,
            f"{checkpoint.tinker_path} was trained from {run.base_model}; this server has "
            f"{backend.info.model_name}",
        )
    return checkpoint, with_optimizer


def _loaded(checkpoint: CheckpointRow, model_id: str) -> Dict[str, str]:
    return {"path": checkpoint.tinker_path, "model_id": model_id, "type": "load_weights"}


def _folder(backend: Backend, checkpoint: CheckpointRow) -> Any:
    """Return the folder of a checkpoint that may have been replaced or deleted since."""
    current = backend.store.checkpoint(checkpoint.run_id, checkpoint.kind, checkpoint.name)
    if current is None:
        raise EngineError(f"checkpoint {checkpoint.tinker_path} was deleted before it was loaded")
    return backend.store.folder_of(current)
