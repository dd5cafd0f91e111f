"""Writes a ForwardBackwardRequest (reference, section 4.5), each buffer copied once.

A batch is most of what a training run sends.  The protobuf library would copy every array three
times, into a bytes object, into a message and into the body; here the arrays are joined into the
body as they are, between a few bytes of framing, which repeat and are remembered.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, List, Mapping, Sequence, Tuple, Union

from tinkex.errors import InvalidInputError
from tinkex.lazy_numpy import np
from tinkex.types import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ForwardBackwardRequest,
    ImageChunk,
    ModelInputChunk,
    ProvenanceSpan,
    SampledProvenanceSpan,
    TensorData,
)

#: Bytes, or an array whose memory is what goes on the wire.
Part = Any

#: Wire types (protobuf encoding guide).
_VARINT, _FIXED64, _BYTES = 0, 1, 2

_FLOAT32, _INT64 = 1, 2  # of the enum DType

#: What a protobuf parser takes at most.
_MAX_BODY = (1 << 31) - 1


def forward_backward_request(request: ForwardBackwardRequest) -> bytes:
    """Encode *request*; maps are written in the order of their keys.

    Raises:
        InvalidInputError: a chunk has no protobuf form, or the body would be too large.
        ValueError: a number or a text has none.
    """
    parts: List[Part] = [
        _text(1, request.model_id),
        _number(2, request.seq_id),
    ]
    for datum in request.data:
        _put_datum(parts, datum)
    parts.append(_text(4, request.loss_fn))
    _put_config(parts, request.loss_fn_config, request.forward_only)
    try:
        body = b"".join(parts)
    except OverflowError as error:
        raise InvalidInputError(f"the batch is too large for one request: {error}") from error
    if len(body) > _MAX_BODY:
        raise InvalidInputError(
            f"a request of {len(body)} bytes is more than protobuf can carry",
            hint="One example must stay below 2 GiB.",
        )
    return body


# ---- The encoding ----


def _varint(value: int) -> bytes:
    """An int32 or int64; a negative one takes ten bytes."""
    if not -(1 << 63) <= value < (1 << 63):
        raise ValueError(f"{value} does not fit into 64 bits")
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(field: int, wire_type: int) -> bytes:
    return bytes((field << 3 | wire_type,))


def _head(field: int, size: int) -> bytes:
    """What comes before *size* bytes."""
    return _tag(field, _BYTES) + _varint(size)


def _bytes(field: int, value: bytes) -> bytes:
    return _head(field, len(value)) + value if value else b""


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _number(field: int, value: int) -> bytes:
    return _tag(field, _VARINT) + _varint(value) if value else b""


def _message(field: int, content: bytes) -> bytes:
    """A submessage, or one case of a oneof: present even when it is empty."""
    return _head(field, len(content)) + content


# ---- A batch ----


def _put_datum(parts: List[Part], datum: Datum) -> None:
    at = len(parts)
    parts.append(b"")  # its head, once its size is known
    size = 0
    for chunk in datum.model_input.chunks:
        size += _put_chunk(parts, chunk)
    inputs = datum.loss_fn_inputs
    for name in sorted(inputs) if len(inputs) > 1 else inputs:
        size += _put_input(parts, name, inputs[name])
    for field, spans in ((3, datum.model_input_spans), (4, datum.loss_fn_input_spans)):
        for span in spans or ():
            written = _message(field, _span(span))
            parts.append(written)
            size += len(written)
    parts[at] = _head(3, size)


def _put_chunk(parts: List[Part], chunk: ModelInputChunk) -> int:
    """Append *chunk*; return how many bytes that is."""
    if isinstance(chunk, EncodedTextChunk):
        tokens = np.asarray(chunk.tokens_np, "<i4")
        head = _text_chunk_head(tokens.nbytes)
        parts += (head, tokens)
        return len(head) + tokens.nbytes
    if isinstance(chunk, ImageChunk):
        content = _bytes(1, chunk.data) + _text(2, chunk.format)
        if chunk.expected_tokens is not None:
            content += _tag(3, _VARINT) + _varint(chunk.expected_tokens)
        written = _message(1, _message(2, content))
    elif isinstance(chunk, DmelChunk):
        written = _message(1, _message(3, _bytes(1, chunk.dmel)))
    else:
        raise InvalidInputError(
            f"a {type(chunk).__name__} has no protobuf form; it is for sampling only",
            hint="Load the image and pass its bytes as an ImageChunk.",
        )
    parts.append(written)
    return len(written)


@lru_cache(4096)
def _text_chunk_head(nbytes: int) -> bytes:
    tokens = _head(1, nbytes) if nbytes else b""
    text = _head(1, len(tokens) + nbytes) + tokens
    return _head(1, len(text) + nbytes) + text


def _put_input(parts: List[Part], name: str, tensor: TensorData) -> int:
    """Append one entry of the map of loss inputs; return how many bytes that is."""
    arrays = [np.asarray(tensor.values, "<f4" if tensor.dtype == "float32" else "<i8")]
    if tensor.crow_indices is not None and tensor.col_indices is not None:
        arrays += [np.asarray(a, "<i8") for a in (tensor.crow_indices, tensor.col_indices)]
    sizes = tuple([array.nbytes for array in arrays])
    frame = _input_frame(name, tensor.dtype, tensor.shape, sizes)
    for head, array in zip(frame, arrays):
        parts += (head, array)
    parts.append(frame[-1])
    return sum(sizes) + sum(map(len, frame))


@lru_cache(4096)
def _input_frame(
    name: str, dtype: str, shape: Tuple[int, ...], sizes: Tuple[int, ...]
) -> Sequence[bytes]:
    """What stands before each of the arrays of a loss input, and after the last."""
    tail = _number(3, _FLOAT32 if dtype == "float32" else _INT64)
    tail += _bytes(4, b"".join([_varint(n) for n in shape]))
    if len(sizes) == 1:
        heads = [_head(1, sizes[0])]  # a oneof: present even when it is empty
    else:
        heads = [_head(field, size) if size else b"" for field, size in enumerate(sizes, 1)]
        heads[0] = _head(2, sum(map(len, heads)) + sum(sizes)) + heads[0]
    value_size = sum(map(len, heads)) + sum(sizes) + len(tail)
    key = _message(1, name.encode())
    entry = key + _head(2, value_size)
    heads[0] = _head(2, len(entry) + value_size) + entry + heads[0]
    return (*heads, tail)


def _span(span: ProvenanceSpan) -> bytes:
    content = _text(1, span.sequence_id) + _number(2, span.offset) + _number(3, span.length)
    return _message(2 if isinstance(span, SampledProvenanceSpan) else 1, content)


def _put_config(
    parts: List[Part], config: Mapping[str, Union[float, str]], forward_only: bool
) -> None:
    """Numbers go out in both maps, for older servers; texts in the newer one only."""
    newer: List[bytes] = []
    for name in sorted(config):
        value, key = config[name], _message(1, name.encode())
        if isinstance(value, str):
            newer.append(_message(7, key + _message(2, _message(2, value.encode()))))
            continue
        number = struct.pack("<d", float(value))
        parts.append(_message(5, key + _tag(2, _FIXED64) + number))
        newer.append(_message(7, key + _message(2, _tag(1, _FIXED64) + number)))
    parts.append(_number(6, int(forward_only)))
    parts += newer
