"""The hand-written encoder writes the bytes of the protobuf library; see also test_golden.py."""

from __future__ import annotations

from typing import Any, List

import numpy as np
import pytest
from hypothesis import given
from wire.strategies import requests

from tinkex.errors import InvalidInputError
from tinkex.types import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ForwardBackwardRequest,
    ImageAssetPointerChunk,
    ImageChunk,
    ModelInput,
    SampledProvenanceSpan,
    TensorData,
)
from tinkex.wire import proto_writer, tinker_public_pb2 as pb
from tinkex.wire.proto_writer import _varint, forward_backward_request


def by_the_library(request: ForwardBackwardRequest) -> Any:
    message = pb.ForwardBackwardRequest(
        model_id=request.model_id,
        seq_id=request.seq_id,
        loss_fn=request.loss_fn,
        forward_only=request.forward_only,
    )
    for datum in request.data:
        put_datum(message.data.add(), datum)
    for name, value in request.loss_fn_config.items():
        if isinstance(value, str):
            message.loss_fn_config_v2[name].text = value
        else:
            message.loss_fn_config[name] = value
            message.loss_fn_config_v2[name].number = value
    return message


def put_datum(message: Any, datum: Datum) -> None:
    for chunk in datum.model_input.chunks:
        put_chunk(message.model_input.add(), chunk)
    for name, tensor in datum.loss_fn_inputs.items():
        put_tensor(message.loss_fn_inputs[name], tensor)
    for target, spans in (
        (message.model_input_spans, datum.model_input_spans),
        (message.loss_fn_input_spans, datum.loss_fn_input_spans),
    ):
        for span in spans or ():
            added = target.add()
            sampled = isinstance(span, SampledProvenanceSpan)
            run = added.sampled_tokens if sampled else added.prompt_tokens
            run.SetInParent()
            run.sequence_id, run.offset, run.length = span.sequence_id, span.offset, span.length


def put_chunk(message: Any, chunk: Any) -> None:
    if isinstance(chunk, EncodedTextChunk):
        message.encoded_text.SetInParent()
        message.encoded_text.tokens = chunk.tokens_np.astype("<i4").tobytes()
    elif isinstance(chunk, ImageChunk):
        message.image.SetInParent()
        message.image.data, message.image.format = chunk.data, chunk.format
        if chunk.expected_tokens is not None:
            message.image.expected_tokens = chunk.expected_tokens
    else:
        assert isinstance(chunk, DmelChunk)
        message.dmel.SetInParent()
        message.dmel.dmel = chunk.dmel


def put_tensor(message: Any, tensor: TensorData) -> None:
    raw = tensor.values.astype("<f4" if tensor.dtype == "float32" else "<i8").tobytes()
    if tensor.crow_indices is not None and tensor.col_indices is not None:
        message.sparse_csr.values = raw
        message.sparse_csr.crow_indices = tensor.crow_indices.astype("<i8").tobytes()
        message.sparse_csr.col_indices = tensor.col_indices.astype("<i8").tobytes()
    else:
        message.dense = raw
    message.dtype = pb.FLOAT32 if tensor.dtype == "float32" else pb.INT64
    message.shape.extend(tensor.shape)


@given(requests)
def test_the_encoder_writes_the_same_bytes_as_the_library(request: ForwardBackwardRequest) -> None:
    parts, expected = forward_backward_request(request), by_the_library(request)
    written = bytes(parts)
    assert len(parts) == len(written)
    # Equal except for the order of map entries, which the library does not guarantee.
    assert len(written) == expected.ByteSize()
    assert pb.ForwardBackwardRequest.FromString(written) == expected


@pytest.mark.parametrize(
    "number", [0, 1, 127, 128, 300, 2**31 - 1, 2**31, 2**63 - 1, -1, -(2**31), -(2**63)]
)
def test_varint(number: int) -> None:
    packed = pb.Tensor(shape=[number]).SerializeToString()
    assert packed == b"\x22" + bytes([len(_varint(number))]) + _varint(number)


def test_a_number_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="64 bits"):
        _varint(2**63)


def test_values_without_a_protobuf_form_are_refused() -> None:
    pointer = ImageAssetPointerChunk("png", "somewhere", 3)
    with pytest.raises(InvalidInputError, match="sampling only"):
        forward_backward_request(
            ForwardBackwardRequest("m", 1, [Datum(ModelInput((pointer,)), {})], "x", {})
        )


def test_the_arrays_are_not_changed_and_may_be_read_only() -> None:
    tokens = np.arange(3, dtype=np.int32)
    tokens.setflags(write=False)
    datum = Datum(
        ModelInput((EncodedTextChunk(tokens),)), {"w": TensorData(np.ones(3, np.float32))}
    )
    request = ForwardBackwardRequest("m", 1, [datum], "x", {})
    first = forward_backward_request(request)
    assert bytes(first) == bytes(forward_backward_request(request)) == bytes(first)


def test_examples_share_blocks_large_enough_for_a_system_call() -> None:
    def blocks(count: int, length: int) -> List[int]:
        one = Datum(ModelInput.from_ints(np.zeros(length, np.int32)), {})
        parts = forward_backward_request(ForwardBackwardRequest("m", 1, [one] * count, "x"))
        assert sum(map(len, parts)) == len(parts)
        return [len(block) for block in parts]

    assert len(blocks(0, 1)) == len(blocks(100, 10)) == 1
    assert [size >> 20 for size in blocks(1000, 1024)] == [1, 1, 1, 0]  # a little over 1 MiB
    assert [size >> 10 for size in blocks(3, 300_000)] == [1171] * 3


def test_arrays_in_the_other_byte_order_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = TensorData([5.0], "float32", (2, 2), [0, 0, 1], [1])
    datum = Datum(ModelInput.from_ints([1, 2]), {"a": np.float32([1, 2]), "b": sparse})
    request = ForwardBackwardRequest("m", 1, [datum], "x", {})
    native = bytes(forward_backward_request(request))
    monkeypatch.setattr(proto_writer, "_LITTLE", False)
    assert bytes(forward_backward_request(request)) == native


def test_a_body_over_the_limit_of_protobuf_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    datum = Datum(ModelInput.from_ints([1, 2]), {})
    request = ForwardBackwardRequest("m", 1, [datum] * 9, "x", {})
    size = len(forward_backward_request(request))
    monkeypatch.setattr(proto_writer, "_MAX_BODY", size)
    assert len(forward_backward_request(request)) == size
    monkeypatch.setattr(proto_writer, "_MAX_BODY", size - 1)
    with pytest.raises(InvalidInputError, match=f"{size} bytes exceeds the limit"):
        forward_backward_request(request)
