"""Passes over batches, custom losses and optimizer steps (docs/protocol.md, "Passes")."""

from __future__ import annotations

import dataclasses
import functools
import threading
from typing import Any, Callable, Dict, Iterator, Tuple

import orjson
from flask import request

from tinkex.local.backend import Backend, session_of
from tinkex.local.errors import HTTPError, invalid_input_rejected
from tinkex.local.fields import read_wire, required, required_seq_id
from tinkex.local.http.messages import JsonBody, digest, raw_body
from tinkex.local.json_text import check_levels, check_values
from tinkex.local.losses.custom_passes import run_custom_pass
from tinkex.local.losses.evaluation import has_torch
from tinkex.local.losses.program import read_program
from tinkex.local.proto_bounds import check_messages
from tinkex.local.routes.base import Result, Routes, Rule, route
from tinkex.local.scheduling.checks import check_pass
from tinkex.local.scheduling.lanes import Work
from tinkex.local.scheduling.sampling import log_failure
from tinkex.local.settings import ServerSettings
from tinkex.local.state.futures import Success
from tinkex.types import AdamParams, ForwardBackwardOutput, ForwardBackwardRequest
from tinkex.wire.codec import JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE, codec_for

#: A route that is offered only if the server's flags say so.
_CUSTOM_LOSS = "create_custom_loss"


class TrainingRoutes(Routes):
    """Views that compute gradients and apply them."""

    def __init__(self, backend: Backend, settings: ServerSettings) -> None:
        super().__init__(backend, settings)
        # A repetition must not get its response before there is a future to poll for.
        self._creating_loss = threading.Lock()

    def rules(self) -> Iterator[Rule]:
        """See Routes."""
        offered = self._settings.flags.custom_loss_server_side
        return (rule for rule in super().rules() if offered or rule[1] != _CUSTOM_LOSS)

    @route("POST", "forward_backward")
    def forward_backward(self) -> Result:
        """Queue a pass."""
        return self._submit_pass(forward_only=False)

    @route("POST", "forward")
    def forward(self) -> Result:
        """Queue a pass without a gradient."""
        return self._submit_pass(forward_only=True)

    @route("POST", "optim_step")
    def optim_step(self, body: JsonBody) -> Result:
        """Queue a step of the optimizer."""
        return self._submit(body, self._prepare_step)

    @route("POST", _CUSTOM_LOSS)
    def create_custom_loss(self, body: JsonBody) -> Result:
        """Keep a loss for the session."""
        session_id = required(body, "session_id", str)
        self._backend.check_session(session_id)
        seq_id = required_seq_id(body, "custom_loss_seq_id")
        if not has_torch():
            raise HTTPError(501, "custom losses need torch, which is not installed on the server")
        program = read_program(body)
        loss_id = f"{session_id}:loss:{seq_id}"
        request_id = f"{loss_id}:create"
        with self._creating_loss:
            if self._backend.losses.add(loss_id, body.digest, program):
                # The work is done already, but the protocol expects a future (docs/protocol.md,
                # "Custom losses").
                created = Success({"loss_id": loss_id, "type": "create_custom_loss"})
                self._backend.futures.create(request_id, loss_id, 0)
                self._backend.futures.complete(request_id, created)
        return {"request_id": request_id}

    # Steps

    def _prepare_step(self, model_id: str, body: JsonBody) -> Work:
        params = read_wire(AdamParams, _adam_params(body), "adam_params")
        with invalid_input_rejected():
            params.check()
        return functools.partial(self._step, model_id, params)

    def _step(self, model_id: str, params: AdamParams) -> object:
        metrics = self._backend.engine.optim_step(model_id, params)
        # The weights have changed already, so a failure to note the step must not fail it.
        log_failure("note a step", self._backend.activity.note_step, model_id)
        return {"metrics": metrics}

    # Passes

    def _submit_pass(self, *, forward_only: bool) -> Result:
        raw = raw_body()
        codec = codec_for(request.content_type or "")
        # Before anything is decoded: objects take many times the bytes of their encoding.
        check_count = check_values if codec.content_type == JSON_CONTENT_TYPE else check_messages
        # Not in the `try` below: a 413 leaves the seq_id to the next request (docs/protocol.md,
        # "Sequence numbers", rule 3) ...
        check_count(raw)
        try:
            with invalid_input_rejected():
                if codec.content_type == JSON_CONTENT_TYPE:
                    check_levels(raw)
                asked = codec.decode_forward_backward(raw)
        except HTTPError:
            # ... but a body that was read and rejected has used its seq_id (rule 2).
            self._consume_seq_id(raw, codec.content_type)
            raise
        if forward_only:
            # JSON has a route for each kind of pass, protobuf a field (docs/protocol.md, "Passes").
            asked = dataclasses.replace(asked, forward_only=True)
        return self._submit_at(
            asked.model_id, asked.seq_id, digest(raw), functools.partial(self._prepare_pass, asked)
        )

    def _prepare_pass(self, asked: ForwardBackwardRequest) -> Work:
        work = self._prepare_computation(asked)
        return work if asked.forward_only else functools.partial(self._run_and_note, asked, work)

    def _run_and_note(
        self, asked: ForwardBackwardRequest, work: Callable[[], ForwardBackwardOutput]
    ) -> object:
        """Run the pass *work*, on the engine thread, and note it as activity."""
        activity = self._backend.activity
        started = activity.clock()
        output = work()
        tokens = sum(datum.model_input.length for datum in asked.data)
        # The gradient has been added already, so a failure to note the pass must not fail it.
        log_failure(
            "note a pass", activity.note_pass, asked.model_id, tokens, output.metrics, started
        )
        return output

    def _prepare_computation(
        self, asked: ForwardBackwardRequest
    ) -> Callable[[], ForwardBackwardOutput]:
        if asked.loss_fn == "custom" and self._backend.settings.flags.custom_loss_server_side:
            return self._prepare_custom(asked)
        check_pass(self._backend.info, asked.loss_fn, asked.data)
        return functools.partial(
            self._backend.engine.forward_backward,
            asked.model_id,
            asked.data,
            asked.loss_fn,
            asked.loss_fn_config,
            forward_only=asked.forward_only,
        )

    def _prepare_custom(self, asked: ForwardBackwardRequest) -> Callable[[], ForwardBackwardOutput]:
        loss_id = asked.loss_fn_config.get("loss_id")
        program = self._backend.losses.find(loss_id)
        # A loss is valid within its session only (docs/protocol.md, "Custom losses").
        if program is None or session_of(str(loss_id)) != session_of(asked.model_id):
            raise HTTPError(
                400,
                f"loss_id {loss_id!r:.100} is not a custom loss of this session; "
                "create_custom_loss returns the id",
            )
        # A custom loss is computed by passes with cross_entropy (`run_custom_pass`).
        check_pass(self._backend.info, "cross_entropy", asked.data)
        for index, datum in enumerate(asked.data):
            # All inputs but the first, the log-probabilities, which the pass itself computes.
            for name in ("target_tokens", *(name for name, _ in program.inputs[1:])):
                if name not in datum.loss_fn_inputs:
                    raise HTTPError(
                        400,
                        f"datum {index}: the loss {program.name!r:.100} needs the input {name!r}",
                    )
        return functools.partial(
            run_custom_pass,
            self._backend.engine,
            asked.model_id,
            asked.data,
            program,
            forward_only=asked.forward_only,
        )

    def _consume_seq_id(self, raw: bytes, content_type: str) -> None:
        """Consume the seq_id of a rejected body, if its model_id and seq_id can be read."""
        model_id, seq_id = _addressee(raw, content_type)
        if isinstance(model_id, str) and isinstance(seq_id, int) and seq_id > 0:
            self._backend.check_model(model_id)
            self._backend.scheduler.submit(model_id, seq_id, digest(raw), None)


def _adam_params(body: Dict[str, Any]) -> Dict[str, Any]:
    """Return the step's parameters: ``adam_params``, or ``optimizer_params`` of a family."""
    if body.get("optimizer_params") is None:
        return required(body, "adam_params", dict)
    if body.get("adam_params") is not None:
        raise HTTPError(400, "both adam_params and optimizer_params are given; send one of them")
    params = required(body, "optimizer_params", dict)
    family = params.get("type", "adamw")
    if family != "adamw":
        raise HTTPError(
            400, f"optimizer_params are of the family {family!r}; runs of this server have adamw"
        )
    return {name: value for name, value in params.items() if name != "type"}


def _addressee(raw: bytes, content_type: str) -> Tuple[Any, Any]:
    """Return ``model_id`` and ``seq_id`` of a body; None for what cannot be read."""
    if content_type == PROTOBUF_CONTENT_TYPE:
        from google.protobuf.message import DecodeError

        from tinkex.wire import tinker_public_pb2 as pb

        message = pb.ForwardBackwardRequest()
        try:
            message.ParseFromString(raw)
        except DecodeError:
            return None, None
        return message.model_id, message.seq_id
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None, None
    return (body.get("model_id"), body.get("seq_id")) if isinstance(body, dict) else (None, None)
