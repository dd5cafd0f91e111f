"""Golden vectors: bytes of the official encoder (docs/protocol.md, "Example bytes")."""

from __future__ import annotations

import math

import numpy as np

from tinkex.types import (
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    ImageChunk,
    ModelInput,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
    SampledSequence,
    SampleResponse,
    TensorData,
    TopkLogprobs,
)
from tinkex.wire import tinker_public_pb2 as pb
from tinkex.wire.proto_codec import PROTOBUF

A = bytes.fromhex(
    "0a09733a747261696e3a3010011a640a100a0e0a0c01000000020000002c01000012300a0d7461726765745f746f"
    "6b656e73121f0a1802000000000000002c0100000000000004000000000000001802220103121e0a077765696768"
    "747312130a0c0000803f0000003f000000001801220103220370706f2a1d0a12636c69705f6c6f775f7468726573"
    "686f6c64119a9999999999e93f3a1f0a12636c69705f6c6f775f7468726573686f6c641209099a9999999999e93f"
    "3a0a0a037461671203120178"
)
B = bytes.fromhex(
    "0a016d10021a720a080a060a04070000000a0d120b0a0289501203706e67180412570a0d7461726765745f746f6b"
    "656e731246123e0a1005000000000000000600000000000000121800000000000000000100000000000000020000"
    "00000000001a1000000000000000000200000000000000180222020203220d63726f73735f656e74726f70793001"
)
C = bytes.fromhex(
    "0a016d10031a6a0a100a0e0a0c01000000020000000300000012300a0d7461726765745f746f6b656e73121f0a18"
    "02000000000000000300000000000000040000000000000018022201031a070a050a017118021a0712050a017118"
    "0122090a070a017110011801220712050a017118022210737461626c655f7265696e666f726365"
)
D = bytes.fromhex(
    "0a13612e623a546f7263684c6f737352657475726e123a12360a086c6f6770726f6273122a0a0c000080bf000000"
    "c0000040c01218000000000000000008000000000000000c00000000000000180118021a130a086c6f73733a7375"
    "6d11000000000000f83f"
)
E = bytes.fromhex(
    "0a16080112080b0000000c0000001a08000000bf000080be12080000c07f000000c01a280a100000000000000000"
    "09000000000000001210804fc3c7804fc3c7000080bf804fc3c7180220022001"
)
F = bytes.fromhex(
    "125d122e0a016812290a08803f80bf0040404012180000000000000000040000000000000008000000000000001804"
    "220102122b0a016912260a08010000000200000012180000000000000000040000000000000008000000000000001803"
)


def request_a() -> ForwardBackwardRequest:
    inputs = {"weights": [1, 0.5, 0], "target_tokens": [2, 300, 4]}
    return ForwardBackwardRequest(
        model_id="s:train:0",
        seq_id=1,
        data=[Datum(ModelInput.from_ints([1, 2, 300]), inputs)],
        loss_fn="ppo",
        loss_fn_config={"tag": "x", "clip_low_threshold": 0.8},
    )


def request_b() -> ForwardBackwardRequest:
    image = ImageChunk(b"\x89P", "png", expected_tokens=4)
    targets = TensorData([5, 6], "int64", (2, 3), [0, 1, 2], [0, 2])
    return ForwardBackwardRequest(
        model_id="m",
        seq_id=2,
        data=[Datum(ModelInput([EncodedTextChunk([7]), image]), {"target_tokens": targets})],
        loss_fn="cross_entropy",
        forward_only=True,
    )


def test_a_request_with_numbers_and_text_in_its_config_encodes_and_decodes():
    assert PROTOBUF.encode_forward_backward(request_a()) == A
    assert PROTOBUF.decode_forward_backward(A) == request_a()


def test_a_request_with_an_image_and_a_sparse_tensor_encodes_and_decodes():
    assert PROTOBUF.encode_forward_backward(request_b()) == B
    assert PROTOBUF.decode_forward_backward(B) == request_b()


def test_the_schema_has_the_provenance_spans():
    message = pb.ForwardBackwardRequest.FromString(C)
    datum = message.data[0]
    spans = [
        (span.WhichOneof("span"), getattr(span, span.WhichOneof("span")))
        for span in [*datum.model_input_spans, *datum.loss_fn_input_spans]
    ]
    assert [(kind, s.sequence_id, s.offset, s.length) for kind, s in spans] == [
        ("prompt_tokens", "q", 0, 2),
        ("sampled_tokens", "q", 0, 1),
        ("prompt_tokens", "q", 1, 1),
        ("sampled_tokens", "q", 0, 2),
    ]
    assert message.SerializeToString(deterministic=True) == C


def test_a_request_with_provenance_encodes_and_decodes():
    datum = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
    datum = datum.with_provenance(
        model_input=[
            PromptProvenanceSpan("q", length=2),
            SampledProvenanceSpan("q", length=1),
        ],
        loss_fn_inputs=[
            PromptProvenanceSpan("q", offset=1, length=1),
            SampledProvenanceSpan("q", length=2),
        ],
    )
    request = ForwardBackwardRequest("m", 3, [datum], "stable_reinforce")
    assert PROTOBUF.encode_forward_backward(request) == C
    assert PROTOBUF.decode_forward_backward(C) == request


def test_an_output_encodes_and_decodes_without_the_module_of_its_type():
    outputs = [{"logprobs": TensorData([-1.0, -2.0])}, {"logprobs": TensorData([-3.0])}]
    sent = ForwardBackwardOutput(outputs, {"loss:sum": 1.5}, "a.b:TorchLossReturn")
    assert PROTOBUF.encode_output(sent) == D
    received = PROTOBUF.decode_output(D)
    assert received.loss_fn_output_type == "TorchLossReturn"
    assert received.metrics == {"loss:sum": 1.5}
    assert received.loss_fn_outputs == outputs
    assert [datum["logprobs"].shape for datum in received.loss_fn_outputs] == [(2,), (1,)]


def test_samples_encode_and_decode():
    sent = SampleResponse(
        sequences=[SampledSequence("length", np.int32([11, 12]), np.float32([-0.5, -0.25]))],
        prompt_logprobs_np=np.float32([math.nan, -2]),
        topk_prompt_logprobs_np=TopkLogprobs(
            np.int32([[0, 0], [9, 0]]), np.float32([[-99999, -99999], [-1, -99999]])
        ),
        prompt_cache_hit_tokens=1,
    )
    assert PROTOBUF.encode_samples(sent) == E
    received = PROTOBUF.decode_samples(E)
    (sequence,) = received.sequences
    assert sequence.stop_reason == "length"
    assert sequence.tokens == [11, 12]
    assert sequence.tokens_np.dtype == np.int32
    assert sequence.logprobs == [-0.5, -0.25]
    assert sequence.logprobs_np.dtype == np.float32
    assert received.prompt_logprobs == [None, -2.0]
    assert received.topk_prompt_logprobs == [None, [(9, -1.0)]]
    assert received.prompt_cache_hit_tokens == 1


def test_narrow_numbers_are_widened_and_missing_counts_inferred():
    received = PROTOBUF.decode_output(F)
    assert received.loss_fn_output_type == ""
    assert received.metrics == {}
    assert received.loss_fn_outputs == [
        {"h": TensorData([1, -1], "float32", (1, 2)), "i": TensorData([1], "int64")},
        {"h": TensorData([2, 3], "float32", (1, 2)), "i": TensorData([2], "int64")},
    ]


def test_the_schema_writes_the_bytes_of_the_narrow_output():
    # Our encoder never narrows, so only the schema can be tested in this direction.
    assert pb.ForwardBackwardOutput.FromString(F).SerializeToString(deterministic=True) == F
