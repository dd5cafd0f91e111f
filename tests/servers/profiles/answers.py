"""Rewrites the application's answers into those of another server.  Runs in HTTP threads."""

from __future__ import annotations

import itertools
from typing import Any, Dict, Tuple

import orjson
from google.protobuf.message import DecodeError
from servers.profiles import ids, results
from servers.profiles.call import PASSES, Call, crash, json_answer
from servers.profiles.profile import Profile
from werkzeug.wrappers import Response

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.http.messages import digest
from tinkex.local.json_text import write_json
from tinkex.local.scheduling.lanes import Job
from tinkex.local.scheduling.sampling import failure_of
from tinkex.local.state.futures import Failure, Group, Success
from tinkex.wire.codec import JSON_CONTENT_TYPE

#: Routes whose work is queued in a run or sampler; a refusal becomes a future that fails.
_QUEUED = (
    *PASSES,
    "optim_step",
    "load_weights",
    "save_weights",
    "save_weights_for_sampler",
    "asample",
)
_ACCEPTED = (*_QUEUED, "create_model", "unload_model")
_CREATED = ("create_session", "create_sampling_session")


class Answers:
    """Rewrites the application's answers as *profile* says.  Thread-safe."""

    def __init__(self, backend: Backend, profile: Profile) -> None:
        self._backend = backend
        self._profile = profile
        self._refused = itertools.count(1)  # next() is atomic

    def rewrite(self, call: Call, response: Response) -> Response:
        """Turn the application's answer to *call* into this server's answer."""
        route, status = call.route, response.status_code
        profile = self._profile
        if status == 401 and profile.wrong_key != 401 and call.environ.get("HTTP_X_API_KEY"):
            return json_answer({"detail": "Invalid API key"}, profile.wrong_key)
        if route == "retrieve_future" and status == 200:
            return self._result(call, response)
        if route == "session_heartbeat" and status in (404, 410):
            return self._heartbeat_of_unknown(call, response)
        unpublishing = call.method == "DELETE" and str(route).endswith("/publish")
        if unpublishing and profile.unpublish_crashes:
            return crash()
        if route in _QUEUED and status in (400, 404):
            return self._failing_future(call, response)
        if status in (404, 410) and profile.crashes_on_unknown and route != "retrieve_future":
            return crash()
        changing = call.method == "DELETE" or str(route).endswith("/publish")
        if status == 200 and changing and profile.deleted == 204:
            return Response(status=204)
        if status == 200 and call.method == "POST":
            response = self._accepted(call, response)
        elif status == 200 and route == "get_server_capabilities":
            self._rename_models(response)
        elif status == 200 and str(route).endswith("/checkpoints"):
            self._shorten_ids(response)
        self._hide_colons(response)
        return response

    def _accepted(self, call: Call, response: Response) -> Response:
        route, profile = call.route, self._profile
        if route in _ACCEPTED:
            response.set_data(write_json(self._acceptance(response.get_data())))
        if route == "create_sampling_session" and profile.sampler_by_base == "future":
            made = orjson.loads(response.get_data())
            request_id = f"{made['sampling_session_id']}:created"
            self._backend.futures.create(request_id, made["sampling_session_id"], 0)
            self._backend.futures.complete(request_id, Success(made))
            response.set_data(write_json({"request_id": request_id}))
        if route in _ACCEPTED:
            response.status_code = profile.accepted
        elif route in _CREATED:
            response.status_code = profile.created
        return response

    def _acceptance(self, accepted: bytes) -> Dict[str, Any]:
        body: Dict[str, Any] = orjson.loads(accepted)
        if self._profile.future_ids:
            request_id = body["request_id"]
            return {"future_id": request_id, "status": "pending", "request_id": request_id}
        if not self._profile.sequence_ids:
            body.pop("sample_sequence_ids", None)
        return body

    def _heartbeat_of_unknown(self, call: Call, response: Response) -> Response:
        status = self._profile.unknown_heartbeat
        known = self._backend.store.session(str(call.body.get("session_id"))) is not None
        if known and self._profile.beats_go_on:
            status = 200
        if status == 500:
            return crash()
        if status == 200:
            return json_answer({"type": "session_heartbeat"}, 200)
        if status is not None:
            response.status_code = status
        return response

    def _failing_future(self, call: Call, response: Response) -> Response:
        """Accept a request that the application refused: these servers refuse it only in its turn.

        Work for a run or sampler that does not exist is refused immediately.
        """
        owner, number = _addressed(call)
        try:
            if call.route == "asample":
                self._backend.check_sampler(owner)
            else:
                self._backend.check_model(owner)
        except HTTPError:
            if self._profile.crashes_on_unknown:
                return crash()
            if self._profile.beats_go_on and self._backend.store.run(owner) is not None:
                response = json_answer({"detail": f"Model {owner} not loaded"}, 400)
            self._hide_colons(response)
            return response
        detail = orjson.loads(response.get_data())["detail"]
        problem = HTTPError(response.status_code, detail)
        request_id = self._fail_in_turn(call, owner, number, problem)
        body = write_json({"request_id": request_id, "model_id": owner})
        accepted = json_answer(self._acceptance(body), self._profile.accepted)
        self._hide_colons(accepted)
        return accepted

    def _fail_in_turn(self, call: Call, owner: str, number: int, problem: HTTPError) -> str:
        """Return the id of a request that fails with *problem* when its number's turn comes."""

        def fail() -> object:
            raise problem

        group = Group.of(owner, number) if call.route == "asample" else None
        if group is None:
            job = Job(f"{owner}:{number}:refused", fail)
            try:
                return self._backend.scheduler.submit(owner, number, digest(call.raw), job)
            except HTTPError:
                pass  # the number's turn has passed, or is too far away
        request_id = f"{owner}:{number}:refused:{next(self._refused)}"
        self._backend.futures.create(request_id, owner, number, group=group)
        self._backend.futures.complete(request_id, failure_of(problem, request_id))
        return request_id

    def _result(self, call: Call, response: Response) -> Response:
        """Encode the outcome of a future as this server does."""
        profile = self._profile
        outcome = self._backend.futures.wait(call.body["request_id"], 0.0)
        if isinstance(outcome, Success) and profile.routes is not None:
            encoded, media = results.encode(profile, outcome.value, call.accept)
            response = Response(encoded, 200, content_type=media)
            if media == JSON_CONTENT_TYPE and len(encoded) < 1 << 16:
                self._hide_colons(response)
            return self._compressed(call, response)
        if isinstance(outcome, Failure):
            response = self._failure(outcome, response)
        elif profile.busy == "408":
            detail = "Timeout waiting for result"
            response = json_answer({"detail": detail}, 408)
        self._hide_colons(response)
        return response

    def _failure(self, failure: Failure, response: Response) -> Response:
        if self._profile.failures == "400":
            status = 400 if failure.category == "user" else 500
            return json_answer({"detail": failure.message}, status)
        if self._profile.failures == "mapped":
            return json_answer({"detail": f"Future failed: {failure.message}"}, failure.status)
        return response

    def _compressed(self, call: Call, response: Response) -> Response:
        if not self._profile.compresses or "zstd" not in call.accept_encoding:
            return response
        try:
            import zstandard
        except ImportError:
            return response
        response.set_data(zstandard.ZstdCompressor().compress(response.get_data()))
        response.headers["Content-Encoding"] = "zstd"
        return response

    def _rename_models(self, response: Response) -> None:
        if self._profile.model_key != "model_name":
            body = orjson.loads(response.get_data())
            for model in body["supported_models"]:
                model[self._profile.model_key] = model.pop("model_name")
            response.set_data(write_json(body))

    def _shorten_ids(self, response: Response) -> None:
        if self._profile.sampler_paths == "two":
            body = orjson.loads(response.get_data())
            for checkpoint in body["checkpoints"]:
                checkpoint["checkpoint_id"] = checkpoint["checkpoint_id"].rpartition("/")[2]
            response.set_data(write_json(body))

    def _hide_colons(self, response: Response) -> None:
        rewrites = response.mimetype == JSON_CONTENT_TYPE and "Location" not in response.headers
        if self._profile.plain_ids and rewrites:  # but signed URLs stay as they are
            response.set_data(ids.outward(response.get_data()))


def _addressed(call: Call) -> Tuple[str, int]:
    """Return the run or sampler that a queued request is for, and its number."""
    if call.in_protobuf:
        from tinkex.wire import tinker_public_pb2 as pb

        message = pb.ForwardBackwardRequest()
        try:
            message.ParseFromString(call.raw)
        except DecodeError:
            return "", 0
        return str(message.model_id), int(message.seq_id)
    name = "sampling_session_id" if call.route == "asample" else "model_id"
    number = call.body.get("seq_id")
    return str(call.body.get(name) or ""), number if isinstance(number, int) else 0
