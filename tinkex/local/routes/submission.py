"""How a request of a training run is queued; shared by the routes that do it."""

from __future__ import annotations

from typing import Callable

from flask import Response

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.http.messages import answer
from tinkex.local.scheduling.lanes import Job

#: Checks a submission and returns the work to do on the engine thread.
Prepare = Callable[[], Callable[[], object]]


def submit(
    backend: Backend, model_id: str, seq_id: int, body_digest: bytes, prepare: Prepare
) -> Response:
    """Queue what *prepare* returns at *seq_id*, unless the same was submitted before.

    A request that *prepare* rejects uses its number up, so that the run can go on.
    """
    backend.check_model(model_id)
    if seq_id < 1:
        raise HTTPError(400, f"seq_id is {seq_id}; the requests of a run are numbered from 1")
    request_id = backend.scheduler.find(model_id, seq_id, body_digest)
    if request_id is None:
        try:
            work = prepare()
        except HTTPError:
            backend.scheduler.submit(model_id, seq_id, body_digest, None)
            raise
        job = Job(f"{model_id}:{seq_id}", work)
        request_id = backend.scheduler.submit(model_id, seq_id, body_digest, job)
    return answer({"request_id": request_id, "model_id": model_id})
