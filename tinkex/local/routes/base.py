"""What the topics of the protocol have in common: a class of views each, and how work is queued."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, Sequence, Tuple

from flask import Response

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.fields import required, required_seq_id
from tinkex.local.http.messages import json_response
from tinkex.local.scheduling.lanes import Job, Work
from tinkex.local.settings import ServerSettings
from tinkex.local.state.rows import CheckpointRow
from tinkex.types.checkpoint_path import KINDS

#: HTTP method, path (below ``/api/v1/``, unless it is absolute), and the view that responds.
Rule = Tuple[str, str, Callable[..., Response]]

#: Checks the body of a submission and returns the work to do on the engine thread.
Prepare = Callable[[str, Dict[str, Any]], Work]


class Routes:
    """The views of one topic.  A view runs in an HTTP thread, within one request."""

    def __init__(self, backend: Backend, settings: ServerSettings) -> None:
        self._backend = backend
        self._settings = settings

    def rules(self) -> Sequence[Rule]:
        """Return which view responds to what."""
        raise NotImplementedError

    def _checkpoint(self, run_id: str, kind: str, name: str) -> CheckpointRow:
        """Return a checkpoint; HTTPError 400 or 404 names what is wrong with its address."""
        if kind not in KINDS:
            raise HTTPError(
                400,
                f"{kind}/{name} is not a checkpoint id; it must begin with one of {list(KINDS)}",
            )
        return self._backend.checkpoint(run_id, kind, name)

    def _submit(self, body: Dict[str, Any], digest: bytes, prepare: Prepare) -> Response:
        """Queue the work for a training run, at the ``seq_id`` of its body."""
        model_id, seq_id = required(body, "model_id", str), required_seq_id(body)
        return self._submit_at(model_id, seq_id, digest, functools.partial(prepare, model_id, body))

    def _submit_at(
        self, model_id: str, seq_id: int, digest: bytes, prepare: Callable[[], Work]
    ) -> Response:
        """Queue what *prepare* returns at *seq_id*, unless the same body was submitted before.

        A request that *prepare* rejects consumes its seq_id, so that the run can go on.
        """
        self._backend.check_model(model_id)
        if seq_id < 1:
            raise HTTPError(400, f"seq_id is {seq_id}; the requests of a run are numbered from 1")
        scheduler = self._backend.scheduler
        request_id = scheduler.find(model_id, seq_id, digest)
        if request_id is None:
            try:
                work = prepare()
            except HTTPError:
                scheduler.submit(model_id, seq_id, digest, None)
                raise
            request_id = scheduler.submit(
                model_id, seq_id, digest, Job(f"{model_id}:{seq_id}", work)
            )
        return json_response({"request_id": request_id, "model_id": model_id})
