"""Sampling, cancelling and telemetry between this client and the embedded server, end to end."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, Container, Dict, Iterator, List, Sequence

import numpy as np
import pytest
from support.scripted_server import PATIENCE_S
from support.threads import wait_until

from tinkex import RetryConfig, SamplingClient, ServiceClient, types
from tinkex.errors import BadRequestError, RequestFailedError
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.engines.engine import Finished
from tinkex.local.settings import ClientFlags, DynamicClientFlags, ServerSettings

PROMPT = types.ModelInput.from_ints([5, 17, 900, 3])
PARAMS = types.SamplingParams(max_tokens=4, seed=1)


class Engine(DeterministicEngine):
    """Samples only while the test lets it."""

    def __init__(self) -> None:
        super().__init__(vocab_size=1000, context_length=64)
        self.let_go = threading.Event()
        self.let_go.set()
        self.begun = threading.Event()

    def sample(
        self, sampler_id: str, requests: Sequence[types.SampleRequest], dropped: Container[int] = ()
    ) -> Iterator[List[Finished]]:
        self.begun.set()
        assert self.let_go.wait(PATIENCE_S)
        yield from super().sample(sampler_id, requests, dropped)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def hosted(engine: Engine) -> Iterator[LocalServer]:
    """A server with flags that the hosted service may set."""
    settings = dataclasses.replace(
        ServerSettings(),
        flags=ClientFlags(sample_join_sampling_session=True),
        dynamic_flags=DynamicClientFlags(sample_cancel_enabled=True),
        metadata_threshold_bytes=1,
    )
    with LocalServer(engine, settings=settings) as server:
        yield server
        engine.let_go.set()


@pytest.fixture
def client(hosted: LocalServer) -> Iterator[ServiceClient]:
    with ServiceClient(base_url=hosted.url, telemetry=True) as made:
        yield made


def outcome(hosted: LocalServer, request_id: Any) -> str:
    return repr(hosted._backend.futures.wait(request_id, 0))


def events(hosted: LocalServer) -> List[Dict[str, Any]]:
    found: List[Dict[str, Any]] = hosted._backend.telemetry.events()
    return found


def test_all_logprobs_that_can_be_requested_of_a_prompt(client: ServiceClient) -> None:
    sampler = client.create_sampling_client(
        base_model="deterministic", retry_config=RetryConfig(), record_stability_info=True
    )
    targets = types.TensorData.from_numpy(np.array([[17, 1], [900, 2], [3, 4]]))
    response = sampler.sample(
        PROMPT,
        2,
        PARAMS,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=2,
    ).result(PATIENCE_S)
    logprobs = response.prompt_logprobs
    assert logprobs is not None
    assert logprobs[0] is None
    found = response.target_prompt_logprobs
    assert found is not None
    assert found.shape == (3, 2)
    assert found.to_numpy()[:, 0].tolist() == logprobs[1:]  # the prompt's own tokens
    assert response.topk_prompt_logprobs is not None
    assert [row and len(row) for row in response.topk_prompt_logprobs] == [None, 3, 3, 3]
    draws = response.prompt_alt_tokens
    assert draws is not None
    assert draws.tokens.shape == draws.logprobs.shape == (3, 2)
    for sequence in response.sequences:
        assert sequence.sequence_id
        assert sequence.topk_logprobs is not None
        assert len(sequence.topk_logprobs) == len(sequence.tokens)


def test_the_last_logprobs_alone(client: ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model="deterministic")
    response = sampler.compute_logprobs(PROMPT).result(PATIENCE_S)
    assert sampler.compute_logprobs(PROMPT, 2).result(PATIENCE_S) == [None, None, *response[2:]]


def test_logprobs_of_sparse_targets_are_sparse(client: ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model="deterministic")
    response = sampler.compute_logprobs(PROMPT).result(PATIENCE_S)
    sparse = types.TensorData([17, 3], "int64", (3, 8), [0, 1, 1, 2], [6, 0])
    found = sampler.sample(PROMPT, target_prompt_logprobs=sparse).result(PATIENCE_S)
    assert found.target_prompt_logprobs is not None
    dense = found.target_prompt_logprobs.to_numpy()
    assert dense[0, 6] == response[1]
    assert dense[2, 0] == response[3]
    assert np.count_nonzero(dense) == 2


def test_a_clone_gets_a_range_of_numbers_of_its_own(
    client: ServiceClient, hosted: LocalServer
) -> None:
    original = client.create_sampling_client(base_model="deterministic")
    clones = [SamplingClient.from_sampler_handle(original.get_sampler_handle()) for _ in range(3)]
    drawn = [c.sample(PROMPT, 1, PARAMS) for c in (original, *clones) for _ in range(2)]
    tokens = [future.result(PATIENCE_S).sequences[0].tokens for future in drawn]
    assert len({tuple(sequence) for sequence in tokens}) == 1  # no client took another's number


def test_a_cancelled_sample_is_cancelled_on_the_server(
    client: ServiceClient, hosted: LocalServer, engine: Engine
) -> None:
    sampler = client.create_sampling_client(base_model="deterministic")
    engine.let_go.clear()
    running = sampler.sample(PROMPT, 1, PARAMS)
    assert engine.begun.wait(PATIENCE_S)
    queued = sampler.sample(PROMPT, 1, PARAMS)
    wait_until(lambda: queued.request_id is not None, "the server has accepted it")
    for future in (queued, running):
        assert future.cancel()
    wait_until(
        lambda: "cancelled" in outcome(hosted, queued.request_id), "the server has cancelled it"
    )
    engine.let_go.set()
    assert sampler.sample(PROMPT, 1, PARAMS).result(PATIENCE_S).sequences


def test_the_embedded_server_accepts_the_telemetry_of_the_client(
    client: ServiceClient, hosted: LocalServer
) -> None:
    sampler = client.create_sampling_client(base_model="deterministic")
    with pytest.raises((BadRequestError, RequestFailedError)):
        sampler.sample(types.ModelInput.from_ints([5000])).result(PATIENCE_S)
    client.close()
    found = events(hosted)
    assert [e["event"] for e in found] == ["SESSION_START", "GENERIC_EVENT", "SESSION_END"]
    assert {e["session_id"] for e in found} == {client.session_id}
    assert found[1]["event_name"] == "user_error"
    # Don't search the whole event: ids and timestamps may contain these digits by chance.
    assert "5000" not in repr([event.get("event_data") for event in found])
