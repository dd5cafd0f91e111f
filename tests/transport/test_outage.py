"""An unreachable server: at the start it is reported soon, later the client waits for it."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Iterator

import pytest
from support.relay import Relay
from support.scripted_server import PATIENCE_S, Answer, ScriptedServer
from support.threads import promptly, wait_until
from support.tinker_routes import TinkerRoutes

from tinkex import ServiceClient, types
from tinkex.errors import (
    APIConnectionError,
    APIStatusError,
    AuthenticationError,
    NotFoundError,
    ResponseDecodeError,
    SessionLostError,
)
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine

ADAM = types.AdamParams(learning_rate=0.01)
DATUM = types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
PROMPT = types.ModelInput.from_ints([1, 2, 3])


@pytest.fixture
def relay(local: LocalServer) -> Iterator[Relay]:
    with Relay(local.url) as running:
        yield running


def test_a_run_survives_an_outage(relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    with ServiceClient(base_url=relay.url) as service, ThreadPoolExecutor(2) as pool:
        trainer = service.create_lora_training_client("deterministic")
        sampler = service.create_sampling_client(base_model="deterministic")
        trainer.train_step([DATUM], "cross_entropy", ADAM)
        sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=2)).result(PATIENCE_S)
        with caplog.at_level(logging.INFO, "tinkex"):
            relay.cut()
            step = pool.submit(trainer.train_step, [DATUM], "cross_entropy", ADAM)
            sample = pool.submit(
                sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=2)).result, PATIENCE_S
            )
            wait_until(lambda: caplog.text.count("; attempt 1") >= 2, "both have met the outage")
            relay.restore()
            metrics = step.result(PATIENCE_S).optim.metrics
            assert metrics is not None
            assert metrics["optimizer_steps:max"] == 2.0
            assert len(sample.result(PATIENCE_S).sequences) == 1
    assert relay.url.rpartition("/")[2] in caplog.text
    assert "Connection refused" in caplog.text


def test_a_result_finished_during_an_outage_is_fetched_after_it(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    hold = threading.Event()
    with Relay(server.url) as relay, ServiceClient(base_url=relay.url) as service:
        trainer = service.create_lora_training_client("base")
        routes.serve("retrieve_future", Answer(hold=hold), routes.retrieve)
        polls = len(server.requests("POST /api/v1/retrieve_future"))
        future = trainer.optim_step(ADAM)
        server.wait_for("POST /api/v1/retrieve_future", polls + 1)
        relay.cut()
        wait_until(lambda: future.status().last_error is not None, "the outage is noticed")
        relay.restore()
        assert future.result(PATIENCE_S).metrics == {"grad_norm:mean": 1.0}
    assert len(routes.submitted("optim_step")) == 1


def test_the_embedded_server_is_restarted_during_a_run(tmp_path: Any) -> None:
    # Sessions do not outlive their server: work that had begun fails with typed errors.
    first = LocalServer(DeterministicEngine(), data_dir=tmp_path)
    first.start()
    port = int(first.url.rpartition(":")[2])
    with ServiceClient(base_url=first.url, heartbeat_interval_s=0.2) as service:
        trainer = service.create_lora_training_client("deterministic")
        trainer.train_step([DATUM], "cross_entropy", ADAM)
        path = trainer.save_state("kept").result(PATIENCE_S).path
        first.close()
        with LocalServer(DeterministicEngine(), data_dir=tmp_path, port=port) as second:
            assert second.url == first.url
            with pytest.raises((APIStatusError, SessionLostError)):
                trainer.forward_backward([DATUM], "cross_entropy").result(PATIENCE_S)
            with ServiceClient(base_url=second.url) as again:
                resumed = again.create_training_client_from_state_with_optimizer(path)
                metrics = resumed.train_step([DATUM], "cross_entropy", ADAM).optim.metrics
                assert metrics is not None
                assert metrics["optimizer_steps:max"] == 2.0


# At the start


def construct(base_url: str, **settings: Any) -> ServiceClient:
    return ServiceClient(base_url=base_url, **settings)


def test_no_server_at_the_address(server: ScriptedServer) -> None:
    port = server.port
    server.close()
    with promptly():
        with pytest.raises(APIConnectionError) as caught:
            construct(f"http://127.0.0.1:{port}", startup_timeout_s=0.4)
    text = str(caught.value)
    assert f"127.0.0.1:{port}" in text
    assert "Connection refused" in text
    assert caught.value.attempts is not None


def test_the_client_waits_for_a_server_that_starts_a_moment_later(local: LocalServer) -> None:
    with Relay(local.url) as relay, ThreadPoolExecutor(1) as pool:
        relay.cut()
        waiting = pool.submit(construct, relay.url)
        relay.restore()
        with waiting.result(PATIENCE_S) as service:
            assert service.session_id


def test_a_server_that_never_responds(server: ScriptedServer) -> None:
    server.on("POST /api/v1/create_session", Answer(hold=threading.Event()))
    with promptly():
        with pytest.raises(APIConnectionError, match=f"127.0.0.1:{server.port}"):
            construct(server.url, startup_timeout_s=0.3)


@pytest.mark.usefixtures("short_backoff")
@pytest.mark.parametrize(
    ("answer", "error", "part"),
    [
        (Answer(401, {"detail": "no key"}), AuthenticationError, "TINKER_API_KEY"),
        (Answer(404, b"404 page not found", content_type="text/plain"), NotFoundError, "not found"),
        (Answer(200, b"<html>", content_type="text/html"), ResponseDecodeError, "base_url"),
        (Answer(200, {"nothing": 1}), ResponseDecodeError, "session_id"),
        (Answer(301, headers={"Location": "/login"}), APIStatusError, "301"),
    ],
)
def test_another_program_at_the_address(
    server: ScriptedServer, answer: Answer, error: Any, part: str
) -> None:
    server.on("POST /api/v1/create_session", answer)
    with pytest.raises(error) as caught:
        construct(server.url)
    assert part in str(caught.value)
    assert "create_session" in str(caught.value)


def test_a_key_that_the_embedded_server_does_not_know() -> None:
    with LocalServer(DeterministicEngine(), api_key="right") as local:
        for key in ("wrong", None):
            with pytest.raises(AuthenticationError):
                construct(local.url, api_key=key)
        with construct(local.url, api_key="right\n") as service:
            assert service.get_server_capabilities().supported_models
