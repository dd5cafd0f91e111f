"""A scripted server with sessions: it records them, their heartbeats and their ends."""

from __future__ import annotations

import threading
from typing import Any, List, Optional

from support.scripted_server import Answer, Received, ScriptedServer

CREATE = "POST /api/v1/create_session"
BEAT = "POST /api/v1/session_heartbeat"
CAPABILITIES = "GET /api/v1/get_server_capabilities"
POLL = "POST /api/v1/retrieve_future"


class SessionServer(ScriptedServer):
    """Creates sessions s0, s1, ... (or with another prefix); accepts their heartbeats and ends.

    `on` changes what a route answers; `create_hold` holds answers to create_session.
    """

    def __init__(self, prefix: str = "s") -> None:
        super().__init__()
        self._prefix = prefix
        self._lock = threading.Lock()  # guards _count
        self._count = 0
        self.create_hold: Optional[threading.Event] = None
        self.finish_answer = Answer()
        self.on(CREATE, self._create)
        self.on(BEAT, Answer(body={"type": "session_heartbeat"}))

    def _create(self, received: Received) -> Answer:
        with self._lock:
            session_id = f"{self._prefix}{self._count}"
            self._count += 1
        self.on(finish_route(session_id), lambda _: self.finish_answer)
        return Answer(body={"session_id": session_id}, hold=self.create_hold)

    def serve_work(self, hold: Optional[threading.Event] = None) -> None:
        """Create models and samplers; answer their polls once *hold* is set.

        Samples have one token.
        """
        self.on(CAPABILITIES, Answer(body={"supported_models": []}))
        self.on("POST /api/v1/create_model", _create_model)
        self.on("POST /api/v1/load_weights", _create_model)
        self.on("POST /api/v1/get_info", _get_info)
        self.on("POST /api/v1/create_sampling_session", _create_sampler)
        self.on("POST /api/v1/asample", Answer(body={"request_id": "sample"}))
        self.on(POLL, lambda received: _result(received, hold))

    @property
    def created(self) -> int:
        with self._lock:
            return self._count

    def beats(self, session_id: Optional[str] = None) -> List[Received]:
        """Return the heartbeats so far, of one session or of all, except truncated ones."""
        complete = [
            r for r in self.requests(BEAT) if len(r.body) == int(r.headers["content-length"])
        ]
        return [r for r in complete if session_id in (None, r.json()["session_id"])]

    def finishes(self, session_id: str) -> List[Received]:
        return self.requests(finish_route(session_id))

    def reasons(self, session_id: str = "s0") -> List[str]:
        """The reasons for the session's end, one for each request that gave one."""
        return [r.json()["reason"]["type"] for r in self.finishes(session_id)]

    def details(self, session_id: str = "s0") -> List[Any]:
        return [r.json()["detail"] for r in self.finishes(session_id)]

    def wait_for_finish(self, session_id: str = "s0") -> List[str]:
        self.wait_for(finish_route(session_id))
        return self.reasons(session_id)

    def assert_ended_once(self, session_id: str = "s0") -> None:
        """Check that the session was finished exactly once, with no heartbeat after that."""
        finishes = self.finishes(session_id)
        assert len(finishes) == 1, f"{session_id} was finished {len(finishes)} times"
        # Heartbeats in flight may still arrive: those that the client has given up on at once, and
        # one that it has not, much later on a busy machine.
        late = [b for b in self.beats(session_id) if b.at > finishes[0].at + 0.1]
        assert len(late) <= 1, f"{len(late)} heartbeats of {session_id} came after its end"


def finish_route(session_id: str) -> str:
    return f"POST /api/v1/sessions/{session_id}/finish"


def _create_model(received: Received) -> Answer:
    body = received.json()
    return Answer(body={"request_id": f"{body['session_id']}:train:{body['model_seq_id']}"})


def _get_info(received: Received) -> Answer:
    return Answer(
        body={
            "model_data": {"model_name": "m"},
            "model_id": received.json()["model_id"],
            "is_lora": True,
            "lora_rank": 8,
        }
    )


def _create_sampler(received: Received) -> Answer:
    body = received.json()
    sampler = f"{body['session_id']}:sample:{body['sampling_session_seq_id']}"
    return Answer(body={"sampling_session_id": sampler})


def _result(received: Received, hold: Optional[threading.Event]) -> Answer:
    request_id = received.json()["request_id"]
    if request_id == "sample":
        sequence = {"tokens": [7], "logprobs": [-0.5], "stop_reason": "length"}
        return Answer(body={"sequences": [sequence]}, hold=hold)
    return Answer(body={"model_id": request_id}, hold=hold)
