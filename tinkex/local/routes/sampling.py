"""Samplers and sample requests (docs/protocol.md, "Sampling")."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from flask import Flask, Response

from tinkex.errors import InvalidInputError
from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.fields import as_problem, need, need_seq_id, optional
from tinkex.local.http.messages import answer, digest, json_body
from tinkex.local.scheduling.checks import check_sample
from tinkex.types import GetSamplerResponse, SampleRequest


def register(app: Flask, backend: Backend) -> None:
    """Add the routes to *app*."""

    @app.post("/api/v1/create_sampling_session")
    def create_sampling_session() -> Response:
        body, raw = json_body()
        session_id = need(body, "session_id", str)
        backend.check_session(session_id)
        number = need_seq_id(body, "sampling_session_seq_id")
        model_path = optional(body, "model_path", str)
        base_model = optional(body, "base_model", str)
        if base_model is not None or model_path is None:
            backend.check_base_model(base_model)

        def weights() -> Optional[Path]:
            if model_path is None:
                return None
            checkpoint = backend.checkpoint_at(model_path)
            run = backend.store.run(checkpoint.run_id)
            if run is not None and run.base_model != backend.info.model_name:
                raise HTTPError(
                    400,
                    f"{model_path} was trained from {run.base_model}; this server has "
                    f"{backend.info.model_name}",
                )
            return backend.store.freeze(checkpoint)

        sampler_id = backend.create_sampler(
            f"{session_id}:sample:{number}", digest(raw), model_path, weights
        )
        return answer({"sampling_session_id": sampler_id, "type": "create_sampling_session"})

    @app.post("/api/v1/join_sampling_session")
    def join_sampling_session() -> Response:
        body, _ = json_body()
        sampler_id = need(body, "sampling_session_id", str)
        backend.sampler_ready(sampler_id)
        counter = backend.scheduler.join_sampler(sampler_id)
        return answer({"client_counter": counter, "type": "join_sampling_session"})

    @app.get("/api/v1/samplers/<sampler_id>")
    def get_sampler(sampler_id: str) -> Response:
        row = backend.store.sampler(sampler_id)
        if row is None:
            raise HTTPError(404, f"sampler {sampler_id} is unknown")
        sampler = GetSamplerResponse(
            sampler_id, row.base_model, row.model_path, backend.info.tokenizer_id
        )
        return answer(sampler.to_wire())

    @app.post("/api/v1/asample")
    def asample() -> Response:
        body, raw = json_body()
        sampler_id = need(body, "sampling_session_id", str)
        seq_id = need_seq_id(body)
        backend.sampler_ready(sampler_id)
        try:
            asked = SampleRequest.from_json(body)
        except InvalidInputError as error:
            raise as_problem(error) from error
        cost = check_sample(backend.info, asked, backend.settings.limits)
        request_id = backend.scheduler.submit_sample(sampler_id, seq_id, digest(raw), asked, cost)
        sequence_ids = [f"{request_id}:{index}" for index in range(asked.num_samples)]
        return answer({"request_id": request_id, "sample_sequence_ids": sequence_ids})
