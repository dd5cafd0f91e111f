"""Polling for results, individually or by sampling client (docs/protocol.md, "Futures")."""

from __future__ import annotations

import functools
from typing import Any, Dict, List, Tuple

import orjson
from flask import Response, request

from tinkex._runtime.numeric import is_finite
from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.fields import optional, required, required_seq_id
from tinkex.local.http.messages import JsonBody
from tinkex.local.http.threads import HeldPolls
from tinkex.local.routes.base import Result, Routes, route
from tinkex.local.settings import ServerSettings
from tinkex.local.state.futures import Failure, Group, Outcome, Waiting
from tinkex.types import ForwardBackwardOutput, SampleResponse
from tinkex.wire.codec import JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE, codec_for


class FutureRoutes(Routes):
    """Views of results."""

    def __init__(self, backend: Backend, settings: ServerSettings) -> None:
        super().__init__(backend, settings)
        self._futures = backend.futures
        self._held = HeldPolls(settings.max_held_polls)

    @route("POST", "retrieve_future")
    def retrieve(self, body: JsonBody) -> Result:
        """Send the result of one request, or ``try_again`` after a while."""
        request_id = required(body, "request_id", str)
        metadata_only = bool(optional(body, "allow_metadata_only", bool))
        # Only a poll that has to wait counts as held.
        outcome = self._futures.wait(request_id, 0.0)
        if isinstance(outcome, Waiting):
            # Checked with each poll instead of by a timer: clients poll for requests that wait.
            self._backend.scheduler.refuse_early(outcome.owner)
            hold_s = self._settings.retrieve_hold_s
            outcome = self._held.hold(functools.partial(self._futures.wait, request_id, hold_s))
        if outcome is None:
            raise self._no_result(request_id)
        if isinstance(outcome, Waiting):
            return self._try_again(request_id, outcome)
        # Status 200: HTTP errors are about the poll itself (docs/protocol.md, "Failures").
        if isinstance(outcome, Failure):
            encoded = orjson.dumps({"error": outcome.message, "category": outcome.category})
            content_type = JSON_CONTENT_TYPE
        else:
            accepts_protobuf = PROTOBUF_CONTENT_TYPE in request.headers.get("Accept", "")
            encoded, content_type = _encode(outcome.value, accepts_protobuf)
            # A result that is only announced by its size does not count as fetched.
            if metadata_only and len(encoded) > self._settings.metadata_threshold_bytes:
                return {"status": "complete_metadata", "response_payload_size": len(encoded)}
        # Not dropped yet, because this response may be lost (docs/protocol.md, "Lifetime of
        # results").
        self._futures.fetched(request_id, len(encoded))
        return Response(encoded, mimetype=content_type)

    def _no_result(self, request_id: str) -> HTTPError:
        # 410 says that only the result is lost, so that clients submit a sample again
        # (docs/protocol.md, "Interpreting a poll").
        if self._futures.is_gone(request_id):
            return HTTPError(
                410,
                f"the result of request {request_id} was dropped: a result is kept until the "
                "client acknowledges it, but at most for two minutes after it was fetched, or for "
                "an hour if it was not fetched",
            )
        return HTTPError(404, f"request {request_id} is unknown")

    def _try_again(self, request_id: str, waiting: Waiting) -> Result:
        reason = self._backend.scheduler.why_waiting(waiting.owner, waiting.seq_id)
        return {
            "type": "try_again",
            "request_id": request_id,
            "queue_state": "active",
            "queue_state_reason": reason,
        }

    @route("POST", "retrieve_futures")
    def retrieve_completions(self, body: JsonBody) -> Result:
        """List the samples of one client that were done since its last poll."""
        group = self._target(required(body, "target", dict))
        cursor = required_seq_id(body, "prev_cursor")
        longest_s = self._settings.retrieve_hold_s
        timeout_s = min(_timeout_s(body, longest_s), longest_s)
        retrieved = optional(body, "retrieved_request_ids", list) or []
        if not all(isinstance(request_id, str) for request_id in retrieved):
            raise HTTPError(400, "retrieved_request_ids must be a list of request ids")
        # Before the wait, which may be long: the client has these results.
        self._futures.acknowledge(group, retrieved)
        done, end = self._futures.completed(group, cursor, 0.0)
        if not done and timeout_s > 0:
            # Raises if the session has ended: there is nothing left to wait for.
            self._backend.check_sampler(group.sampler_id)
            done, end = self._held.hold(
                functools.partial(self._futures.completed, group, cursor, timeout_s)
            )
        return {"completions": _completions(done), "cursor": end}

    def _target(self, target: Dict[str, Any]) -> Group:
        kind = target.get("type")
        if kind != "sampling_session":
            raise HTTPError(400, f"target {kind!r} is unknown; it must be a sampling_session")
        sampler_id = required(target, "sampling_session_id", str)
        self._backend.catalog.get_sampler(sampler_id)
        clone = optional(target, "cloned_sampler_id", int) or 0
        if clone < 0:
            raise HTTPError(400, f"cloned_sampler_id is {clone}; the first client is 0")
        return Group(sampler_id, clone)

    @route("POST", "cancel_future")
    def cancel(self, body: JsonBody) -> Result:
        """Cancel a pending sample."""
        request_id = required(body, "request_id", str)
        outcome = self._futures.wait(request_id, 0.0)
        if outcome is None and not self._futures.is_gone(request_id):
            raise HTTPError(404, f"request {request_id} is unknown")
        if isinstance(outcome, Waiting):
            # An owner that is not a sampler is a training run.
            if self._backend.store.sampler(outcome.owner) is None:
                raise HTTPError(
                    400,
                    f"request {request_id} cannot be cancelled: only samples can, since later "
                    "requests of a training run build on it",
                )
            self._backend.scheduler.cancel_sample(outcome.owner, request_id)
        return {}


def _timeout_s(body: Dict[str, Any], default: float) -> float:
    value = body.get("timeout")
    if value is None:
        return default
    if not is_finite(value) or value < 0:
        raise HTTPError(400, f"timeout is {value!r}; it must be a number of seconds, 0 or more")
    return float(value)


def _completions(done: List[Tuple[str, Outcome]]) -> List[Dict[str, Any]]:
    listed: List[Dict[str, Any]] = []
    for request_id, outcome in done:
        item: Dict[str, Any] = {"state": "failed", "request_id": request_id}
        if not isinstance(outcome, Failure):
            item["state"] = "finished"
            # The client reserves these bytes before it fetches the result (docs/protocol.md, "Batch
            # polling").
            item["response_payload_uncompressed_size"] = len(_encode(outcome.value, True)[0])
        listed.append(item)
    return listed


def _encode(value: object, as_protobuf: bool) -> Tuple[bytes, str]:
    codec = codec_for(PROTOBUF_CONTENT_TYPE if as_protobuf else JSON_CONTENT_TYPE)
    if isinstance(value, ForwardBackwardOutput):
        return codec.encode_output(value), codec.content_type
    if isinstance(value, SampleResponse):
        return codec.encode_samples(value), codec.content_type
    return orjson.dumps(value), JSON_CONTENT_TYPE
