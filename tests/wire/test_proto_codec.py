"""The protobuf dialect beyond the golden vectors: records, dtypes, absent fields."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinkex.errors import InvalidInputError
from tinkex.types import (
    Datum,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    ImageAssetPointerChunk,
    ModelInput,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    TensorData,
)
from tinkex.wire import tinker_public_pb2 as pb
from tinkex.wire.proto_codec import PROTOBUF


def tensor(shape, dtype="float32") -> TensorData:
    return TensorData(np.arange(math.prod(shape)).reshape(shape), dtype)


def encoded(outputs) -> pb.ForwardBackwardOutput:
    body = PROTOBUF.encode_output(ForwardBackwardOutput(outputs, {}, "X"))
    return pb.ForwardBackwardOutput.FromString(body)


def test_datums_of_the_same_form_share_one_record():
    message = encoded([{"a": tensor((n, 2)), "b": tensor((n,), "int64")} for n in (3, 0, 1)])
    (record,) = message.loss_fn_outputs
    assert record.num_datums == 3
    assert sorted(record.fields) == ["a", "b"]
    assert list(record.fields["a"].trailing_shape) == [2]
    assert np.frombuffer(record.fields["a"].offsets, "<i8").tolist() == [0, 24, 24, 32]
    assert np.frombuffer(record.fields["b"].offsets, "<i8").tolist() == [0, 24, 24, 32]


def test_datums_of_different_forms_have_separate_records_in_order():
    outputs = [
        {"a": tensor((2,))},
        {"a": tensor((2, 2))},
        {"a": tensor((2,), "int64")},
        {"a": tensor((2,), "int64"), "b": tensor((1,))},
        {},
        {"a": tensor((1,))},
    ]
    message = encoded(outputs)
    assert [record.num_datums for record in message.loss_fn_outputs] == [1] * 6
    assert PROTOBUF.decode_output(message.SerializeToString()).loss_fn_outputs == outputs


def test_empty_datums_are_counted():
    message = encoded([{}, {}, {}])
    assert PROTOBUF.decode_output(message.SerializeToString()).loss_fn_outputs == [{}, {}, {}]


def test_a_sparse_output_is_written_dense():
    sparse = TensorData([5.0], "float32", (2, 2), [0, 0, 1], [1])
    body = encoded([{"a": sparse}]).SerializeToString()
    assert PROTOBUF.decode_output(body).loss_fn_outputs[0]["a"].tolist() == [[0, 0], [0, 5]]


def test_an_output_without_records_keeps_its_type_or_is_an_array_record():
    for sent, received in [("", "ArrayRecord"), ("a.b:X", "a.b:X")]:
        body = pb.ForwardBackwardOutput(loss_fn_output_type=sent).SerializeToString()
        assert PROTOBUF.decode_output(body) == ForwardBackwardOutput([], {}, received)


def test_an_empty_output_is_an_empty_message():
    assert PROTOBUF.decode_output(b"") == ForwardBackwardOutput([], {}, "ArrayRecord")
    assert PROTOBUF.decode_samples(b"").sequences == []


def test_metrics_that_are_not_finite_survive():
    body = PROTOBUF.encode_output(ForwardBackwardOutput([], {"a": math.nan, "b": -math.inf}))
    metrics = PROTOBUF.decode_output(body).metrics
    assert math.isnan(metrics["a"])
    assert metrics["b"] == -math.inf


def test_bfloat16_of_every_sign_and_size_is_widened_exactly():
    values = np.float32([0.0, -0.0, 1.5, -2.0, 1e38, math.inf, math.nan])
    halves = (values.view(np.uint32) >> 16).astype("<u2")
    message = pb.SampleResponse()
    message.target_prompt_logprobs.dense = halves.tobytes()
    message.target_prompt_logprobs.dtype = pb.BFLOAT16
    received = PROTOBUF.decode_samples(message.SerializeToString()).target_prompt_logprobs
    truncated = (halves.astype(np.uint32) << 16).view(np.float32)
    assert received.dtype == "float32"
    np.testing.assert_array_equal(received.values, truncated)
    np.testing.assert_allclose(received.values[:4], values[:4])


def test_alternative_prompt_tokens_are_int32_on_the_wire():
    draws = PromptAltTokens(TensorData([[1], [2]], "int64"), tensor((2, 1)))
    body = PROTOBUF.encode_samples(SampleResponse([], prompt_alt_tokens=draws))
    message = pb.SampleResponse.FromString(body)
    assert message.prompt_alt_tokens.tokens.dtype == pb.INT32
    assert len(message.prompt_alt_tokens.tokens.dense) == 8
    received = PROTOBUF.decode_samples(body).prompt_alt_tokens
    assert received.tokens == draws.tokens
    assert received.logprobs == draws.logprobs


def test_a_tensor_without_a_shape_is_flat():
    message = pb.ForwardBackwardRequest(seq_id=1)
    sent = message.data.add().loss_fn_inputs["w"]
    sent.dense, sent.dtype = bytes(12), pb.FLOAT32
    request = PROTOBUF.decode_forward_backward(message.SerializeToString())
    assert request.data[0].loss_fn_inputs["w"].shape == (3,)


def test_empty_logprobs_are_none():
    sequence = SampledSequence("stop", np.int32([]), np.float32([]))
    sent = SampleResponse([sequence], prompt_logprobs_np=np.float32([]))
    received = PROTOBUF.decode_samples(PROTOBUF.encode_samples(sent))
    assert received.prompt_logprobs_np is None
    assert received.sequences[0].logprobs_np is None


def test_an_unknown_stop_reason_cannot_be_written():
    with pytest.raises(InvalidInputError, match="content_filter"):
        PROTOBUF.encode_samples(SampleResponse([SampledSequence("content_filter", np.int32([]))]))


def test_an_asset_pointer_cannot_be_written_and_the_error_says_what_to_do():
    chunk = ImageAssetPointerChunk("png", "https://example.org/x.png", 7)
    request = ForwardBackwardRequest("m", 1, [Datum(ModelInput([chunk]), {})], "cross_entropy")
    with pytest.raises(InvalidInputError, match="ImageAssetPointerChunk") as caught:
        PROTOBUF.encode_forward_backward(request)
    assert "ImageChunk" in caught.value.hint


def test_the_config_fields_of_older_and_newer_clients_are_merged():
    message = pb.ForwardBackwardRequest(seq_id=1)
    message.loss_fn_config["old"] = 1.0
    message.loss_fn_config["both"] = 1.0
    message.loss_fn_config_v2["both"].number = 2.0
    message.loss_fn_config_v2["text"].text = "t"
    config = PROTOBUF.decode_forward_backward(message.SerializeToString()).loss_fn_config
    assert config == {"old": 1.0, "both": 2.0, "text": "t"}


@pytest.mark.parametrize("where", ["chunk", "config", "span"])
def test_a_choice_of_an_unknown_kind_is_refused(where):
    message = pb.ForwardBackwardRequest(seq_id=1)
    if where == "chunk":
        message.data.add().model_input.add()
    elif where == "span":
        message.data.add().model_input_spans.add()
    else:
        message.loss_fn_config_v2["a"].SetInParent()
    with pytest.raises(InvalidInputError):
        PROTOBUF.decode_forward_backward(message.SerializeToString())
