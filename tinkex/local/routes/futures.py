"""Polling for results (protocol reference, section 2)."""

from __future__ import annotations

import threading
from typing import Tuple

import orjson
from flask import Flask, Response, request

from tinkex.local.backend import Backend
from tinkex.local.futures import Failure, Waiting
from tinkex.local.http import answer, json_body, need
from tinkex.local.problems import Problem
from tinkex.types import ForwardBackwardOutput, SampleResponse
from tinkex.wire.codec import JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE
from tinkex.wire.codecs import codec_for


def register(app: Flask, backend: Backend, max_held_polls: int, hold_s: float) -> None:
    """Add the route to *app*; at most *max_held_polls* polls are held, *hold_s* seconds each."""
    # Counts the polls that may still be held; never waited for.
    free_holds = threading.BoundedSemaphore(max_held_polls)

    @app.post("/api/v1/retrieve_future")
    def retrieve_future() -> Response:
        body, _ = json_body()
        request_id = need(body, "request_id", str)
        outcome = backend.futures.wait(request_id, 0.0)
        if isinstance(outcome, Waiting):
            if not free_holds.acquire(blocking=False):
                # Clients pause before they ask again after this, and not after try_again.
                raise Problem(
                    429, f"{max_held_polls} polls are held already; ask again", retry_after_s=1.0
                )
            try:
                outcome = backend.futures.wait(request_id, hold_s)
            finally:
                free_holds.release()
        if outcome is None:
            raise Problem(
                404,
                f"request {request_id} is unknown, or its result was dropped: results are kept "
                "for two minutes after they were fetched, and for an hour if they were not",
            )
        if isinstance(outcome, Waiting):
            return answer(
                {
                    "type": "try_again",
                    "request_id": request_id,
                    "queue_state": "active",
                    "queue_state_reason": backend.scheduler.why_waiting(
                        outcome.owner, outcome.seq_id
                    ),
                }
            )
        if isinstance(outcome, Failure):
            encoded = orjson.dumps({"error": outcome.message, "category": outcome.category})
            content_type = JSON_CONTENT_TYPE
        else:
            encoded, content_type = _encode(outcome.value)
        backend.futures.fetched(request_id, len(encoded))
        return Response(encoded, mimetype=content_type)


def _encode(value: object) -> Tuple[bytes, str]:
    accepts_protobuf = PROTOBUF_CONTENT_TYPE in request.headers.get("Accept", "")
    codec = codec_for(PROTOBUF_CONTENT_TYPE if accepts_protobuf else JSON_CONTENT_TYPE)
    if isinstance(value, ForwardBackwardOutput):
        return codec.encode_output(value), codec.content_type
    if isinstance(value, SampleResponse):
        return codec.encode_samples(value), codec.content_type
    return orjson.dumps(value), JSON_CONTENT_TYPE
