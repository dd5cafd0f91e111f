"""The official client with the server's flags on: batch polls, clones, cancels, and the REST API.

tests/interop/test_official_client.py says how to run it.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import urllib.request
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from interop.official import official

tinker = official("0.38")
types = tinker.types

#: Serves the deterministic engine, and reports the number of requests by route on /calls; with
#: ?until=ROUTE it waits for the first of that route.
SERVE = """
import collections, json, signal, sys, threading
from tinkex.local import LocalServer, load_engine
from tinkex.local import app as application
from tinkex.local.settings import ClientFlags, DynamicClientFlags, ServerSettings

calls = collections.Counter()
called = threading.Condition()
create_app = application.create_app

def counting(*args):
    from flask import request
    app = create_app(*args)

    @app.before_request
    def count():
        with called:
            calls[request.path.rpartition("/")[2]] += 1
            called.notify_all()

    @app.get("/calls")
    def tell():
        with called:
            until = request.args.get("until")
            called.wait_for(lambda: until is None or calls[until], 30)
            return json.dumps(calls)

    return app

application.create_app = counting
settings = ServerSettings(
    flags=ClientFlags(
        sample_use_retrieve_futures=True,
        sample_join_sampling_session=True,
        proto_compress_fwdbwd=True,
    ),
    dynamic_flags=DynamicClientFlags(sample_cancel_enabled=True),
    metadata_threshold_bytes=100,
)
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # and tidy up
with LocalServer(load_engine("deterministic"), settings=settings) as server:
    print(server.url, flush=True)
    threading.Event().wait()
"""

TOKENS = [72, 101, 108, 108, 111]


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    python = os.environ.get("TINKEX_INTEROP_PYTHON", sys.executable)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [python, "-c", SERVE], stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.terminate()


@pytest.fixture(scope="module")
def service(base_url: str) -> Iterator[Any]:
    os.environ.update(TINKER_TELEMETRY="1")
    with tinker.ServiceClient(
        base_url=base_url, api_key="tml-local", display_name="flags", user_metadata={"run": "7"}
    ) as client:
        yield client


@pytest.fixture(scope="module")
def trainer(service: Any) -> Any:
    return service.create_lora_training_client(base_model="deterministic", rank=8).result()


def calls(base_url: str, until: str = "") -> Dict[str, int]:
    query = f"?until={until}" if until else ""
    with urllib.request.urlopen(f"{base_url}/calls{query}", timeout=40) as answer:
        return dict(json.loads(answer.read()))


def sample(sampler: Any, tokens: int = 4, **changes: Any) -> Any:
    asked = types.SamplingParams(max_tokens=tokens, stop=[], **changes)
    return sampler.sample(types.ModelInput.from_ints(TOKENS), 1, asked)


def test_two_hundred_samples_share_one_poller(base_url: str, service: Any) -> None:
    sampler = service.create_sampling_client(base_model="deterministic").result()
    before = calls(base_url)
    futures = [sample(sampler, seed=number) for number in range(200)]
    results = [future.result(60) for future in futures]
    assert all(len(one.sequences[0].tokens) == 4 for one in results)
    ids = {one.sequences[0].sequence_id for one in results}
    assert len(ids) == 200
    after = calls(base_url)
    assert after.get("retrieve_future", 0) - before.get("retrieve_future", 0) == 200
    assert after["retrieve_futures"] >= 1


def test_a_restored_sampler_is_a_clone_with_its_own_results(base_url: str, service: Any) -> None:
    sampler = service.create_sampling_client(base_model="deterministic").result()
    clone = pickle.loads(pickle.dumps(sampler))
    first, second = sample(sampler, seed=3), sample(clone, seed=3)
    assert first.result(60).sequences[0].tokens == second.result(60).sequences[0].tokens
    assert calls(base_url)["join_sampling_session"] == 1


def test_a_cancelled_sample_is_cancelled_on_the_server(base_url: str, service: Any) -> None:
    sampler = service.create_sampling_client(base_model="deterministic").result()
    future = sample(sampler, tokens=30_000)
    sample(sampler).result(60)  # the long sample was submitted before this one
    future.future().cancel()
    with pytest.raises(CancelledError):
        future.result(5)
    assert calls(base_url, until="cancel_future")["cancel_future"] == 1
    assert len(sample(sampler).result(60).sequences) == 1


def train(trainer: Any) -> None:
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)},
    )
    trainer.forward_backward([datum], "cross_entropy").result(60)
    trainer.optim_step(types.AdamParams(learning_rate=0.01)).result(60)


def logprob(sampler: Any) -> List[float]:
    return list(sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result(60))


def test_inflight_samplers_follow_the_run_and_snapshots_do_not(trainer: Any) -> None:
    fixed = trainer.save_weights_and_get_sampling_client().result(60)
    first = trainer.save_weights_and_get_sampling_client(kind="inflight").result(60)
    before = logprob(first)
    assert before == logprob(fixed)
    train(trainer)
    assert logprob(first) == before
    second = trainer.save_weights_and_get_sampling_client(kind="inflight").result(60)
    assert logprob(second) == logprob(first) != before
    assert logprob(fixed) == before


def test_external_weights_are_downloaded_by_signed_urls(service: Any, trainer: Any) -> None:
    rest = service.create_rest_client()
    path = trainer.save_weights_external("outside").result(60).path
    found = rest.get_external_weights_urls(path).result(60)
    assert list(found.urls) == ["deterministic.json"]
    with urllib.request.urlopen(found.urls["deterministic.json"], timeout=10) as answer:
        assert b'"steps"' in answer.read()
    rest.delete_checkpoint_from_tinker_path(path).result(60)


def test_weights_are_copied_into_a_project(service: Any, trainer: Any) -> None:
    rest = service.create_rest_client()
    path = trainer.save_state("original").result(60).path
    copy = rest.copy_weights(path, destination_project_id="p2", ttl_seconds=7200).result(60)
    assert copy != path
    listed = rest.list_training_runs(project_id="p2").result(60).training_runs
    assert [one.last_checkpoint.tinker_path for one in listed] == [copy]
    resumed = service.create_training_client_from_state_with_optimizer(copy).result(60)
    train(resumed)


def test_sessions_are_searched_and_assigned(service: Any, trainer: Any) -> None:
    rest = service.create_rest_client()
    session_id = trainer.get_info().model_id.partition(":")[0]
    rest.assign_session_project(session_id, "p3").result(60)
    asked = types.SessionSearchRequest(
        user_metadata={"run": "7"},
        project_ids=["p3"],
        owner={"type": "own"},
        statuses=[{"type": "active"}],
    )
    found = rest.search_sessions(asked).result(60)
    assert [one.session_id for one in found.sessions] == [session_id]
    assert found.sessions[0].display_name == "flags"


def test_telemetry_is_accepted(base_url: str, trainer: Any) -> None:
    assert calls(base_url, until="telemetry")["telemetry"] >= 1
