"""The routes of a small Tinker server on a ScriptedServer: every request is accepted and succeeds.

A submission gets a request id that names its route, and a poll gets the result of that route, so
that a test can replace one route and leave the others.
"""

from __future__ import annotations

import collections
import itertools
from typing import Any, Dict, List, Mapping

import numpy as np

from support.scripted_server import Answer, Received, ScriptedServer
from tinkex.types import ForwardBackwardOutput, TensorData
from tinkex.wire.codec import codec_for
from tinkex.wire.json_codec import JSON

API = "/api/v1/"
MODEL = "session-1:train:0"

RESULTS: Mapping[str, Any] = {
    "create_model": {"model_id": MODEL},
    "load_weights": {"path": "tinker://x/weights/a"},
    "optim_step": {"metrics": {"grad_norm:mean": 1.0}},
    "save_weights": {"path": f"tinker://{MODEL}/weights/a"},
    "save_weights_for_sampler": {
        "path": f"tinker://{MODEL}/sampler_weights/a",
        "sampling_session_id": "session-1:sample:0",
    },
    "asample": {"sequences": [{"stop_reason": "length", "tokens": [5], "logprobs": [-0.5]}]},
}


class TinkerRoutes:
    """Puts the routes on *server* and records the submissions."""

    def __init__(self, server: ScriptedServer) -> None:
        self._server = server
        self._numbers = itertools.count()
        self.results: Dict[str, Answer] = {}
        self.finished: List[Any] = []
        work = ["create_model", "load_weights", "optim_step", "save_weights"]
        work += ["save_weights_for_sampler", "asample"]
        for route in work:
            self.serve(route, self.accept)
        self.serve("forward_backward", self.accept_pass)
        self.serve("forward", self.accept_pass)
        self.serve("create_session", Answer(body={"session_id": "session-1"}))
        self.serve("session_heartbeat", Answer(body={}))
        self.serve("sessions/session-1/finish", self._finish)
        info = {"model_id": MODEL, "model_data": {"model_name": "base"}}
        self.serve("get_info", Answer(body=info))
        sampler = Answer(body={"sampling_session_id": "session-1:sample:0"})
        self.serve("create_sampling_session", sampler)
        self.serve("retrieve_future", self.retrieve)

    def serve(self, route: str, *steps: Any) -> None:
        """Answer *route*, without its prefix, with *steps*."""
        self._server.on(f"POST {API}{route}", *steps)

    def accept(self, received: Received) -> Answer:
        """Accept a submission; its result is the route's entry in RESULTS."""
        route = received.path.rpartition("/")[2]
        return self.accepted(route, Answer(body=RESULTS[route]))

    def accept_pass(self, received: Received) -> Answer:
        """Accept a pass; its result has logprobs of -1 everywhere."""
        codec = codec_for(received.headers["content-type"])
        batch = codec.decode_forward_backward(received.body)
        outputs = [
            {"logprobs": TensorData.from_numpy(np.full(d.model_input.length, -1.0))}
            for d in batch.data
        ]
        output = ForwardBackwardOutput(outputs, {"loss:sum": float(len(outputs))}, "T")
        body = JSON.encode_output(output)
        return self.accepted(received.path.rpartition("/")[2], Answer(body=body))

    def accepted(self, route: str, result: Answer) -> Answer:
        """Accept a submission whose result is *result*."""
        request_id = f"{route}-{next(self._numbers)}"
        self.results[request_id] = result
        return Answer(body={"request_id": request_id, "model_id": MODEL})

    def retrieve(self, received: Received) -> Answer:
        """Answer a poll."""
        missing = Answer(404, {"detail": "unknown request"})
        return self.results.get(received.json()["request_id"], missing)

    def _finish(self, received: Received) -> Answer:
        self.finished.append(received.json())
        return Answer(body={})

    def count(self) -> int:
        """Return how many requests arrived, without heartbeats, whose timing varies."""
        beats = self._server.requests(f"POST {API}session_heartbeat")
        return len(self._server.requests()) - len(beats)

    def submitted(self, route: str) -> List[Any]:
        """Return the decoded bodies of all submissions to *route*."""
        bodies = []
        for received in self._server.requests(f"POST {API}{route}"):
            if route in ("forward_backward", "forward"):
                codec = codec_for(received.headers["content-type"])
                bodies.append(codec.decode_forward_backward(received.body))
            else:
                bodies.append(received.json())
        return bodies

    def seq_ids(self) -> List[int]:
        """Return the seq_ids of all training requests, in order of arrival."""
        seen: List[int] = []
        counted: Dict[str, Any] = collections.defaultdict(int)
        for received in self._server.requests():
            route = received.path.rpartition("/")[2]
            if route in ("forward_backward", "forward", "optim_step") or "_weights" in route:
                body = self.submitted(route)[counted[route]]
                counted[route] += 1
                seen.append(body["seq_id"] if isinstance(body, dict) else body.seq_id)
        return seen
