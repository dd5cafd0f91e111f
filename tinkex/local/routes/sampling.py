"""Samplers and sample requests (docs/protocol.md, "Sampling")."""

from __future__ import annotations

import functools
from typing import Optional, Sequence

from flask import Response

from tinkex.local.errors import HTTPError
from tinkex.local.fields import invalid_input_rejected, optional, required, required_seq_id
from tinkex.local.http.messages import digest, json_body, json_response
from tinkex.local.routes.base import Routes, Rule
from tinkex.local.scheduling.batches import WeightsSource
from tinkex.local.scheduling.checks import check_sample
from tinkex.types import GetSamplerResponse, SampleRequest


class SamplingRoutes(Routes):
    """Views of samplers."""

    def rules(self) -> Sequence[Rule]:
        """See Routes."""
        return [
            ("POST", "create_sampling_session", self.create),
            ("POST", "join_sampling_session", self.join),
            ("GET", "samplers/<sampler_id>", self.describe),
            ("POST", "asample", self.sample),
        ]

    def create(self) -> Response:
        """Open a sampler of the base model or of a checkpoint."""
        body, raw = json_body()
        session_id = required(body, "session_id", str)
        self._backend.check_session(session_id)
        seq_id = required_seq_id(body, "sampling_session_seq_id")
        path = optional(body, "model_path", str)
        base_model = optional(body, "base_model", str)
        if base_model is not None or path is None:
            self._backend.check_base_model(base_model)
        sampler_id = self._backend.create_sampler(
            f"{session_id}:sample:{seq_id}",
            digest(raw),
            path,
            functools.partial(self._weights, path),
        )
        response = {"sampling_session_id": sampler_id, "type": "create_sampling_session"}
        return json_response(response)

    def _weights(self, path: Optional[str]) -> WeightsSource:
        if path is None:
            return self._backend.frozen(None)
        checkpoint = self._backend.checkpoint_at(path)
        self._backend.check_loadable(checkpoint)
        return self._backend.frozen(checkpoint)

    def join(self) -> Response:
        """Count one more client of a sampler."""
        body, _ = json_body()
        sampler_id = required(body, "sampling_session_id", str)
        self._backend.check_sampler(sampler_id)
        counter = self._backend.scheduler.join_sampler(sampler_id)
        return json_response({"client_counter": counter, "type": "join_sampling_session"})

    def describe(self, sampler_id: str) -> Response:
        """What a sampler draws from."""
        row = self._backend.store.sampler(sampler_id)
        if row is None:
            raise HTTPError(404, f"sampler {sampler_id} is unknown")
        sampler = GetSamplerResponse(
            sampler_id, row.base_model, row.model_path, self._backend.info.tokenizer_id
        )
        return json_response(sampler.to_wire())

    def sample(self) -> Response:
        """Queue a sample request."""
        body, raw = json_body()
        sampler_id = required(body, "sampling_session_id", str)
        seq_id = required_seq_id(body)
        self._backend.check_sampler(sampler_id)
        with invalid_input_rejected():
            asked = SampleRequest.from_json(body)
        cost = check_sample(self._backend.info, asked, self._backend.settings.limits)
        request_id = self._backend.scheduler.submit_sample(
            sampler_id, seq_id, digest(raw), asked, cost
        )
        sequence_ids = [f"{request_id}:{index}" for index in range(asked.num_samples)]
        return json_response({"request_id": request_id, "sample_sequence_ids": sequence_ids})
