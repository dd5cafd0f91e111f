"""Numbers and flags of every kind that callers pass: Python, numpy, torch, pandas, text."""

from __future__ import annotations

import decimal
import fractions
import math
import warnings
from typing import Any

import numpy as np
import pytest

from tinkex._runtime.numeric import as_int, as_seconds, is_finite, to_bool, to_float, to_int
from tinkex.errors import ConfigError, InvalidInputError
from tinkex.types import (
    AdamParams,
    DimuonParams,
    ImageChunk,
    LoraConfig,
    ModelInput,
    SampleRequest,
    SamplingParams,
)
from tinkex.types.optimizer import optim_params_to_wire

EIGHTS = [8, 8.0, np.int8(8), np.uint64(8), np.float32(8), np.float64(8), np.array(8), "8", " 8\n"]
EIGHTS += ["8.0", np.str_("8"), np.array(8.0), decimal.Decimal(8), fractions.Fraction(8)]

HALVES = [0.5, np.float16(0.5), np.float32(0.5), np.float64(0.5), np.array(0.5), "0.5", "5e-1"]
HALVES += [decimal.Decimal("0.5"), fractions.Fraction(1, 2), np.array(0.5, np.float16)]

NO_NUMBERS = [None, True, False, np.bool_(True), np.array(True), "", "x", "1,5", b"8", [8], (8,)]
NO_NUMBERS += [
    np.array([8]),
    np.array([]),
    {},
    object(),
    1j,
    np.complex64(1),
    np.datetime64("nat", "s"),
]


@pytest.mark.parametrize("value", EIGHTS, ids=repr)
def test_any_integer_like_value_becomes_an_integer(value: Any) -> None:
    assert type(to_int(value)) is int
    assert to_int(value) == 8
    assert to_float(value) == 8


@pytest.mark.parametrize("value", HALVES, ids=repr)
def test_any_number_like_value_becomes_a_float(value: Any) -> None:
    assert type(to_float(value)) is float
    assert to_float(value) == 0.5
    assert to_int(value) is value


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_other_values_are_left_unchanged_by_number_conversion(value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_int(value) is value
        assert to_float(value) is value


def test_tensors_without_dimensions_are_numbers() -> None:
    torch = pytest.importorskip("torch")
    assert to_int(torch.tensor(8)) == 8
    assert to_float(torch.tensor(0.5, requires_grad=True)) == 0.5
    assert type(to_int(torch.tensor([8]))) is torch.Tensor


def test_text_is_a_number_only_if_requested() -> None:
    assert to_int("8", text=False) == "8"
    assert to_float("0.5", text=False) == "0.5"
    assert to_int("9" * 5000) == "9" * 5000


@pytest.mark.parametrize("value", [True, 1, np.bool_(True), np.array(True), "true", "YES", "on "])
def test_flags_that_are_on(value: Any) -> None:
    assert to_bool(value) is True


@pytest.mark.parametrize("value", [False, 0, np.bool_(False), "false", "No", "off", "0"])
def test_flags_that_are_off(value: Any) -> None:
    assert to_bool(value) is False


@pytest.mark.parametrize("value", [None, 2, "maybe", "", [], 0.5], ids=repr)
def test_other_values_are_left_unchanged_by_flag_conversion(value: Any) -> None:
    assert to_bool(value) is value


def test_a_number_is_finite_only_if_a_float_can_hold_it() -> None:
    assert is_finite(1)
    assert is_finite(1.5)
    for value in (math.nan, math.inf, 10**400, True, "1", None):
        assert not is_finite(value)


def test_an_argument_that_is_not_an_integer_is_refused_with_its_limits() -> None:
    assert as_int("limit", np.int64(5), 1, most=200) == 5
    with pytest.raises(InvalidInputError, match=r"limit is 5\.5; it must be an integer, 1 or more"):
        as_int("limit", 5.5, 1)
    with pytest.raises(ConfigError, match="limit is 201; it must be an integer, 1 to 200"):
        as_int("limit", 201, 1, most=200, error=ConfigError)


def test_a_timeout_is_a_number_of_seconds_or_none() -> None:
    assert as_seconds("timeout", np.float32(2.5)) == 2.5
    assert as_seconds("timeout", None) is None
    assert as_seconds("timeout", math.inf) is None
    for value in ("5", math.nan, [5], True):
        with pytest.raises(InvalidInputError, match="timeout"):
            as_seconds("timeout", value)


# ---- The types that hold numbers ----


@pytest.mark.parametrize("value", EIGHTS, ids=repr)
def test_parameters_accept_integers_of_any_kind(value: Any) -> None:
    params = SamplingParams(max_tokens=value, seed=value, top_k=value, stop=[np.int64(8)])
    params.check()
    assert params == SamplingParams(max_tokens=8, seed=8, top_k=8, stop=[8])
    assert {type(number) for number in (params.max_tokens, params.seed, params.top_k)} == {int}
    lora = LoraConfig(rank=value, seed=value)
    lora.check()
    assert lora.to_wire() == LoraConfig(rank=8, seed=8).to_wire()
    prompt = ModelInput.from_ints([1, 2])
    request = SampleRequest(
        prompt, value, topk_prompt_logprobs=value, topk_sample_logprobs=value,
        prompt_alt_tokens_k=value, prompt_logprobs=True, prompt_logprobs_last_n=value,
    )  # fmt: skip
    request.check()
    assert request.num_samples == request.prompt_logprobs_last_n == 8
    assert ImageChunk(b"", "png", value).length == 8


@pytest.mark.parametrize("value", HALVES, ids=repr)
def test_parameters_accept_numbers_of_any_kind(value: Any) -> None:
    params = SamplingParams(temperature=value, top_p=value)
    params.check()
    assert params.to_json() == {"temperature": 0.5, "top_k": -1, "top_p": 0.5}
    adam = AdamParams(value, value, value, value, value, value)
    assert optim_params_to_wire(adam) == optim_params_to_wire(AdamParams(*[0.5] * 6))
    assert optim_params_to_wire(DimuonParams(value)) == optim_params_to_wire(DimuonParams(0.5))


def test_text_from_yaml_is_a_learning_rate() -> None:
    assert AdamParams(learning_rate="1e-4").learning_rate == 1e-4  # type: ignore[arg-type]


def test_layers_are_chosen_by_flags_of_any_kind() -> None:
    lora = LoraConfig(train_mlp="false", train_attn=np.bool_(True), train_unembed=0)  # type: ignore[arg-type]
    lora.check()
    assert (lora.train_mlp, lora.train_attn, lora.train_unembed) == (False, True, False)
    with pytest.raises(InvalidInputError, match="train_mlp is 'perhaps'; it must be True or False"):
        LoraConfig(train_mlp="perhaps").check()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 5.5}, "max_tokens is 5.5; it must be an integer, at least 1, or None"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be an integer, at least 1, or -1 for all"),
        ({"top_p": "most"}, r"top_p is 'most'; it must be a number in \(0, 1\]"),
        ({"temperature": math.inf}, "temperature is inf; it must be a finite number, 0 or more"),
    ],
    ids=repr,
)
def test_messages_name_the_actual_fault(params: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        SamplingParams(**params).check()


def test_a_list_of_stops_is_copied() -> None:
    stops = ["a"]
    params = SamplingParams(stop=stops)
    stops.append("b")
    assert params.to_json()["stop"] == ["a"]
    assert SamplingParams(stop=np.int64([1, 2])).to_json()["stop"] == [1, 2]  # type: ignore[arg-type]
