"""Traffic on the wire: a request that a server refused is not tried on that server again."""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from typing import Any, Callable, Dict, Iterable, List, Tuple

import pytest
from servers.loop import ADAM, WAIT_S, datum
from servers.profiles.layer import ProfileLayer
from servers.raw import KEY, Raw
from support.threads import race

import tinkex
from tinkex.types import ModelInput, SamplingParams

_SESSION = re.compile(r"(?<=sessions/)[^/]+")

#: The requests of a typical program that each server refuses, once each, as (route, status).
REFUSED: Dict[str, Dict[Tuple[str, int], int]] = {
    "hosted": {},
    "skyrl-0.3": {
        ("forward_backward", 500): 1,
        ("load_weights", 422): 1,
        ("sessions/ID/finish", 404): 1,
    },
    "skyrl-0.4": {("load_weights", 422): 1, ("sessions/ID/finish", 404): 1},
    "tuft-0.2": {("load_weights", 400): 1, ("sessions/ID/finish", 404): 1},
    "hatchery-0.3": {
        ("forward_backward", 500): 1,
        ("load_weights", 422): 1,
        ("sessions/ID/finish", 404): 1,
    },
}


class Traffic:
    """Every request that reached the server, as (route, status)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the list
        self.seen: List[Tuple[str, int]] = []

    def note(self, route: str, status: int) -> None:
        with self._lock:
            self.seen.append((_SESSION.sub("ID", route), status))

    def refused(self) -> Dict[Tuple[str, int], int]:
        """Count refusals; a poll that ends before the result is ready (408) is not one."""
        pairs = (pair for pair in self.seen if pair != ("retrieve_future", 408))
        return dict(Counter(pair for pair in pairs if pair[1] >= 400))


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    found = Traffic()
    inner = ProfileLayer.__call__

    def serve(
        self: ProfileLayer, environ: Dict[str, Any], start: Callable[..., Any]
    ) -> Iterable[bytes]:
        route = environ["PATH_INFO"].replace("/api/v1/", "")

        def noting(status: str, headers: Any, exc_info: Any = None) -> Any:
            found.note(route, int(status.split()[0]))
            return start(status, headers)

        return inner(self, environ, noting)

    monkeypatch.setattr(ProfileLayer, "__call__", serve)
    return found


def client(raw: Raw) -> tinkex.ServiceClient:
    key = None if raw.profile.startswith("skyrl") else KEY
    return tinkex.ServiceClient(base_url=raw.server.url, api_key=key)


def test_a_refused_request_is_not_tried_again(
    raw: Raw, traffic: Traffic, caplog: pytest.LogCaptureFixture
) -> None:
    """Two sessions in a row, each using all features."""
    caplog.set_level(logging.INFO, logger="tinkex")
    for _ in range(2):
        with client(raw) as service:
            trainer = service.create_lora_training_client("deterministic", rank=4)
            trainer.train_step([datum()], "cross_entropy", ADAM)
            path = trainer.save_state("c1").result(WAIT_S).path
            resumed = service.create_training_client_from_state_with_optimizer(path)
            resumed.train_step([datum()], "cross_entropy", ADAM)
            resumed.forward([datum()], "cross_entropy").result(WAIT_S)
            sampler = resumed.save_weights_and_get_sampling_client()
            params = SamplingParams(max_tokens=2)
            sampler.sample(ModelInput.from_ints([1, 2]), 1, params).result(WAIT_S)
    assert traffic.refused() == REFUSED[raw.profile]
    # Nor is a connection reused after a plain-text 500, when the server has closed it.
    assert "cannot reach" not in caplog.text


def test_concurrent_first_passes_settle_the_encoding_once(raw: Raw, traffic: Traffic) -> None:
    with client(raw) as service:
        trainers = [service.create_lora_training_client("deterministic") for _ in range(6)]

        def first(trainer: tinkex.TrainingClient) -> Callable[[], Any]:
            return lambda: trainer.train_step([datum()], "cross_entropy", ADAM)

        outcomes = race(*(first(trainer) for trainer in trainers))
    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    unread = raw.profile in ("skyrl-0.3", "hatchery-0.3")
    refused = [pair for pair in traffic.refused().items() if pair[0][0] == "forward_backward"]
    assert refused == ([(("forward_backward", 500), 1)] if unread else [])
