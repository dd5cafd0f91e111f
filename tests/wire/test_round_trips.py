"""Every codec reads back what it writes, in both dialects."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, strategies as st
from support.properties import several
from wire import strategies

from tinkex.types import Datum, ForwardBackwardRequest, ModelInput, TensorData
from tinkex.wire.codec import Codec
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

both = pytest.mark.parametrize("codec", [JSON, PROTOBUF], ids=lambda codec: codec.name)


@both
@several(60)
@given(request=strategies.requests)
def test_requests(codec: Codec, request: ForwardBackwardRequest):
    received = codec.decode_forward_backward(codec.encode_forward_backward(request))
    assert strategies.plain(received) == strategies.plain(request)


@both
@several(60)
@given(datum=strategies.sparse_datums)
def test_sparse_loss_inputs_keep_their_values(codec: Codec, datum: Datum):
    request = ForwardBackwardRequest("m", 1, [datum], "custom")
    received = codec.decode_forward_backward(codec.encode_forward_backward(request)).data[0]
    # `plain` compares them in dense form, as JSON sends them.
    assert strategies.plain(received) == strategies.plain(datum)
    sparse = {name for name, tensor in received.loss_fn_inputs.items() if tensor.is_sparse}
    assert sparse == (set(datum.loss_fn_inputs) if codec is PROTOBUF else set())


@several(60)
@given(datum=strategies.datums_with_spans)
def test_provenance_spans(datum: Datum):
    request = ForwardBackwardRequest("m", 1, [datum], "stable_reinforce")
    received = PROTOBUF.decode_forward_backward(PROTOBUF.encode_forward_backward(request)).data[0]
    assert received.model_input_spans == datum.model_input_spans
    assert received.loss_fn_input_spans == datum.loss_fn_input_spans


@both
@several(60)
@given(output=strategies.outputs)
def test_outputs(codec: Codec, output):
    received = codec.decode_output(codec.encode_output(output))
    assert strategies.plain(received.loss_fn_outputs) == strategies.plain(output.loss_fn_outputs)
    assert received.metrics == output.metrics
    if codec is JSON or output.loss_fn_outputs:
        assert received.loss_fn_output_type == output.loss_fn_output_type


@both
@several(60)
@given(response=strategies.samples)
def test_samples(codec: Codec, response):
    received = codec.decode_samples(codec.encode_samples(response))
    assert strategies.plain(received) == strategies.plain(response)


@several(60)
@given(request=strategies.requests, shuffled=st.randoms(use_true_random=False))
def test_equal_requests_have_equal_protobuf_bytes(request: ForwardBackwardRequest, shuffled):
    def reordered(mapping):
        items = list(mapping.items())
        shuffled.shuffle(items)
        return dict(items)

    twin = dataclasses.replace(
        request,
        data=[Datum(d.model_input, reordered(d.loss_fn_inputs)) for d in request.data],
        loss_fn_config=reordered(request.loss_fn_config),
    )
    assert PROTOBUF.encode_forward_backward(twin) == PROTOBUF.encode_forward_backward(request)


@both
def test_decoded_arrays_are_the_callers_own(codec: Codec):
    request = ForwardBackwardRequest(
        "m", 1, [Datum(ModelInput.from_ints([1]), {"w": TensorData([1.0])})], "x"
    )
    datum = codec.decode_forward_backward(codec.encode_forward_backward(request)).data[0]
    assert datum.model_input.to_numpy().flags.writeable
    assert datum.loss_fn_inputs["w"].values.flags.writeable
