"""Training runs: create, pass, step, save, load, unload (protocol reference, 1.5.2, appendix A).

Each submission is checked, then queued; its answer is a request id to poll for.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Dict, Optional, Tuple

import orjson
from flask import Flask, Response, request

from tinkex.errors import InvalidInputError
from tinkex.local.backend import Backend, session_of
from tinkex.local.checks import check_checkpoint_name, check_optimizer, check_pass
from tinkex.local.engine import EngineError
from tinkex.local.http import (
    answer,
    as_problem,
    digest,
    digest_without,
    json_body,
    need,
    need_seq_id,
    optional,
    raw_body,
    read_wire,
    ttl_seconds,
)
from tinkex.local.lanes import Job
from tinkex.local.problems import Problem
from tinkex.local.store import CheckpointRow
from tinkex.types import AdamParams, ForwardBackwardRequest, GetInfoResponse, LoraConfig, ModelData
from tinkex.wire.codec import PROTOBUF_CONTENT_TYPE
from tinkex.wire.codecs import codec_for

_ADAMW = {"type": "adamw"}

#: Checks a submission and returns the work to do on the engine thread.
Prepare = Callable[[], Callable[[], object]]


def register(app: Flask, backend: Backend) -> None:
    """Add the routes to *app*."""
    _register_runs(app, backend)
    _register_passes(app, backend)
    _register_saves(app, backend)


def _queue(
    backend: Backend, model_id: str, seq_id: int, body_digest: bytes, prepare: Prepare
) -> Response:
    """Queue what *prepare* returns at *seq_id*, unless the same was submitted before.

    A request that *prepare* rejects uses its number up, so that the run can go on.
    """
    backend.check_model(model_id)
    if seq_id < 1:
        raise Problem(400, f"seq_id is {seq_id}; the requests of a run are numbered from 1")
    request_id = backend.scheduler.find(model_id, seq_id, body_digest)
    if request_id is None:
        try:
            work = prepare()
        except Problem:
            backend.scheduler.submit(model_id, seq_id, body_digest, None)
            raise
        job = Job(f"{model_id}:{seq_id}", work)
        request_id = backend.scheduler.submit(model_id, seq_id, body_digest, job)
    return answer({"request_id": request_id, "model_id": model_id})


def _register_runs(app: Flask, backend: Backend) -> None:
    @app.post("/api/v1/create_model")
    def create_model() -> Response:
        body, raw = json_body()
        model_id = _new_model_id(backend, body)
        base_model = backend.check_base_model(need(body, "base_model", str))
        lora = read_wire(LoraConfig, optional(body, "lora_config", dict) or {}, "lora_config")
        try:
            lora.check()
        except InvalidInputError as error:
            raise as_problem(error) from error
        check_optimizer(optional(body, "optimizer_config", dict))

        def make() -> Job:
            metadata = optional(body, "user_metadata", dict)
            backend.store.add_run(
                model_id, session_of(model_id), base_model, lora, _ADAMW, metadata
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

        return _queue(backend, model_id, need_seq_id(body), digest(raw), prepare)

    @app.post("/api/v1/unload_model")
    def unload_model() -> Response:
        body, _ = json_body()
        model_id = need(body, "model_id", str)
        backend.check_model(model_id)
        request_id = f"{model_id}:unload"
        backend.scheduler.unload_model(model_id, request_id)
        return answer({"request_id": request_id, "model_id": model_id})

    @app.post("/api/v1/get_info")
    def get_info() -> Response:
        body, _ = json_body()
        model_id = need(body, "model_id", str)
        run = backend.store.run(model_id)
        if run is None:
            raise Problem(404, f"model {model_id} is unknown; create_model returns the id")
        info = backend.info
        found = GetInfoResponse(
            model_id=model_id,
            model_data=ModelData(info.arch, run.base_model, info.tokenizer_id),
            is_lora=True,
            lora_rank=run.lora.rank,
            model_name=run.base_model,
            optimizer_config=run.optimizer,
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
    engine = backend.engine

    def make() -> Job:
        source = backend.store.run(checkpoint.run_id)
        lora = LoraConfig() if source is None else source.lora
        metadata = optional(body, "user_metadata", dict)
        backend.store.add_run(
            model_id, session_of(model_id), backend.info.model_name, lora, _ADAMW, metadata
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
        raise Problem(
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


def _register_passes(app: Flask, backend: Backend) -> None:
    @app.post("/api/v1/forward_backward")
    def forward_backward() -> Response:
        return _submit_pass(backend, raw_body(), only_forward=False)

    @app.post("/api/v1/forward")
    def forward() -> Response:
        return _submit_pass(backend, raw_body(), only_forward=True)

    @app.post("/api/v1/optim_step")
    def optim_step() -> Response:
        body, raw = json_body()
        model_id = need(body, "model_id", str)

        def prepare() -> Callable[[], object]:
            if body.get("adam_params") is None and body.get("optimizer_params") is not None:
                raise Problem(400, "optimizer_params are not offered here; send adam_params")
            params = read_wire(AdamParams, need(body, "adam_params", dict), "adam_params")
            try:
                params.check()
            except InvalidInputError as error:
                raise as_problem(error) from error
            return lambda: {"metrics": backend.engine.optim_step(model_id, params)}

        return _queue(backend, model_id, need_seq_id(body), digest(raw), prepare)


def _submit_pass(backend: Backend, raw: bytes, *, only_forward: bool) -> Response:
    codec = codec_for(request.content_type or "")
    try:
        asked = codec.decode_forward_backward(raw)
    except InvalidInputError as error:
        _use_number_up(backend, raw, codec.content_type)
        raise as_problem(error) from error
    if only_forward:
        asked = dataclasses.replace(asked, forward_only=True)

    def prepare() -> Callable[[], object]:
        check_pass(backend.info, asked.loss_fn, asked.data)
        return lambda: _run_pass(backend, asked)

    return _queue(backend, asked.model_id, asked.seq_id, digest(raw), prepare)


def _run_pass(backend: Backend, asked: ForwardBackwardRequest) -> object:
    return backend.engine.forward_backward(
        asked.model_id,
        asked.data,
        asked.loss_fn,
        asked.loss_fn_config,
        forward_only=asked.forward_only,
    )


def _use_number_up(backend: Backend, raw: bytes, content_type: str) -> None:
    """Find out whose body this was meant to be, and let that run go on without it."""
    if content_type == PROTOBUF_CONTENT_TYPE:
        from google.protobuf.message import DecodeError

        from tinkex.wire import tinker_public_pb2 as pb

        message = pb.ForwardBackwardRequest()
        try:
            message.ParseFromString(raw)
        except DecodeError:
            return
        model_id: Any = message.model_id
        seq_id: Any = message.seq_id
    else:
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError:
            return
        if not isinstance(body, dict):
            return
        model_id, seq_id = body.get("model_id"), body.get("seq_id")
    if isinstance(model_id, str) and isinstance(seq_id, int) and seq_id > 0:
        backend.check_model(model_id)
        backend.scheduler.submit(model_id, seq_id, digest(raw), None)


def _register_saves(app: Flask, backend: Backend) -> None:
    @app.post("/api/v1/save_weights")
    def save_weights() -> Response:
        body, raw = json_body()
        return _submit_named_save(backend, body, digest(raw), "weights")

    @app.post("/api/v1/save_weights_for_sampler")
    def save_weights_for_sampler() -> Response:
        body, raw = json_body()
        if body.get("path") is not None:
            return _submit_named_save(backend, body, digest(raw), "sampler_weights")
        return _submit_ephemeral_save(backend, body)


def _submit_named_save(
    backend: Backend, body: Dict[str, Any], body_digest: bytes, kind: str
) -> Response:
    model_id = need(body, "model_id", str)

    def prepare() -> Callable[[], object]:
        name = check_checkpoint_name(need(body, "path", str))
        overwrite = bool(optional(body, "overwrite", bool))
        ttl_s = ttl_seconds(body)
        metadata: Optional[Dict[str, Any]] = optional(body, "user_metadata", dict)
        backend.store.check_name_free(model_id, kind, name, overwrite)

        def save() -> object:
            saving = backend.store.saving(
                model_id, kind, name, overwrite=overwrite, ttl_s=ttl_s, user_metadata=metadata
            )
            with saving as folder:
                backend.engine.save(model_id, folder, with_optimizer=kind == "weights")
            path = f"tinker://{model_id}/{kind}/{name}"
            return {"path": path, "type": body.get("type") or "save_weights"}

        return save

    return _queue(backend, model_id, need_seq_id(body), body_digest, prepare)


def _submit_ephemeral_save(backend: Backend, body: Dict[str, Any]) -> Response:
    """Freeze the weights for a sampler of the session, without a checkpoint."""
    model_id = need(body, "model_id", str)
    # The official client takes a new sampler number for every retry of the same seq_id.
    body_digest = digest_without(body, "sampling_session_seq_id")

    def prepare() -> Callable[[], object]:
        if body.get("kind", "snapshot") != "snapshot":
            raise Problem(
                400, f"kind {body['kind']!r} is not offered here; this server has snapshot"
            )
        number = need_seq_id(body, "sampling_session_seq_id")
        sampler_id = f"{session_of(model_id)}:sample:{number}"

        def save() -> object:
            def weights() -> Any:
                folder = backend.store.new_sampler_folder()
                backend.engine.save(model_id, folder, with_optimizer=False)
                return folder

            backend.create_sampler(sampler_id, body_digest, None, weights)
            return {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}

        return save

    return _queue(backend, model_id, need_seq_id(body), body_digest, prepare)
