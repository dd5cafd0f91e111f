"""SamplingClient: what it sends, what it makes of the answers, and sampling end to end."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, List

import numpy as np
import pytest
from support.scripted_server import PATIENCE_S, Answer, ScriptedServer
from support.tinker_routes import TinkerRoutes

from tinkex import SamplingClient, ServiceClient, sampling_client, types
from tinkex.errors import (
    BadRequestError,
    ClientClosedError,
    InvalidInputError,
    NotFoundError,
    ResponseDecodeError,
)

PROMPT = types.ModelInput.from_ints([1, 2, 3])
SAMPLER_ROUTE = "GET /api/v1/samplers/session-1:sample:0"


@pytest.fixture
def sampler(service: ServiceClient) -> SamplingClient:
    return service.create_sampling_client(base_model="deterministic")


@pytest.fixture
def scripted_sampler(scripted: ServiceClient) -> SamplingClient:
    return scripted.create_sampling_client(base_model="base")


# What is sent


def test_no_more_is_sent_than_was_asked_for(
    scripted_sampler: SamplingClient, routes: TinkerRoutes
) -> None:
    response = scripted_sampler.sample(PROMPT).result(PATIENCE_S)
    assert response.sequences[0].tokens == [5]
    assert routes.submitted("asample") == [
        {
            "num_samples": 1,
            "prompt": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]},
            "sampling_params": {"temperature": 1.0, "top_k": -1, "top_p": 1.0},
            "prompt_logprobs": False,
            "type": "sample",
            "sampling_session_id": "session-1:sample:0",
            "seq_id": 0,
        }
    ]


def test_every_argument_is_sent(scripted_sampler: SamplingClient, routes: TinkerRoutes) -> None:
    routes.serve("retrieve_future", Answer(body={"error": "enough seen", "category": "user"}))
    params = types.SamplingParams(
        max_tokens=4, seed=7, stop=["\n"], temperature=0.5, top_k=3, top_p=0.9
    )
    target = types.TensorData.from_numpy(np.array([[1], [2]]))
    scripted_sampler.sample(PROMPT, 2, params, True, 3, 4, target, 5, 2).exception(PATIENCE_S)
    sent = routes.submitted("asample")[0]
    assert sent["num_samples"] == 2
    assert sent["sampling_params"] == {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "max_tokens": 4,
        "seed": 7,
        "stop": ["\n"],
    }
    assert sent["prompt_logprobs"] is True
    assert sent["topk_prompt_logprobs"] == 3
    assert sent["topk_sample_logprobs"] == 4
    assert sent["target_prompt_logprobs"] == {"data": [1, 2], "dtype": "int64", "shape": [2, 1]}
    assert sent["prompt_alt_tokens_k"] == 5
    assert sent["prompt_logprobs_last_n"] == 2


def test_each_sample_has_its_own_number(
    scripted_sampler: SamplingClient, routes: TinkerRoutes
) -> None:
    with ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(lambda _: scripted_sampler.sample(PROMPT), range(40)))
    for future in as_completed(futures, PATIENCE_S):
        future.result(0)
    assert sorted(body["seq_id"] for body in routes.submitted("asample")) == list(range(40))


BAD_CALLS = {
    "text": lambda s: s.sample("hello"),
    "bare ints": lambda s: s.sample([1, 2, 3]),
    "no tokens": lambda s: s.sample(types.ModelInput.from_ints([])),
    "no chunks": lambda s: s.compute_logprobs(types.ModelInput.empty()),
    "no samples": lambda s: s.sample(PROMPT, 0),
    "half a sample": lambda s: s.sample(PROMPT, 1.5),
    "samples in words": lambda s: s.sample(PROMPT, "3"),
    "a dict of parameters": lambda s: s.sample(PROMPT, 1, {"temperature": 1}),
    "no new tokens": lambda s: s.sample(PROMPT, 1, types.SamplingParams(max_tokens=0)),
    "a cold temperature": lambda s: s.sample(PROMPT, 1, types.SamplingParams(temperature=-1)),
    "a NaN temperature": lambda s: s.sample(
        PROMPT, 1, types.SamplingParams(temperature=float("nan"))
    ),
    "top_p of 0": lambda s: s.sample(PROMPT, 1, types.SamplingParams(top_p=0.0)),
    "top_k of 0": lambda s: s.sample(PROMPT, 1, types.SamplingParams(top_k=0)),
    "mixed stops": lambda s: s.sample(PROMPT, 1, types.SamplingParams(stop=["a", 1])),
    "a negative top-k": lambda s: s.sample(PROMPT, topk_prompt_logprobs=-1),
    "a top-k in words": lambda s: s.sample(PROMPT, topk_sample_logprobs="5"),
    "targets in a list": lambda s: s.sample(PROMPT, target_prompt_logprobs=[[1]]),
    "last n without logprobs": lambda s: s.sample(PROMPT, prompt_logprobs_last_n=1),
    "last n beyond the prompt": lambda s: s.compute_logprobs(PROMPT, 3),
    "last 0": lambda s: s.compute_logprobs(PROMPT, 0),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_input_is_told_at_once_and_sends_nothing(
    scripted_sampler: SamplingClient, routes: TinkerRoutes, call: str
) -> None:
    before = routes.count()
    with pytest.raises(InvalidInputError):
        BAD_CALLS[call](scripted_sampler)
    assert routes.count() == before
    scripted_sampler.sample(PROMPT).result(PATIENCE_S)
    assert routes.submitted("asample")[0]["seq_id"] == 0


def test_a_seed_that_json_cannot_hold_is_an_input_error(scripted_sampler: SamplingClient) -> None:
    params = types.SamplingParams(seed=2**70)
    with pytest.raises(InvalidInputError, match="JSON"):
        scripted_sampler.sample(PROMPT, 1, params).result(PATIENCE_S)


# What is made of the answers


@pytest.mark.parametrize(
    "logprobs", [[None, -0.5, -0.25], [-0.5, -0.25]], ids=["n values", "n - 1 values"]
)
def test_there_is_one_prompt_logprob_per_token_on_every_server(
    scripted_sampler: SamplingClient, routes: TinkerRoutes, logprobs: List[Any]
) -> None:
    answer = {
        "sequences": [{"stop_reason": "length", "tokens": [5], "logprobs": [-1.0]}],
        "prompt_logprobs": logprobs,
    }
    routes.serve("retrieve_future", Answer(body=answer))
    assert scripted_sampler.compute_logprobs(PROMPT).result(PATIENCE_S) == [None, -0.5, -0.25]


def test_a_server_that_sends_no_prompt_logprobs_is_told_of(
    scripted_sampler: SamplingClient,
) -> None:
    with pytest.raises(ResponseDecodeError, match="no prompt logprobs"):
        scripted_sampler.compute_logprobs(PROMPT).result(PATIENCE_S)


def test_sequences_carry_the_ids_of_the_submission(
    scripted_sampler: SamplingClient, routes: TinkerRoutes
) -> None:
    accept = routes.accept
    routes.serve(
        "asample",
        lambda r: Answer(body={**accept(r).body, "sample_sequence_ids": ["q-1"]}),
        accept,
    )
    named = scripted_sampler.sample(PROMPT).result(PATIENCE_S)
    unnamed = scripted_sampler.sample(PROMPT).result(PATIENCE_S)
    assert [r.sequences[0].sequence_id for r in (named, unnamed)] == ["q-1", None]


def test_the_base_model_is_asked_for_once(scripted: ServiceClient, server: ScriptedServer) -> None:
    info = {"sampler_id": "session-1:sample:0", "base_model": "base"}
    server.on(SAMPLER_ROUTE, Answer(body=info))
    known = scripted.create_sampling_client(base_model="given")
    assert known.get_base_model() == "given"
    assert server.requests(SAMPLER_ROUTE) == []
    asked = scripted.create_sampling_client("tinker://x/sampler_weights/a")
    assert [asked.get_base_model(), asked.get_base_model()] == ["base", "base"]
    assert len(server.requests(SAMPLER_ROUTE)) == 1


def test_the_tokenizer_is_the_servers_or_that_of_the_known_base_model(
    scripted: ServiceClient, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []
    monkeypatch.setattr(sampling_client, "load_tokenizer", lambda *a: asked.append(a))
    info = {"sampler_id": "session-1:sample:0", "base_model": "base", "tokenizer_id": "org/tok"}
    server.on(SAMPLER_ROUTE, Answer(body=info), Answer(404, {"detail": "no such route"}))
    scripted.create_sampling_client(base_model="given").get_tokenizer()
    scripted.create_sampling_client(base_model="given").get_tokenizer()
    assert asked == [("base", "org/tok"), ("given",)]
    with pytest.raises(NotFoundError):
        scripted.create_sampling_client("tinker://x/s").get_tokenizer()


def test_samples_do_not_wait_for_each_other(
    scripted_sampler: SamplingClient, routes: TinkerRoutes, server: ScriptedServer
) -> None:
    never = threading.Event()
    routes.serve("asample", Answer(hold=never), routes.accept)
    stuck = scripted_sampler.sample(PROMPT)
    server.wait_for("POST /api/v1/asample")
    assert scripted_sampler.sample(PROMPT).result(PATIENCE_S).sequences
    assert not stuck.done()


# End to end


def test_samples_are_batched_and_repeatable_by_their_seed(sampler: SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=6, seed=3)
    first = sampler.sample(PROMPT, 3, params).result(PATIENCE_S)
    again = sampler.sample(PROMPT, 3, params).result(PATIENCE_S)
    assert len(first.sequences) == 3
    assert [s.tokens for s in first.sequences] == [s.tokens for s in again.sequences]
    other = sampler.sample(PROMPT, 3, types.SamplingParams(max_tokens=6, seed=4))
    assert [s.tokens for s in first.sequences] != [
        s.tokens for s in other.result(PATIENCE_S).sequences
    ]
    for sequence in first.sequences:
        assert sequence.stop_reason in ("length", "stop")
        assert sequence.tokens_np.dtype == np.int32
        assert sequence.logprobs_np is not None
        assert sequence.logprobs_np.shape == sequence.tokens_np.shape
    assert len({s.sequence_id for s in first.sequences}) == 3


def test_greedy_samples_are_all_the_same(sampler: SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=5, temperature=0.0)
    sequences = sampler.sample(PROMPT, 4, params).result(PATIENCE_S).sequences
    assert len({tuple(s.tokens) for s in sequences}) == 1


def test_logprobs_of_a_prompt_are_those_of_training(
    service: ServiceClient, sampler: SamplingClient
) -> None:
    trainer = service.create_lora_training_client("deterministic")
    tokens = [5, 17, 900, 3, 8]
    data = types.Datum(types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
    output = trainer.forward([data], "cross_entropy").result(PATIENCE_S)
    expected = output.loss_fn_outputs[0]["logprobs"].tolist()
    prompt = types.ModelInput.from_ints(tokens)
    assert sampler.compute_logprobs(prompt).result(PATIENCE_S) == [None, *expected]
    whole = sampler.sample(
        prompt, 1, types.SamplingParams(max_tokens=1), True, topk_prompt_logprobs=2
    ).result(PATIENCE_S)
    assert whole.prompt_logprobs == [None, *expected]
    assert whole.topk_prompt_logprobs is not None
    assert len(whole.topk_prompt_logprobs) == 5
    assert whole.topk_prompt_logprobs[0] is None


def test_many_samples_at_once(sampler: SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=3)
    futures = [sampler.sample(types.ModelInput.from_ints([n + 1]), 1, params) for n in range(150)]
    alone = sampler.sample(types.ModelInput.from_ints([150]), 1, params).result(PATIENCE_S)
    results = [future.result(PATIENCE_S) for future in futures]
    assert [len(r.sequences) for r in results] == [1] * 150
    assert results[149].sequences[0].tokens == alone.sequences[0].tokens


def test_the_servers_refusals_are_typed_and_sampling_goes_on(sampler: SamplingClient) -> None:
    with pytest.raises(BadRequestError, match="token 5000"):
        sampler.sample(types.ModelInput.from_ints([5000])).result(PATIENCE_S)
    with pytest.raises(BadRequestError, match="64"):
        sampler.sample(types.ModelInput.from_ints([1] * 80)).result(PATIENCE_S)
    response = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=2)).result(PATIENCE_S)
    assert len(response.sequences[0].tokens) <= 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, InvalidInputError),
        ({"model_path": "tinker://x/y", "base_model": "b"}, InvalidInputError),
        ({"model_path": "weights/a"}, InvalidInputError),
        ({"base_model": ""}, InvalidInputError),
        ({"base_model": "nobody/has-this"}, BadRequestError),
        ({"model_path": "tinker://nobody/sampler_weights/x"}, NotFoundError),
    ],
)
def test_a_sampler_of_nothing(service: ServiceClient, arguments: Any, error: Any) -> None:
    with pytest.raises(error):
        service.create_sampling_client(**arguments)
    assert service.create_sampling_client(base_model="deterministic").sampling_session_id


def test_a_closed_sampler_says_so(service: ServiceClient, sampler: SamplingClient) -> None:
    with sampler as same:
        assert same is sampler
    for call in (
        lambda: sampler.sample(PROMPT),
        lambda: sampler.compute_logprobs(PROMPT),
        lambda: sampler.get_tokenizer(),
    ):
        with pytest.raises(ClientClosedError, match="SamplingClient"):
            call()
    assert service.create_sampling_client(base_model="deterministic").sampling_session_id


def test_a_client_is_its_own_result(sampler: SamplingClient) -> None:
    assert sampler.result() is sampler
    assert "deterministic" in repr(sampler)
