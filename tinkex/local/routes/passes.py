"""Passes over batches, and optimizer steps (docs/protocol.md, "Passes", "Optimizer steps")."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Dict

import orjson
from flask import Flask, Response, request

from tinkex.errors import InvalidInputError
from tinkex.local.backend import Backend, session_of
from tinkex.local.errors import HTTPError
from tinkex.local.fields import as_problem, need, need_seq_id, read_wire
from tinkex.local.http.messages import digest, json_body, raw_body
from tinkex.local.json_text import check_levels
from tinkex.local.losses.custom_passes import run_custom_pass
from tinkex.local.routes.submission import submit
from tinkex.local.scheduling.checks import check_pass
from tinkex.types import AdamParams, ForwardBackwardRequest
from tinkex.wire.codec import JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE, codec_for


def register(app: Flask, backend: Backend) -> None:
    """Add the routes to *app*."""

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
            params = read_wire(AdamParams, _adam_params(body), "adam_params")
            try:
                params.check()
            except InvalidInputError as error:
                raise as_problem(error) from error
            return lambda: {"metrics": backend.engine.optim_step(model_id, params)}

        return submit(backend, model_id, need_seq_id(body), digest(raw), prepare)


def _adam_params(body: Dict[str, Any]) -> Dict[str, Any]:
    """Return the parameters of the step: under their old name, or as those of a family."""
    if body.get("optimizer_params") is None:
        return need(body, "adam_params", dict)
    if body.get("adam_params") is not None:
        raise HTTPError(400, "both adam_params and optimizer_params are given; send one of them")
    params = need(body, "optimizer_params", dict)
    family = params.get("type", "adamw")
    if family != "adamw":
        raise HTTPError(
            400, f"optimizer_params are of the family {family!r}; runs of this server have adamw"
        )
    return {name: value for name, value in params.items() if name != "type"}


def _submit_pass(backend: Backend, raw: bytes, *, only_forward: bool) -> Response:
    codec = codec_for(request.content_type or "")
    try:
        if codec.content_type == JSON_CONTENT_TYPE:
            check_levels(raw)
        asked = codec.decode_forward_backward(raw)
    except InvalidInputError as error:
        _use_number_up(backend, raw, codec.content_type)
        raise as_problem(error) from error
    except HTTPError:
        _use_number_up(backend, raw, codec.content_type)
        raise
    if only_forward:
        asked = dataclasses.replace(asked, forward_only=True)

    def prepare() -> Callable[[], object]:
        if asked.loss_fn == "custom" and backend.settings.flags.custom_loss_server_side:
            return _prepare_custom(backend, asked)
        check_pass(backend.info, asked.loss_fn, asked.data)
        return lambda: _run_pass(backend, asked)

    return submit(backend, asked.model_id, asked.seq_id, digest(raw), prepare)


def _prepare_custom(backend: Backend, asked: ForwardBackwardRequest) -> Callable[[], object]:
    loss_id = asked.loss_fn_config.get("loss_id")
    program = backend.losses.find(loss_id)
    if program is None or session_of(str(loss_id)) != session_of(asked.model_id):
        raise HTTPError(
            400,
            f"loss_id {loss_id!r:.100} is no custom loss of this session; create_custom_loss "
            "returns the id",
        )
    check_pass(backend.info, "cross_entropy", asked.data)
    for index, datum in enumerate(asked.data):
        for name in ("target_tokens", *(name for name, _ in program.inputs[1:])):
            if name not in datum.loss_fn_inputs:
                raise HTTPError(
                    400, f"datum {index}: the loss {program.name!r:.100} needs the input {name!r}"
                )
    return lambda: run_custom_pass(
        backend.engine, asked.model_id, asked.data, program, forward_only=asked.forward_only
    )


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
