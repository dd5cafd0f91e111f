"""SamplingParams, SampleRequest, AdamParams, LoraConfig: the fields sent, and refused values."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from tinkex.errors import InvalidInputError
from tinkex.types import (
    AdamParams,
    LoraConfig,
    ModelInput,
    SampleRequest,
    SampleResponse,
    SamplingParams,
    TensorData,
    TopkLogprobs,
)

PROMPT = ModelInput.from_ints([1, 2])


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"max_tokens": 1, "seed": 2**64 - 1, "temperature": 0, "top_k": 1, "top_p": 1},
        {"seed": -1},
        {"stop": "\n"},
        {"stop": []},
        {"stop": ["a", "b"]},
        {"stop": (1, 2)},
        {"stop": [np.int64(3)]},
        {"temperature": np.float32(0.5), "max_tokens": np.int64(5)},
    ],
    ids=repr,
)
def test_sampling_params_in_range_are_accepted(values):
    SamplingParams(**values).check()


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": "five"},
        {"max_tokens": 1e400},
        {"max_tokens": np.bool_(True)},
        {"max_tokens": np.array([5])},
        {"top_k": np.array([1, 2])},
        {"max_tokens": True},
        {"seed": "x"},
        {"seed": 0.5},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": None},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_p": [1]},
        {"top_k": 0},
        {"top_k": -2},
        {"top_k": 1.5},
        {"stop": 5},
        {"stop": {"a"}},
        {"stop": ["a", 1]},
        {"stop": [True]},
        {"stop": [None]},
        {"stop": [1.5]},
    ],
    ids=repr,
)
def test_sampling_params_out_of_range_are_refused_by_name(values):
    (name,) = values
    with pytest.raises(InvalidInputError, match=name):
        SamplingParams(**values).check()


def test_only_fields_that_are_set_are_sent():
    assert SamplingParams().to_json() == {"temperature": 1.0, "top_k": -1, "top_p": 1.0}
    assert SamplingParams(stop=[]).to_json()["stop"] == []
    assert SampleRequest(PROMPT).to_json().keys() == {
        "num_samples",
        "prompt",
        "sampling_params",
        "prompt_logprobs",
        "type",
    }


def test_a_sample_request_survives_a_json_round_trip():
    request = SampleRequest(
        PROMPT,
        num_samples=3,
        sampling_params=SamplingParams(max_tokens=5, seed=0, stop=[7]),
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=1,
        prompt_logprobs_last_n=1,
        prompt_alt_tokens_k=4,
    )
    encoded = request.to_json()
    # The buffers are left for orjson; a server sees lists.
    encoded["prompt"]["chunks"][0]["tokens"] = [1, 2]
    assert SampleRequest.from_json(encoded) == request
    assert SampleRequest.from_json({"prompt": {"chunks": []}, "new": 1, "num_samples": None}) == (
        SampleRequest(ModelInput.empty())
    )


def test_target_prompt_logprobs_survive_a_json_round_trip():
    target = TensorData([5, -1], "int64", (1, 2))
    encoded = SampleRequest(PROMPT, target_prompt_logprobs=target).to_json()
    assert encoded["target_prompt_logprobs"]["data"] is target.values
    encoded["prompt"]["chunks"][0]["tokens"] = [1, 2]
    encoded["target_prompt_logprobs"]["data"] = [5, -1]
    assert SampleRequest.from_json(encoded).target_prompt_logprobs == target


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": None},
        {"num_samples": 0},
        {"num_samples": "x"},
        {"num_samples": 1.5},
        {"num_samples": []},
        {"sampling_params": []},
        {"sampling_params": {"temperature": "x"}},
        {"topk_prompt_logprobs": -1},
        {"topk_sample_logprobs": "1"},
        {"prompt_alt_tokens_k": -1},
        {"prompt_logprobs": True, "prompt_logprobs_last_n": 0},
        {"prompt_logprobs_last_n": 3},
        {"target_prompt_logprobs": [1]},
    ],
    ids=repr,
)
def test_a_malformed_sample_request_is_refused(changes):
    payload = {"prompt": {"chunks": []}, **changes}
    with pytest.raises(InvalidInputError):
        SampleRequest.from_json(payload)


def test_a_sample_request_that_is_not_an_object_is_refused():
    with pytest.raises(InvalidInputError):
        SampleRequest.from_json(None)


def test_lists_of_logprobs_show_unknown_values_as_none():
    topk = TopkLogprobs(
        np.int32([[0, 0], [0, 8], [9, 0]]),
        np.float32([[-99999, -99999], [-1, -2], [-0.5, -99999]]),
    )
    response = SampleResponse([], np.float32([math.nan, -1, -2]), topk)
    assert response.prompt_logprobs == [None, -1.0, -2.0]
    # Token 0 with a real logprob is a token like any other.
    assert response.topk_prompt_logprobs == [None, [(0, -1.0), (8, -2.0)], [(9, -0.5)]]
    assert SampleResponse([]).prompt_logprobs is None
    assert SampleResponse([]).topk_prompt_logprobs is None


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": -1e-4},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"learning_rate": None},
        {"learning_rate": "fast"},
        {"learning_rate": ""},
        {"learning_rate": "nan"},
        {"learning_rate": True},
        {"learning_rate": 10**400},
        {"learning_rate": np.ones(2)},
        {"beta1": 1.0},
        {"beta2": 1},
        {"beta1": -0.1},
        {"eps": -1e-9},
        {"weight_decay": math.nan},
        {"grad_clip_norm": -1},
    ],
    ids=repr,
)
def test_adam_params_out_of_range_are_refused_by_name(values):
    (name,) = values
    with pytest.raises(InvalidInputError, match=name):
        AdamParams(**values).check()


def test_adam_params_in_range_are_accepted_and_newer_fields_are_sent_only_if_set():
    params = AdamParams(learning_rate=0, beta1=0, beta2=0.999, eps=0)
    params.check()
    first = {"learning_rate": 0, "beta1": 0, "beta2": 0.999, "eps": 0}
    assert params.to_wire() == first
    later = dataclasses.replace(params, weight_decay=0.1, grad_clip_norm=1)
    assert later.to_wire() == {**first, "weight_decay": 0.1, "grad_clip_norm": 1}
    assert AdamParams.from_wire({"learning_rate": 1e-3, "new": 1}).learning_rate == 1e-3


@pytest.mark.parametrize("rank", [0, -1, 1.5, "eight", "8.5", True, None, [8]])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(InvalidInputError, match="rank"):
        LoraConfig(rank=rank).check()


def test_an_adapter_without_layers_is_refused():
    LoraConfig(rank=1, train_mlp=False, train_unembed=False).check()
    with pytest.raises(InvalidInputError, match="nothing to train"):
        LoraConfig(train_attn=False, train_mlp=False, train_unembed=False).check()
