"""The protobuf encoding (docs/protocol.md, "Protobuf encoding").  Get it from `codec.codec_for`.

Arrays are converted to and from bytes fields in one step; Python loops run over datums, chunks and
sequences, never over tokens.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import groupby
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from google.protobuf.message import DecodeError, Message

from tinkex._runtime.late_import import np
from tinkex.errors import InvalidInputError, ResponseDecodeError
from tinkex.types import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    ImageChunk,
    ModelInput,
    ModelInputChunk,
    PromptAltTokens,
    PromptProvenanceSpan,
    ProvenanceSpan,
    SampledProvenanceSpan,
    SampledSequence,
    SampleResponse,
    TensorData,
    TopkLogprobs,
)
from tinkex.types._numbers import from_bytes
from tinkex.wire import tinker_public_pb2 as pb
from tinkex.wire.codec import PROTOBUF_CONTENT_TYPE, Parts, translating
from tinkex.wire.proto_writer import forward_backward_request

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
else:
    Array = Any


#: DType -> numpy dtype on the wire.  numpy has no bfloat16: it is read as 16-bit integers, each the
#: upper half of a float32.
_WIRE_DTYPES: Mapping[int, str] = {
    pb.FLOAT32: "<f4",
    pb.INT64: "<i8",
    pb.INT32: "<i4",
    pb.BFLOAT16: "<u2",
}
_STOP_REASONS = {pb.STOP: "stop", pb.LENGTH: "length"}
_STOP_CODES = {name: code for code, name in _STOP_REASONS.items()}

#: The most datums in a record.  In a record without fields, the count is just a number: a few bytes
#: on the wire must not exhaust the memory.
_MAX_EMPTY_DATUMS = 1 << 20

#: numpy's own limit.
_MAX_DIMENSIONS = 64


@dataclasses.dataclass(frozen=True)
class ProtobufCodec:
    """The `Codec` of ``application/x-protobuf``."""

    name: str = "protobuf"
    content_type: str = PROTOBUF_CONTENT_TYPE

    def encode_forward_backward(self, request: ForwardBackwardRequest) -> bytes:
        """Write a ForwardBackwardRequest, which includes ``forward_only``."""
        return bytes(self.forward_backward_parts(request))

    def forward_backward_parts(self, request: ForwardBackwardRequest) -> Parts:
        """Write the same body as parts that refer to the arrays of *request*."""
        with translating(InvalidInputError, "this batch cannot be sent as protobuf"):
            return forward_backward_request(request)

    def decode_forward_backward(self, body: bytes) -> ForwardBackwardRequest:
        """Read a ForwardBackwardRequest."""
        with translating(InvalidInputError, "malformed protobuf ForwardBackwardRequest"):
            message = pb.ForwardBackwardRequest()
            _parse(message, body)
            return ForwardBackwardRequest(
                model_id=message.model_id,
                seq_id=message.seq_id,
                data=[_get_datum(datum) for datum in message.data],
                loss_fn=message.loss_fn,
                loss_fn_config=_get_loss_fn_config(message),
                forward_only=message.forward_only,
            )

    def encode_output(self, output: ForwardBackwardOutput) -> bytes:
        """Write a ForwardBackwardOutput: one record per run of datums with the same fields.

        A sparse tensor is written as a dense one, and a scalar as a tensor of one element.
        """
        with translating(InvalidInputError, "this output cannot be sent as protobuf"):
            message = pb.ForwardBackwardOutput(
                loss_fn_output_type=output.loss_fn_output_type, metrics=output.metrics
            )
            for signature, datums in groupby(output.loss_fn_outputs, _signature):
                _put_record(message.loss_fn_outputs.add(), signature, list(datums))
            return _serialise(message)

    def decode_output(self, body: bytes) -> ForwardBackwardOutput:
        """Read a ForwardBackwardOutput; bfloat16 becomes float32, int32 becomes int64."""
        with translating(ResponseDecodeError, "malformed protobuf ForwardBackwardOutput"):
            message = pb.ForwardBackwardOutput()
            _parse(message, body)
            outputs: List[Dict[str, TensorData]] = []
            for record in message.loss_fn_outputs:
                outputs.extend(_get_record(record))
            # "module:Class", or the class alone (docs/protocol.md, "Results in protobuf").
            kind = message.loss_fn_output_type
            kind = kind.rpartition(":")[2] if message.loss_fn_outputs else kind or "ArrayRecord"
            return ForwardBackwardOutput(outputs, dict(message.metrics), kind)

    def encode_samples(self, response: SampleResponse) -> bytes:
        """Write a SampleResponse; protobuf has no sequence ids."""
        with translating(InvalidInputError, "these samples cannot be sent as protobuf"):
            message = pb.SampleResponse(prompt_cache_hit_tokens=response.prompt_cache_hit_tokens)
            for sequence in response.sequences:
                _put_sequence(message.sequences.add(), sequence)
            if response.prompt_logprobs_np is not None:
                message.prompt_logprobs = _to_bytes(response.prompt_logprobs_np, "<f4")
            if response.topk_prompt_logprobs_np is not None:
                _put_topk(message.topk_prompt_logprobs, response.topk_prompt_logprobs_np)
            if response.target_prompt_logprobs is not None:
                _put_tensor(message.target_prompt_logprobs, response.target_prompt_logprobs)
            draws = response.prompt_alt_tokens
            if draws is not None:
                _put_tensor(message.prompt_alt_tokens.tokens, draws.tokens, pb.INT32)
                _put_tensor(message.prompt_alt_tokens.logprobs, draws.logprobs)
            return _serialise(message)

    def decode_samples(self, body: bytes) -> SampleResponse:
        """Read a SampleResponse."""
        with translating(ResponseDecodeError, "malformed protobuf SampleResponse"):
            message = pb.SampleResponse()
            _parse(message, body)
            topk = target = draws = None
            if message.HasField("topk_prompt_logprobs"):
                topk = _get_topk(message.topk_prompt_logprobs)
            if message.HasField("target_prompt_logprobs"):
                target = _get_tensor(message.target_prompt_logprobs)
            if message.HasField("prompt_alt_tokens"):
                draws = PromptAltTokens(
                    _get_tensor(message.prompt_alt_tokens.tokens),
                    _get_tensor(message.prompt_alt_tokens.logprobs),
                )
            return SampleResponse(
                sequences=[_get_sequence(sequence) for sequence in message.sequences],
                prompt_logprobs_np=_floats(message.prompt_logprobs),
                topk_prompt_logprobs_np=topk,
                target_prompt_logprobs=target,
                prompt_cache_hit_tokens=message.prompt_cache_hit_tokens,
                prompt_alt_tokens=draws,
            )


PROTOBUF = ProtobufCodec()


def _serialise(message: Message) -> bytes:
    # Write maps in sorted order, so that the same message always gives the same bytes.
    return message.SerializeToString(deterministic=True)


def _parse(message: Message, body: bytes) -> None:
    try:
        message.ParseFromString(bytes(body))
    except DecodeError as error:
        raise ValueError(f"{error} ({len(body)} bytes)") from error


# ---- Tensors ----


def _to_bytes(array: Array, wire_dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype=wire_dtype).tobytes()


def _to_array(raw: bytes, dtype: int) -> Array:
    """Return a new flat array of int64 or float32."""
    wire_dtype = _WIRE_DTYPES.get(dtype)
    if wire_dtype is None:
        raise ValueError(f"unknown tensor dtype {dtype}")
    # frombuffer refuses a size that is not a multiple of the item size.  Its array is read-only and
    # refers to the message, so return a copy.
    values = np.frombuffer(raw, wire_dtype)
    if dtype == pb.BFLOAT16:
        # A bfloat16 is the upper half of a float32: widening is exact, NaN and infinity included.
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32 if dtype == pb.FLOAT32 else np.int64)


def _tokens(raw: bytes) -> npt.NDArray[np.int32]:
    return np.frombuffer(raw, "<i4").astype(np.int32)


def _floats(raw: bytes) -> Optional[npt.NDArray[np.float32]]:
    return np.frombuffer(raw, "<f4").astype(np.float32) if raw else None


def _put_tensor(message: pb.Tensor, tensor: TensorData, dtype: Optional[pb.DType] = None) -> None:
    if dtype is None:
        dtype = pb.FLOAT32 if tensor.dtype == "float32" else pb.INT64
    raw = _to_bytes(tensor.values, _WIRE_DTYPES[dtype])
    if tensor.crow_indices is not None and tensor.col_indices is not None:
        message.sparse_csr.values = raw
        message.sparse_csr.crow_indices = _to_bytes(tensor.crow_indices, "<i8")
        message.sparse_csr.col_indices = _to_bytes(tensor.col_indices, "<i8")
    else:
        message.dense = raw
    message.dtype = dtype
    message.shape.extend(tensor.shape)


def _get_tensor(message: pb.Tensor) -> TensorData:
    if len(message.shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(message.shape)} dimensions")
    shape = tuple(message.shape)
    if message.WhichOneof("encoding") == "sparse_csr":
        csr = message.sparse_csr
        return TensorData._adopt(
            _to_array(csr.values, message.dtype),
            shape,
            _to_array(csr.crow_indices, pb.INT64),
            _to_array(csr.col_indices, pb.INT64),
        )
    return TensorData._adopt(_to_array(message.dense, message.dtype), shape or None)


# ---- Requests ----


def _get_datum(message: pb.Datum) -> Datum:
    chunks = tuple(_get_chunk(chunk) for chunk in message.model_input)
    inputs = {name: _get_tensor(tensor) for name, tensor in message.loss_fn_inputs.items()}
    if not message.model_input_spans and not message.loss_fn_input_spans:
        return Datum(ModelInput(chunks), inputs)
    return Datum(
        ModelInput(chunks),
        inputs,
        [_get_span(span) for span in message.model_input_spans],
        [_get_span(span) for span in message.loss_fn_input_spans],
    )


def _get_span(message: pb.ProvenanceSpan) -> ProvenanceSpan:
    kind = message.WhichOneof("span")
    if kind == "sampled_tokens":
        run = message.sampled_tokens
        return SampledProvenanceSpan(run.sequence_id, offset=run.offset, length=run.length)
    if kind == "prompt_tokens":
        prompt = message.prompt_tokens
        return PromptProvenanceSpan(prompt.sequence_id, offset=prompt.offset, length=prompt.length)
    raise ValueError("a provenance span is empty, or of an unknown kind")


def _get_chunk(message: pb.Chunk) -> ModelInputChunk:
    kind = message.WhichOneof("chunk")
    if kind == "encoded_text":
        return EncodedTextChunk._adopt(_tokens(message.encoded_text.tokens))
    if kind == "image":
        image = message.image
        expected = image.expected_tokens if image.HasField("expected_tokens") else None
        return ImageChunk(image.data, image.format, expected)
    if kind == "dmel":
        return DmelChunk(message.dmel.dmel)
    raise ValueError("a chunk of the model input is empty, or of an unknown kind")


def _get_loss_fn_config(message: pb.ForwardBackwardRequest) -> Dict[str, Union[float, str]]:
    config: Dict[str, Union[float, str]] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        kind = value.WhichOneof("value")
        if kind is None:
            raise ValueError(f"loss_fn_config {name!r} is neither a number nor a string")
        config[name] = value.text if kind == "text" else value.number
    return config


# ---- Results of passes ----

#: What the datums of one record have in common: (field name, dtype, trailing shape), sorted.
Signature = Tuple[Tuple[str, str, Tuple[int, ...]], ...]


def _signature(datum: Mapping[str, TensorData]) -> Signature:
    return tuple(sorted((name, t.dtype, tuple(t.shape[1:])) for name, t in datum.items()))


def _put_record(
    message: pb.ArrayRecord, signature: Signature, datums: Sequence[Mapping[str, TensorData]]
) -> None:
    message.num_datums = len(datums)
    for name, dtype_name, trailing_shape in signature:
        dtype = pb.FLOAT32 if dtype_name == "float32" else pb.INT64
        parts = [_to_bytes(datum[name]._dense(), _WIRE_DTYPES[dtype]) for datum in datums]
        offsets = np.zeros(len(parts) + 1, dtype="<i8")
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        field = message.fields[name]
        field.data = b"".join(parts)
        field.offsets = offsets.tobytes()
        field.dtype = dtype
        field.trailing_shape.extend(trailing_shape)


def _get_record(message: pb.ArrayRecord) -> List[Dict[str, TensorData]]:
    columns = {name: _get_batched(name, field) for name, field in message.fields.items()}
    # num_datums is also 0 if it is not set; then the fields decide.
    count = message.num_datums or max((len(column) for column in columns.values()), default=0)
    if any(len(column) != count for column in columns.values()):
        sizes = {name: len(column) for name, column in columns.items()}
        raise ValueError(f"a record of {count} datums has fields of {sizes}")
    if not 0 <= count <= _MAX_EMPTY_DATUMS:
        raise ValueError(f"a record of {count} datums")
    if not columns:
        return [{} for _ in range(count)]
    return [dict(zip(columns, tensors)) for tensors in zip(*columns.values())]


def _get_batched(name: str, message: pb.BatchedTensor) -> List[TensorData]:
    """Split the field into one tensor per datum; all are views of one buffer."""
    data = message.data  # read once: every access copies it
    values = _to_array(data, message.dtype)
    itemsize = np.dtype(_WIRE_DTYPES[message.dtype]).itemsize
    offsets = np.frombuffer(message.offsets, "<i8")
    trailing_shape = tuple(message.trailing_shape)
    if any(n < 0 for n in trailing_shape):
        raise ValueError(f"field {name!r} has trailing shape {trailing_shape}")
    # Offsets count bytes, and each must be the start of a row of *trailing_shape*.
    row = math.prod(trailing_shape)
    fits = (
        offsets.size > 0
        and offsets[0] >= 0
        and int(offsets[-1]) <= len(data)
        and bool(np.all(np.diff(offsets) >= 0))
        and not bool(np.any(offsets % (itemsize * max(row, 1))))
    )
    if not fits:
        raise ValueError(f"the offsets of field {name!r} do not fit its {len(data)} bytes")
    # From here on, count in values: rows per datum, and one shape object per length.
    bounds = offsets // itemsize
    lengths = np.diff(bounds) // max(row, 1)
    shapes = {length: (length, *trailing_shape) for length in set(lengths.tolist())}
    starts, dtype = bounds.tolist(), str(values.dtype)
    return [
        TensorData._of(values[start:end], dtype, shapes[length])
        for start, end, length in zip(starts, starts[1:], lengths.tolist())
    ]


# ---- Samples ----


def _put_sequence(message: pb.SampledSequence, sequence: SampledSequence) -> None:
    code = _STOP_CODES.get(sequence.stop_reason)
    if code is None:
        raise ValueError(f"stop reason {sequence.stop_reason!r} has no protobuf form")
    message.stop_reason = code
    message.tokens = _to_bytes(sequence.tokens_np, "<i4")
    if sequence.logprobs_np is not None:
        message.logprobs = _to_bytes(sequence.logprobs_np, "<f4")
    if sequence.topk_logprobs_np is not None:
        _put_topk(message.topk_sampled_logprobs, sequence.topk_logprobs_np)


def _get_sequence(message: pb.SampledSequence) -> SampledSequence:
    stop_reason = _STOP_REASONS.get(message.stop_reason)
    if stop_reason is None:
        raise ValueError(f"unknown stop reason {message.stop_reason}")
    # Without numpy, which a program that only samples need not import.
    tokens = from_bytes("i", message.tokens)
    logprobs = from_bytes("f", message.logprobs) if message.logprobs else None
    if logprobs is not None and len(logprobs) != len(tokens):
        raise ValueError(f"{len(logprobs)} logprobs for {len(tokens)} sampled tokens")
    topk = None
    if message.HasField("topk_sampled_logprobs"):
        topk = _get_topk(message.topk_sampled_logprobs)
    return SampledSequence(stop_reason, tokens, logprobs, topk_logprobs_np=topk)


def _put_topk(message: pb.TopkLogprobs, topk: TopkLogprobs) -> None:
    message.length, message.k = topk.token_ids.shape
    message.token_ids = _to_bytes(topk.token_ids, "<i4")
    message.logprobs = _to_bytes(topk.logprobs, "<f4")


def _get_topk(message: pb.TopkLogprobs) -> Optional[TopkLogprobs]:
    shape = (message.length, message.k)
    if 0 in shape:
        return None
    token_ids = _tokens(message.token_ids)
    logprobs = np.frombuffer(message.logprobs, "<f4").astype(np.float32)
    return TopkLogprobs(token_ids.reshape(shape), logprobs.reshape(shape))
