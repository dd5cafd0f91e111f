"""Tests of rl_loop.py, without a GPU or an account.  Run them with: pytest examples/testing"""

from __future__ import annotations

from typing import List

from rl_loop import train

from tinkex import ServiceClient
from tinkex.testing import CharacterTokenizer, FakeServer, faults

PROMPTS = ["Tell me a story", "Count to ten", "Why is the sky blue?"]


def reward(text: str) -> float:
    """Return the share of characters with an even code: any reward will do."""
    return sum(ord(character) % 2 == 0 for character in text) / max(1, len(text))


def run(service: ServiceClient) -> List[float]:
    """Train for eight steps."""
    return train(service, "deterministic", CharacterTokenizer(), PROMPTS, reward, steps=8)


def test_it_trains_and_saves(tinkex_server: FakeServer, tinkex_service: ServiceClient) -> None:
    rewards = run(tinkex_service)
    assert len(rewards) == 8
    rest = tinkex_service.create_rest_client()
    (saved,) = rest.list_user_checkpoints().result().checkpoints
    assert saved.checkpoint_id == "weights/final"
    (training_run,) = rest.list_training_runs().result().training_runs
    assert tinkex_server.journal.executed_steps(training_run.training_run_id) == 8
    assert tinkex_server.journal.duplicates() == []


def test_it_survives_an_outage(tinkex_server: FakeServer, tinkex_service: ServiceClient) -> None:
    undisturbed = run(tinkex_service)
    outage = tinkex_server.inject("*", faults.Drop(), call=40, times=2)
    lost = tinkex_server.inject("optim_step", faults.Drop(after_work=True), call=4)
    assert run(tinkex_service) == undisturbed
    assert len(outage.struck) == 2
    run_id = lost.struck[0].json()["model_id"]
    assert tinkex_server.journal.executed_steps(run_id) == 8
