"""No work is done twice, however a server treats numbers and whichever answers are lost.

A run is driven at random against four kinds of servers (docs/servers.md), each of which loses some
requests before executing them and some answers afterwards.
"""

from __future__ import annotations

import random
import threading
from typing import Dict, List, Set, Tuple

import pytest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.tinker_routes import TinkerRoutes

from tinkex import ServiceClient, types
from tinkex.errors import (
    APIConnectionError,
    InternalServerError,
    RequestFailedError,
    ResultExpiredError,
)
from tinkex.wire.codec import codec_for

#: Steps with this learning rate or a higher one fail.
BAD = 0.5

#: Stands for a pass without effect.
FILLER = -1.0

#: What the client gets in place of a lost answer.
SILENCE = [Answer(drop=True)]
ERRORS = [Answer(500, {"detail": "gateway"}), Answer(503, b"", content_type="text/html")]


#: The errors of a call whose answers were all lost.
UNANSWERED = (APIConnectionError, InternalServerError)


class Counting:
    """Steps of one run, distinguished by their learning rates, on one kind of server.

    kind: ``"waits"`` for a missing number (the embedded server), runs in order of ``"arrival"``
        (SkyRL), knows only the ``"first"`` body of a number (hatchery-core), or is ``"strict"``
        (TuFT): it counts nothing but successes.
    lost: the possible replacements of a lost answer.
    """

    def __init__(
        self, kind: str, routes: TinkerRoutes, chances: random.Random, lost: List[Answer]
    ) -> None:
        self.kind = kind
        self.ran: List[float] = []
        self.fillers = 0
        self._broken: Set[float] = set()
        self.losing = True
        self._routes = routes
        self._chances = chances
        self._lost = lost
        self._next = 1
        self._seen: Dict[int, Tuple[bytes, Answer]] = {}
        self._early: Dict[int, float] = {}
        # Requests arrive over several connections; only those of the run's lane are in order.
        self._lock = threading.Lock()
        for route in ("optim_step", "forward_backward", "forward"):
            routes.serve(route, self.accept)

    def accept(self, received: Received) -> Answer:
        seq_id, rate = _read(received)
        with self._lock:
            chance = self._chances.random() if self.losing else 1.0
            lost = self._chances.choice(self._lost) if len(self._lost) > 1 else self._lost[0]
            if self._lost is ERRORS and 0.9 < chance < 1.0 and rate != FILLER:
                self._broken.add(rate)  # whatever happens to it, its answer is 500 from now on
            if chance < 0.2:
                return lost  # before it was executed
            answer = self._take(received, seq_id, rate)
            if rate in self._broken:
                return ERRORS[0]
            return lost if chance < 0.4 else answer

    def _take(self, received: Received, seq_id: int, rate: float) -> Answer:
        if self.kind == "strict":
            return self._count(seq_id, rate)
        if seq_id in self._seen:
            known, answer = self._seen[seq_id]
            if self.kind != "first" and known != received.body:
                return Answer(409, {"detail": f"seq_id {seq_id} was used for another request"})
            return answer
        answer = self._result(rate)
        self._seen[seq_id] = received.body, answer
        self._early[seq_id] = rate
        while self._early and (self.kind != "waits" or self._next in self._early):
            number = self._next if self.kind == "waits" else seq_id
            self._run(self._early.pop(number))
            self._next += 1
        return answer

    def _count(self, seq_id: int, rate: float) -> Answer:
        if seq_id != self._next:
            text = f"Future failed: Sequence conflict: expected {self._next}, got {seq_id}."
            return self._routes.accepted("optim_step", Answer(409, {"detail": text}))
        self._next += rate < BAD
        self._run(rate)
        return self._result(rate)

    def _run(self, rate: float) -> None:
        if rate == FILLER:
            self.fillers += 1
        elif rate < BAD:
            self.ran.append(rate)

    def _result(self, rate: float) -> Answer:
        failed = Answer(body={"error": "a bad step", "category": "user"})
        done = Answer(body={"metrics": {"learning_rate:mean": rate}})
        return self._routes.accepted("optim_step", done if rate < BAD else failed)


def _read(received: Received) -> Tuple[int, float]:
    """Return the number of a request, and the learning rate of its step."""
    if received.path.endswith("optim_step"):
        body = received.json()
        return body["seq_id"], body["adam_params"]["learning_rate"]
    codec = codec_for(received.headers["content-type"])
    filler = codec.decode_forward_backward(received.body)
    assert filler.forward_only  # the only other requests fill numbers
    return filler.seq_id, FILLER


@pytest.fixture(autouse=True)
def three_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    def delay_s(self: object, attempt: int, *args: object) -> object:
        return 0.0005 if attempt < 3 else None

    monkeypatch.setattr("tinkex.retry.RetryPolicy.delay_s", delay_s)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("lost", [SILENCE, ERRORS], ids=["silence", "errors"])
@pytest.mark.parametrize("kind", ["waits", "arrival", "first", "strict"])
def test_every_step_is_executed_at_most_once_and_in_order(
    server: ScriptedServer, routes: TinkerRoutes, kind: str, lost: List[Answer], seed: int
) -> None:
    chances = random.Random(f"{kind} {seed}")
    steps = Counting(kind, routes, random.Random(seed), lost)
    succeeded: List[float] = []  # steps whose results arrived
    with ServiceClient(base_url=server.url) as service:
        trainer = service.create_lora_training_client("base")
        for burst in range(12):
            rates = [burst * 0.01 + n * 0.001 for n in range(chances.choice([1, 1, 3]))]
            rates = [rate + (BAD if chances.random() < 0.2 else 0.0) for rate in rates]
            if burst == 11:
                steps.losing = False
                rates = [0.4]
            futures = [trainer.optim_step(types.AdamParams(learning_rate=r)) for r in rates]
            for rate, future in zip(rates, futures):
                error = future.exception(PATIENCE_S)
                for _ in range(10):  # repeats the call while it is the last one
                    again = len(rates) == 1 and isinstance(error, UNANSWERED)
                    if not again or chances.random() < 0.5:
                        break
                    future = trainer.optim_step(types.AdamParams(learning_rate=rate))
                    error = future.exception(PATIENCE_S)
                if error is None:
                    metrics = future.result().metrics
                    assert metrics == {"learning_rate:mean": rate}  # its own result, not another's
                    succeeded.append(rate)
                else:
                    assert isinstance(error, (*UNANSWERED, ResultExpiredError)) or (
                        rate >= BAD and isinstance(error, RequestFailedError)
                    ), repr(error)
    assert succeeded[-1] == 0.4  # the run continues
    assert steps.ran == sorted(set(steps.ran))  # in order, none twice
    assert set(succeeded) <= set(steps.ran)
