"""Samplers and sample requests (docs/protocol.md, "Sampling")."""

from __future__ import annotations

import functools
from typing import Optional

from tinkex.local.errors import invalid_input_rejected
from tinkex.local.fields import optional, required, required_seq_id
from tinkex.local.http.messages import JsonBody
from tinkex.local.routes.base import Result, Routes, route
from tinkex.local.scheduling.batches import WeightsSource
from tinkex.local.scheduling.checks import check_sample
from tinkex.types import GetSamplerResponse, SampleRequest


class SamplingRoutes(Routes):
    """Views of samplers."""

    @route("POST", "create_sampling_session")
    def create(self, body: JsonBody) -> Result:
        """Open a sampler of the base model or of a checkpoint."""
        session_id = required(body, "session_id", str)
        self._backend.check_session(session_id)
        seq_id = required_seq_id(body, "sampling_session_seq_id")
        path = optional(body, "model_path", str)
        base_model = optional(body, "base_model", str)
        if base_model is not None or path is None:
            self._backend.catalog.check_base_model(base_model)
        # The weights are passed as a function, so that a repetition copies no files.
        sampler_id = self._backend.create_sampler(
            f"{session_id}:sample:{seq_id}",
            body.digest,
            path,
            functools.partial(self._weights, path),
        )
        return {"sampling_session_id": sampler_id, "type": "create_sampling_session"}

    def _weights(self, path: Optional[str]) -> WeightsSource:
        checkpoint = None if path is None else self._backend.catalog.loadable_at(path)
        # A copy, since the checkpoint may be deleted or replaced while the sampler is open.
        return self._backend.frozen(checkpoint)

    @route("POST", "join_sampling_session")
    def join(self, body: JsonBody) -> Result:
        """Count one more client of a sampler."""
        sampler_id = required(body, "sampling_session_id", str)
        self._backend.check_sampler(sampler_id)
        # Each clone numbers its samples in a block of its own (docs/protocol.md, "Clones").
        counter = self._backend.scheduler.join_sampler(sampler_id)
        return {"client_counter": counter, "type": "join_sampling_session"}

    @route("GET", "samplers/<sampler_id>")
    def describe(self, sampler_id: str) -> Result:
        """Describe what a sampler draws from."""
        row = self._backend.catalog.get_sampler(sampler_id)
        return GetSamplerResponse(
            sampler_id, row.base_model, row.model_path, self._backend.info.tokenizer_id
        )

    @route("POST", "asample")
    def sample(self, body: JsonBody) -> Result:
        """Queue a sample request."""
        sampler_id = required(body, "sampling_session_id", str)
        seq_id = required_seq_id(body)
        self._backend.check_sampler(sampler_id)
        # Unlike a run's request, a rejected sample need not consume its seq_id: samples do not wait
        # for one another (docs/protocol.md, "Sample requests").
        with invalid_input_rejected():
            asked = SampleRequest.from_json(body)
        cost = check_sample(self._backend.info, asked, self._backend.settings.limits)
        request_id = self._backend.scheduler.submit_sample(
            sampler_id, seq_id, body.digest, asked, cost
        )
        # The ids are sent here, since results in protobuf have no field for them (docs/protocol.md,
        # "Results in protobuf").
        sequence_ids = [f"{request_id}:{index}" for index in range(asked.num_samples)]
        return {"request_id": request_id, "sample_sequence_ids": sequence_ids}
