"""The client's loop while the server is slow, busy, or hangs up."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from typing import Any, Callable, Dict, Iterable

import pytest
from servers import loop as steps
from servers.loop import ADAM, WAIT_S, Loop, datum
from servers.profiles.call import crash, json_answer
from servers.profiles.layer import ProfileLayer
from servers.raw import Raw, rl_datum
from servers.test_client_loop import loop

from tinkex.errors import ResultExpiredError

__all__ = ["loop"]  # the fixture

Environ = Dict[str, Any]
Serve = Callable[[Environ, Any], Iterable[bytes]]
#: Given a route, how often it was requested, and the proper way to serve it, returns the way to
#: use.
Fault = Callable[[str, int, Serve], Serve]


class Faults:
    """Sits between HTTP and the server: `fault` may answer in the server's place."""

    def __init__(self) -> None:
        self.fault: Fault = lambda route, count, serve: serve
        self._lock = threading.Lock()  # guards the counts
        self.counts: Counter[str] = Counter()

    def serve(self, inner: Serve, environ: Environ, start: Any) -> Iterable[bytes]:
        route = environ["PATH_INFO"].replace("/api/v1/", "")
        with self._lock:
            self.counts[route] += 1
            count = self.counts[route]
        return self.fault(route, count, inner)(environ, start)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    found = Faults()
    inner = ProfileLayer.__call__

    def serve(self: ProfileLayer, environ: Environ, start: Any) -> Iterable[bytes]:
        return found.serve(lambda e, s: inner(self, e, s), environ, start)

    monkeypatch.setattr(ProfileLayer, "__call__", serve)
    return found


def losing(serve: Serve) -> Serve:
    """Have the server do the work, and lose its answer."""

    def serve_and_hang_up(environ: Environ, start: Any) -> Iterable[bytes]:
        answer = serve(environ, start)
        environ["waitress.client_disconnected"].__self__.socket.shutdown(socket.SHUT_RDWR)
        return answer

    return serve_and_hang_up


def test_polls_cut_short_and_slow_submissions(loop: Loop, faults: Faults) -> None:
    pause = threading.Event()

    def busy(route: str, count: int, serve: Serve) -> Serve:
        if route == "retrieve_future" and count % 5 == 1:
            return json_answer({"detail": "Timeout waiting for result"}, 408)
        if route in ("forward_backward", "optim_step", "asample"):
            pause.wait(0.005)  # other requests overtake it
        return serve

    faults.fault = busy
    steps.pipelined_steps(loop)
    steps.sixty_four_samples_at_once(loop)
    steps.unknown_loss(loop)


def test_the_client_survives_crashes_and_resets(loop: Loop, faults: Faults) -> None:
    loop.trainer.train_step([datum()], "cross_entropy", ADAM)  # the dialect is settled
    crashing = ("optim_step", "retrieve_future", "asample")

    def fault(route: str, count: int, serve: Serve) -> Serve:
        return crash() if route in crashing and count == 3 else serve

    faults.fault = fault
    faults.counts.clear()
    steps.pipelined_steps(loop)
    steps.ephemeral_sampler(loop)
    steps.ephemeral_sampler(loop)
    steps.ephemeral_sampler(loop)
    assert min(faults.counts[route] for route in crashing) > 3


def test_a_lost_response_is_requested_again(loop: Loop, faults: Faults) -> None:
    trainer = loop.trainer
    trainer.train_step([datum()], "cross_entropy", ADAM)
    faults.counts.clear()
    faults.fault = lambda route, count, serve: (
        losing(serve) if route == "optim_step" and count == 2 else serve
    )
    steps.pipelined_steps(loop) if loop.profile != "tuft-0.2" else _lost_for_good(trainer)
    assert faults.counts["optim_step"] > 3


def _lost_for_good(trainer: Any) -> None:
    """Check that a server without repeat detection loses the result, and that the run continues."""
    trainer.train_step([datum()], "cross_entropy", ADAM)
    trainer.forward_backward([datum()], "cross_entropy").result(WAIT_S)
    with pytest.raises(ResultExpiredError, match="was done"):
        trainer.optim_step(ADAM).result(WAIT_S)
    trainer.train_step([datum()], "cross_entropy", ADAM)


def test_a_pending_request_is_waited_for(raw: Raw, loop: Loop, faults: Faults) -> None:
    polled = threading.Event()

    def watch(route: str, count: int, serve: Serve) -> Serve:
        if route == "retrieve_future" and count >= 4:
            polled.set()
        return serve

    trainer = loop.trainer
    raw.engine.gate.clear()
    faults.counts.clear()
    faults.fault = watch
    waiting = trainer.forward_backward([rl_datum()], "cispo")
    behind = trainer.optim_step(ADAM)
    assert polled.wait(WAIT_S)
    assert not waiting.done()
    raw.engine.gate.set()
    waiting.result(WAIT_S)
    behind.result(WAIT_S)
