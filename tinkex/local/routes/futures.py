"""Polling for results, one by one or by sampling client (docs/protocol.md, "Futures")."""

from __future__ import annotations

import math
import threading
from typing import Any, Callable, Dict, List, Tuple, TypeVar

import orjson
from flask import Flask, Response, request

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.fields import need, need_seq_id, optional
from tinkex.local.http.messages import answer, json_body
from tinkex.local.settings import ServerSettings
from tinkex.local.state.completions import Group
from tinkex.local.state.futures import Failure, Outcome, Waiting
from tinkex.types import ForwardBackwardOutput, SampleResponse
from tinkex.wire.codec import JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE, codec_for

T = TypeVar("T")


class Holds:
    """How many polls are held: each occupies an HTTP thread.  Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._free = threading.BoundedSemaphore(most)  # never waited for

    def during(self, wait: Callable[[], T]) -> T:
        """Return what *wait* returns; HTTPError 429 instead if too many wait already."""
        self.acquire()
        try:
            return wait()
        finally:
            self.release()

    def acquire(self) -> None:
        """Count one that begins to wait; HTTPError 429 if too many wait already."""
        if not self._free.acquire(blocking=False):
            # Clients pause before they ask again after this, and not after try_again.
            raise HTTPError(
                429, f"{self._most} polls are held already; ask again", retry_after_s=1.0
            )

    def release(self) -> None:
        """Count one that does not wait any more."""
        self._free.release()


def register(app: Flask, backend: Backend, settings: ServerSettings, holds: Holds) -> None:
    """Add the routes to *app*."""
    _register_retrieve_future(app, backend, settings, holds)
    _register_retrieve_futures(app, backend, settings, holds)

    @app.post("/api/v1/cancel_future")
    def cancel_future() -> Response:
        body, _ = json_body()
        request_id = need(body, "request_id", str)
        outcome = backend.futures.wait(request_id, 0.0)
        if outcome is None and not backend.futures.is_gone(request_id):
            raise HTTPError(404, f"request {request_id} is unknown")
        if isinstance(outcome, Waiting):
            if backend.store.sampler(outcome.owner) is None:
                raise HTTPError(
                    400,
                    f"request {request_id} cannot be cancelled: only samples can, since later "
                    "requests of a training run build on it",
                )
            backend.scheduler.cancel_sample(outcome.owner, request_id)
        return answer({})


def _register_retrieve_future(
    app: Flask, backend: Backend, settings: ServerSettings, holds: Holds
) -> None:
    @app.post("/api/v1/retrieve_future")
    def retrieve_future() -> Response:
        body, _ = json_body()
        request_id = need(body, "request_id", str)
        metadata_only = bool(optional(body, "allow_metadata_only", bool))
        outcome = backend.futures.wait(request_id, 0.0)
        if isinstance(outcome, Waiting):
            outcome = holds.during(
                lambda: backend.futures.wait(request_id, settings.retrieve_hold_s)
            )
        if outcome is None:
            raise _no_result(backend, request_id)
        if isinstance(outcome, Waiting):
            return _try_again(backend, request_id, outcome)
        if isinstance(outcome, Failure):
            encoded = orjson.dumps({"error": outcome.message, "category": outcome.category})
            content_type = JSON_CONTENT_TYPE
        else:
            accepts_protobuf = PROTOBUF_CONTENT_TYPE in request.headers.get("Accept", "")
            encoded, content_type = _encode(outcome.value, accepts_protobuf)
            if metadata_only and len(encoded) > settings.metadata_threshold_bytes:
                size = {"status": "complete_metadata", "response_payload_size": len(encoded)}
                return answer(size)
        backend.futures.fetched(request_id, len(encoded))
        return Response(encoded, mimetype=content_type)


def _no_result(backend: Backend, request_id: str) -> HTTPError:
    if backend.futures.is_gone(request_id):
        return HTTPError(
            410,
            f"the result of request {request_id} was dropped: results are kept until the client "
            "says that it has them, for two minutes after they were fetched, and for an hour if "
            "they were not",
        )
    return HTTPError(404, f"request {request_id} is unknown")


def _try_again(backend: Backend, request_id: str, waiting: Waiting) -> Response:
    return answer(
        {
            "type": "try_again",
            "request_id": request_id,
            "queue_state": "active",
            "queue_state_reason": backend.scheduler.why_waiting(waiting.owner, waiting.seq_id),
        }
    )


def _register_retrieve_futures(
    app: Flask, backend: Backend, settings: ServerSettings, holds: Holds
) -> None:
    @app.post("/api/v1/retrieve_futures")
    def retrieve_futures() -> Response:
        body, _ = json_body()
        group = _target(backend, need(body, "target", dict))
        cursor = need_seq_id(body, "prev_cursor")
        timeout_s = min(_timeout_s(body, settings.retrieve_hold_s), settings.retrieve_hold_s)
        retrieved = optional(body, "retrieved_request_ids", list) or []
        if not all(isinstance(request_id, str) for request_id in retrieved):
            raise HTTPError(400, "retrieved_request_ids must be a list of request ids")
        backend.futures.acknowledge(group, retrieved)
        done, upto = backend.futures.completed(group, cursor, 0.0)
        if not done and timeout_s > 0:
            # Not waited for in an ended session: nothing more will be done in it.
            backend.sampler_ready(group.sampler_id)
            done, upto = holds.during(lambda: backend.futures.completed(group, cursor, timeout_s))
        return answer({"completions": _completions(done), "cursor": upto})


def _target(backend: Backend, target: Dict[str, Any]) -> Group:
    kind = target.get("type")
    if kind != "sampling_session":
        raise HTTPError(400, f"target {kind!r} is unknown; it must be a sampling_session")
    sampler_id = need(target, "sampling_session_id", str)
    if backend.store.sampler(sampler_id) is None:
        raise HTTPError(404, f"sampling session {sampler_id} is unknown")
    clone = optional(target, "cloned_sampler_id", int) or 0
    if clone < 0:
        raise HTTPError(400, f"cloned_sampler_id is {clone}; the first client is 0")
    return Group(sampler_id, clone)


def _timeout_s(body: Dict[str, Any], default: float) -> float:
    value = body.get("timeout")
    if value is None:
        return default
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < 0:
        raise HTTPError(400, f"timeout is {value!r}; it must be a number of seconds, 0 or more")
    return float(value)


def _completions(done: List[Tuple[str, Outcome]]) -> List[Dict[str, Any]]:
    listed: List[Dict[str, Any]] = []
    for request_id, outcome in done:
        if isinstance(outcome, Failure):
            listed.append({"state": "failed", "request_id": request_id})
            continue
        size = len(_encode(outcome.value, True)[0])
        listed.append(
            {
                "state": "finished",
                "request_id": request_id,
                "response_payload_uncompressed_size": size,
            }
        )
    return listed


def _encode(value: object, as_protobuf: bool) -> Tuple[bytes, str]:
    codec = codec_for(PROTOBUF_CONTENT_TYPE if as_protobuf else JSON_CONTENT_TYPE)
    if isinstance(value, ForwardBackwardOutput):
        return codec.encode_output(value), codec.content_type
    if isinstance(value, SampleResponse):
        return codec.encode_samples(value), codec.content_type
    return orjson.dumps(value), JSON_CONTENT_TYPE
