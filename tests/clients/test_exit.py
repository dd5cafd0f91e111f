"""A program that does not close its client ends without hanging, silently, and with exit code 0."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.tinker_routes import TinkerRoutes

import tinkex

SCRIPT = """
import sys
import time
from tinkex import ServiceClient, types

service = ServiceClient(base_url=sys.argv[1])
sampler = service.create_sampling_client(base_model="base")
prompt = types.ModelInput.from_ints([1])
done = sampler.sample(prompt)
done.result()
futures = [sampler.sample(prompt) for _ in range(int(sys.argv[2]))]
while not all(future.request_id for future in futures):
    time.sleep(0.01)
"""


def run_to_the_end(server: ScriptedServer, samples: int) -> float:
    """Run SCRIPT; return how long it took, in seconds."""
    root = str(Path(tinkex.__file__).resolve().parents[1])
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, server.url, str(samples)],
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE_S,
        check=False,
        env={**os.environ, "PYTHONPATH": root, "PYTHONWARNINGS": "ignore::ResourceWarning"},
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    return time.monotonic() - began


@pytest.fixture
def routes(server: ScriptedServer) -> TinkerRoutes:
    """Each sampler's first sample is done immediately, the others never."""
    made = TinkerRoutes(server)
    made.serve("client/config", Answer(body={"sample_use_retrieve_futures": True}))
    made.serve("retrieve_futures", tell_of_the_first)
    return made


def tell_of_the_first(received: Received) -> Answer:
    body = received.json()
    if body["prev_cursor"] == 0:
        first = {"state": "finished", "request_id": "asample-0"}
        return Answer(body={"completions": [first], "cursor": 1})
    hold = None if "timeout" in body else threading.Event()
    return Answer(body={"completions": [], "cursor": 1}, hold=hold)


def reports(server: ScriptedServer) -> Any:
    bodies = [r.json() for r in server.requests("POST /api/v1/retrieve_futures")]
    return [body["retrieved_request_ids"] for body in bodies if body.get("timeout") == 0.0]


def test_a_program_ends_with_hundreds_of_samples_in_flight(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    took_s = run_to_the_end(server, 300)
    assert took_s < PATIENCE_S  # time to start an interpreter, but not for a long poll
    assert [f["reason"] for f in routes.finished] == [{"type": "success"}]


def test_fetched_results_are_acknowledged_at_exit(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    run_to_the_end(server, 0)
    assert reports(server) == [["asample-0"]]
    order = [r.path.rpartition("/")[2] for r in server.requests()]
    assert order.index("finish") > len(order) - 1 - order[::-1].index("retrieve_futures")


def test_a_server_that_does_not_respond_does_not_delay_the_exit(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    never = threading.Event()

    def hang(received: Received) -> Answer:
        answer = tell_of_the_first(received)
        return Answer(hold=never) if received.json().get("timeout") == 0.0 else answer

    routes.serve("retrieve_futures", hang)
    assert run_to_the_end(server, 0) < PATIENCE_S
