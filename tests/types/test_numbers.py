"""Numbers that become numpy arrays on demand."""

from __future__ import annotations

import array
import copy
import dataclasses
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from tinkex.errors import InvalidInputError
from tinkex.types import EncodedTextChunk, ModelInput, SampledSequence, SampleResponse
from tinkex.types._numbers import SHORT, as_kept, from_bytes, holds_nan
from tinkex.wire.proto_codec import PROTOBUF


def lists_of(*start: object) -> list:
    """Return the same values in a short list, and in one long enough to be left to numpy."""
    return [[*start], [*start, *[1] * SHORT]]


@pytest.mark.parametrize("tokens", lists_of(0, 7, 2**31 - 1), ids=len)
def test_both_ways_of_storing_tokens_are_equal(tokens: list) -> None:
    chunk, same = EncodedTextChunk(tokens), EncodedTextChunk(np.int64(tokens))
    assert chunk == same
    assert hash(chunk) == hash(same)
    assert chunk != EncodedTextChunk([*tokens[:-1], 5])
    assert (chunk.tokens, chunk.length) == (tokens, len(tokens))
    assert chunk.tokens_np.dtype == np.int32
    assert chunk.tokens_np is chunk.tokens_np


@pytest.mark.parametrize("tokens", lists_of(-1) + lists_of(2**31) + lists_of(2**70), ids=len)
def test_ids_out_of_range_are_refused(tokens: list) -> None:
    with pytest.raises(InvalidInputError):
        EncodedTextChunk(tokens)


@pytest.mark.parametrize("tokens", [[1.0], ["1"], [[1]], [True], [None], "abc", 5])
def test_a_value_that_is_not_a_list_of_integers_is_refused(tokens: object) -> None:
    with pytest.raises(InvalidInputError):
        EncodedTextChunk(tokens)


@pytest.mark.parametrize("ask_first", [False, True])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_are_complete(clone: object, ask_first: bool) -> None:
    sequence = SampledSequence("stop", from_bytes("i", b"\1\0\0\0"), from_bytes("f", bytes(4)))
    if ask_first:
        assert sequence.tokens_np.tolist() == [1]
    twin = clone(sequence)
    assert (twin.tokens, twin.logprobs, twin.stop_reason) == ([1], [0.0], "stop")
    assert twin.tokens_np.dtype == np.int32
    assert twin.logprobs_np.dtype == np.float32


def test_lazily_converted_fields_behave_like_dataclass_fields() -> None:
    sequence = SampledSequence("length", np.int32([3]))
    assert sequence.logprobs_np is None
    assert dataclasses.replace(sequence, sequence_id="q").tokens == [3]
    assert dataclasses.asdict(sequence)["tokens_np"].tolist() == [3]
    assert "tokens_np=array([3]" in repr(sequence)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sequence.tokens_np = np.int32([4])


def test_an_array_shares_memory_with_the_stored_bytes() -> None:
    sequence = SampledSequence("stop", from_bytes("i", b"\1\0\0\0\2\0\0\0"))
    kept = as_kept(sequence, "tokens_np")
    sequence.tokens_np[0] = 9
    assert kept.tolist() == sequence.tokens == [9, 2]


def test_bytes_that_hold_a_part_of_a_number_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        from_bytes("i", b"\1\0\0")


@pytest.mark.parametrize("make", [lambda values: array.array("f", values), np.float32])
@pytest.mark.parametrize("length", [0, 3, SHORT + 1])
def test_a_nan_is_found(make: object, length: int) -> None:
    values = [-1.0] * length
    assert not holds_nan(make(values))
    assert not holds_nan(make([*values, -math.inf]))
    assert holds_nan(make([*values, math.nan]))


def test_a_short_sample_needs_no_numpy() -> None:
    sequence = SampledSequence("length", np.int32([7, 8]), np.float32([-0.5, -1]))
    body = PROTOBUF.encode_samples(SampleResponse([sequence]))
    script = f"""
import sys
from tinkex._api._call import encode
from tinkex._sampling.sample_checks import check_request, complete_response, has_unknown_logprobs
from tinkex.types import ModelInput, SampleRequest, SamplingParams
from tinkex.wire.codec import codec_for
request = SampleRequest(ModelInput.from_ints([1, 2, 3]), sampling_params=SamplingParams(2))
check_request(request)
assert b'[1,2,3]' in encode(request.to_json())
response = codec_for("application/x-protobuf").decode_samples({body!r})
response = complete_response(response, request, ["q"])
assert not has_unknown_logprobs(response, request)
(only,) = response.sequences
assert (only.tokens, only.logprobs, only.sequence_id) == ([7, 8], [-0.5, -1.0], "q")
assert "numpy" not in sys.modules
assert only.tokens_np.tolist() == [7, 8]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_tokens_of_a_model_input_need_no_numpy_arrays() -> None:
    prompt = ModelInput([EncodedTextChunk([1, 2]), EncodedTextChunk(np.int32([3]))])
    assert prompt.to_ints() == [1, 2, 3]
    assert prompt.to_json()["chunks"][0] == {"tokens": [1, 2], "type": "encoded_text"}
    assert prompt.to_numpy().tolist() == [1, 2, 3]
