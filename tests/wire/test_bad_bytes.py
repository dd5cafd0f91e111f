"""Malformed bodies raise one typed error, whatever their fault."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, strategies as st
from support.properties import several
from wire import test_golden

from tinkex.errors import InvalidInputError, ResponseDecodeError
from tinkex.types import ForwardBackwardOutput, SampleResponse
from tinkex.wire import tinker_public_pb2 as pb
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF


def read_everything(codec, body: bytes) -> int:
    """Feed *body* to every decoder and count refusals; any other exception fails the test."""
    refused = 0
    for decode, error in (
        (codec.decode_output, ResponseDecodeError),
        (codec.decode_samples, ResponseDecodeError),
        (codec.decode_forward_backward, InvalidInputError),
    ):
        try:
            decode(body)
        except error:
            refused += 1
    return refused


@several(150)
@given(body=st.binary(max_size=60))
def test_arbitrary_bytes(body: bytes):
    read_everything(PROTOBUF, body)
    assert read_everything(JSON, body) >= 1


@several(150)
@given(
    body=st.sampled_from([getattr(test_golden, letter) for letter in "ABCDEF"]),
    at=st.integers(0, 1000),
    flip=st.integers(0, 255),
    cut=st.integers(0, 3),
)
def test_protobuf_with_a_broken_byte_or_a_lost_end(body: bytes, at: int, flip: int, cut: int):
    broken = bytearray(body)
    broken[at % len(body)] ^= flip
    read_everything(PROTOBUF, bytes(broken[: len(body) - cut]))


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
SAMPLES = {
    "sequences": [
        {"stop_reason": "stop", "tokens": [1], "logprobs": [-1.0], "topk_logprobs": [[[1, -1]]]}
    ],
    "prompt_logprobs": [None, -1.0],
    "topk_prompt_logprobs": [None, [[1, -1.0]]],
    "target_prompt_logprobs": {"data": [1.0], "dtype": "float32", "shape": [1, 1]},
    "prompt_alt_tokens": {
        "tokens": {"data": [1], "dtype": "int64", "shape": [1, 1]},
        "logprobs": {"data": [1.0], "dtype": "float32", "shape": [1, 1]},
    },
    "prompt_cache_hit_tokens": 0,
}
OUTPUT = {
    "loss_fn_output_type": "X",
    "loss_fn_outputs": [{"logprobs": {"data": [1.0], "dtype": "float32", "shape": [1]}}],
    "metrics": {"loss:sum": 1.0},
}
SPARSE = {
    "data": [5],
    "dtype": "int64",
    "shape": [1, 2],
    "sparse_crow_indices": [0, 1],
    "sparse_col_indices": [1],
}
REQUEST = {
    "forward_backward_input": {
        "data": [
            {
                "model_input": {
                    "chunks": [
                        {"tokens": [1], "type": "encoded_text"},
                        {"data": "aa==", "format": "png", "expected_tokens": 1, "type": "image"},
                        {"dmel": "aa==", "type": "dmel"},
                    ]
                },
                "loss_fn_inputs": {"target_tokens": SPARSE},
            }
        ],
        "loss_fn": "ppo",
        "loss_fn_config": {"a": 1.0},
    },
    "model_id": "m",
    "seq_id": 1,
}


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def paths(value, prefix=()):
    """Yield the path of *value* itself and of everything inside it."""
    yield prefix
    children = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for key, item in children:
        yield from paths(item, (*prefix, key))


@several(400)
@given(data=st.data(), new=anything)
def test_json_with_something_unexpected_in_one_place(data, new):
    body = data.draw(st.sampled_from([SAMPLES, OUTPUT, REQUEST]))
    path = data.draw(st.sampled_from(list(paths(body))))
    assert read_everything(JSON, json.dumps(replaced(body, path, new)).encode()) >= 2


def test_the_json_above_is_well_formed_before_it_is_broken():
    assert len(JSON.decode_samples(json.dumps(SAMPLES).encode()).sequences) == 1
    assert len(JSON.decode_output(json.dumps(OUTPUT).encode()).loss_fn_outputs) == 1
    assert len(JSON.decode_forward_backward(json.dumps(REQUEST).encode()).data) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"{",
        b"\xff",
        b'{"sequences": null, "loss_fn_outputs": null}',
        b'{"NaN": ' + b"[" * 100_000,
    ],
)
def test_json_that_is_not_a_message(body: bytes):
    assert read_everything(JSON, body) == 3


@pytest.mark.parametrize(
    "tensor",
    [
        {"data": None},
        {"data": "1.5"},
        {"data": ["x"]},
        {"data": [1, [2]]},
        {"data": [1.5], "dtype": "int64"},
        {"data": [None], "dtype": "int64"},
        {"data": [2**63], "dtype": "int64"},
        {"data": [1], "dtype": "float16"},
        {"data": [1], "dtype": []},
        {"data": [1], "shape": 1},
        {"data": [1], "shape": [None]},
        {"data": [1], "shape": [1.0]},
        {"data": [1], "shape": [-1, -1]},
        {"data": [], "shape": [2**32, 2**32]},
        {"data": [], "shape": [-1, 3], "sparse_crow_indices": [], "sparse_col_indices": []},
        {"data": [1], "shape": [1, 1], "sparse_crow_indices": [0, 1]},
        {"data": [1], "shape": [1, 1], "sparse_crow_indices": [0, 1], "sparse_col_indices": ["a"]},
        {"data": [1], "shape": [1, 1], "sparse_crow_indices": [0, 1], "sparse_col_indices": [0.5]},
    ],
)
def test_a_json_tensor_that_contradicts_itself(tensor):
    body = json.dumps({"loss_fn_outputs": [{"x": tensor}]}).encode()
    with pytest.raises(ResponseDecodeError):
        JSON.decode_output(body)


def batched(**changes) -> bytes:
    offsets = np.array([0, 8, 12], "<i8").tobytes()
    field = pb.BatchedTensor(data=bytes(12), offsets=offsets, dtype=pb.FLOAT32)
    record = pb.ArrayRecord(num_datums=changes.pop("num_datums", 2))
    for name, value in changes.items():
        if name == "trailing_shape":
            field.trailing_shape.extend(value)
        elif name == "offsets":
            field.offsets = np.array(value, "<i8").tobytes()
        else:
            setattr(field, name, value)
    record.fields["x"].CopyFrom(field)
    return pb.ForwardBackwardOutput(loss_fn_outputs=[record]).SerializeToString()


def test_the_record_below_is_well_formed_before_it_is_broken():
    outputs = PROTOBUF.decode_output(batched()).loss_fn_outputs
    assert [datum["x"].tolist() for datum in outputs] == [[0, 0], [0]]


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": pb.DTYPE_UNSPECIFIED},
        {"dtype": 9},
        {"data": bytes(11)},
        {"data": bytes(8)},
        {"offsets": []},
        {"offsets": [0, 6, 12]},
        {"offsets": [0, 16, 12]},
        {"offsets": [-4, 8, 12]},
        {"offsets": [0, 12]},
        {"trailing_shape": [2]},
        {"trailing_shape": [-1, -1]},
        {"trailing_shape": [2**62, 2**62]},
        {"num_datums": 3},
        {"num_datums": -1},
    ],
    ids=str,
)
def test_a_record_that_contradicts_itself(changes):
    with pytest.raises(ResponseDecodeError):
        PROTOBUF.decode_output(batched(**changes))


def test_a_few_bytes_cannot_demand_all_memory():
    record = pb.ArrayRecord(num_datums=2**62)
    body = pb.ForwardBackwardOutput(loss_fn_outputs=[record]).SerializeToString()
    with pytest.raises(ResponseDecodeError, match="datums"):
        PROTOBUF.decode_output(body)


@pytest.mark.parametrize(
    "sequence",
    [
        pb.SampledSequence(stop_reason=7),
        pb.SampledSequence(tokens=b"123"),
        pb.SampledSequence(tokens=bytes(8), logprobs=bytes(4)),
        pb.SampledSequence(topk_sampled_logprobs=pb.TopkLogprobs(k=2, length=2)),
    ],
    ids=["unknown stop reason", "half a token", "fewer logprobs", "no topk cells"],
)
def test_a_sequence_that_contradicts_itself(sequence):
    body = pb.SampleResponse(sequences=[sequence]).SerializeToString()
    with pytest.raises(ResponseDecodeError):
        PROTOBUF.decode_samples(body)


@pytest.mark.parametrize("codec", [JSON, PROTOBUF], ids=lambda codec: codec.name)
def test_a_value_that_cannot_be_written_is_the_callers_error(codec):
    request = test_golden.request_a()
    for bad in ({"model_id": "\ud800"}, {"seq_id": 2**70}, {"loss_fn_config": {"a": object()}}):
        with pytest.raises(InvalidInputError):
            codec.encode_forward_backward(dataclasses.replace(request, **bad))
    with pytest.raises(InvalidInputError):
        codec.encode_output(ForwardBackwardOutput([{"x": None}], {}))
    with pytest.raises(InvalidInputError):
        codec.encode_samples(SampleResponse([None]))
