"""Writes a ForwardBackwardRequest around the arrays of its batch.

The message is described in docs/protocol.md, "Requests in protobuf".

Most of what a training run sends is batches.  The protobuf library would copy every array three
times: into a bytes object, into a message and into the body.  Here, the arrays themselves are parts
of the body, between a few bytes of framing, which repeat from datum to datum and are cached.
"""

from __future__ import annotations

import math
import struct
import sys
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, List, Mapping, Sequence, Tuple, Union

from tinkex.errors import InvalidInputError, a_type
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
from tinkex.types._numbers import as_kept
from tinkex.wire.codec import Parts

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
else:
    Array = Any

#: Bytes, or an array whose memory is sent as is.
Part = Any

#: Wire types (protobuf encoding guide).
_VARINT, _FIXED64, _BYTES = 0, 1, 2

_INT32_BYTES = 4

_FLOAT32, _INT64 = 1, 2  # values of the enum DType

#: Protobuf parsers accept no larger body.
_MAX_BODY = (1 << 31) - 1

#: Datums are added to a block until it has this size.  Smaller blocks are slower: each takes a
#: system call, during which the interpreter switches to another thread.
_BLOCK_BYTES = 1 << 20

#: Whether arrays have the same byte order in memory as on the wire.
_LITTLE = sys.byteorder == "little"


def forward_backward_request(request: ForwardBackwardRequest) -> Parts:
    """Encode *request*, with maps sorted by key.

    Raises:
        InvalidInputError: a chunk has no protobuf form, or the body would be too large.
        ValueError: a number or a string cannot be encoded.
    """
    block: List[Part] = [_text(1, request.model_id), _number(2, request.seq_id)]
    blocks, filled, total = [block], 0, sum(map(len, block))
    for datum in request.data:
        # Blocks end only between datums: cutting an array would copy it.
        if filled >= _BLOCK_BYTES:
            block, filled = [], 0
            blocks.append(block)
        size = _put_datum(block, datum)
        filled += size
        total += size
    tail = [_text(4, request.loss_fn), *_config(request.loss_fn_config, request.forward_only)]
    block += tail
    total += sum(map(len, tail))
    if total > _MAX_BODY:
        raise InvalidInputError(
            f"a request of {total} bytes exceeds the limit of protobuf, 2 GiB",
            hint="A single datum must be smaller than 2 GiB.",
        )
    return Parts(blocks, total)


# ---- The encoding ----


def _varint(value: int) -> bytes:
    """Encode an int32 or int64; negative values take ten bytes."""
    if not -(1 << 63) <= value < (1 << 63):
        raise ValueError(f"{value} does not fit into 64 bits")
    # Negative numbers, also int32, are written in 64-bit two's complement.
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(field: int, wire_type: int) -> bytes:
    return bytes((field << 3 | wire_type,))


# Cached, like the frames below: the sizes in a batch repeat, and a varint takes a Python loop.
@lru_cache(4096)
def _head(field: int, size: int) -> bytes:
    """Return the tag and the length before *size* bytes."""
    return _tag(field, _BYTES) + _varint(size)


def _bytes(field: int, value: bytes) -> bytes:
    return _head(field, len(value)) + value if value else b""


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _number(field: int, value: int) -> bytes:
    # Nothing for 0: like the protobuf library, leave out proto3's default values.
    return _tag(field, _VARINT) + _varint(value) if value else b""


def _message(field: int, content: bytes) -> bytes:
    """Encode a submessage or a case of a oneof, which is present even if empty."""
    return _head(field, len(content)) + content


# ---- A batch ----


def _put_datum(block: List[Part], datum: Datum) -> int:
    """Append *datum*; return its size in bytes."""
    # The head of a message holds its size, which is known only once its parts are.
    at = len(block)
    block.append(b"")
    size = 0
    for chunk in datum.model_input.chunks:
        if isinstance(chunk, EncodedTextChunk):
            tokens = as_kept(chunk, "tokens_np") if _LITTLE else _swapped(chunk.tokens_np)
            head = _text_chunk_head(_INT32_BYTES * len(tokens))
            block += (head, tokens)
            size += len(head) + _INT32_BYTES * len(tokens)
        else:
            written = _message(1, _other_chunk(chunk))
            block.append(written)
            size += len(written)
    inputs = datum.loss_fn_inputs
    # Sorted, so that the same batch gives the same bytes (docs/protocol.md, "Protobuf encoding").
    for name in sorted(inputs) if len(inputs) > 1 else inputs:
        tensor = inputs[name]
        if tensor.crow_indices is None or tensor.col_indices is None:
            head, tail, nbytes = _dense_frame(name, tensor.dtype, tensor.shape)
            block += (head, tensor.values if _LITTLE else _swapped(tensor.values), tail)
            size += nbytes
        else:
            arrays = [tensor.values, tensor.crow_indices, tensor.col_indices]
            arrays = arrays if _LITTLE else [_swapped(array) for array in arrays]
            size += _put_sparse(block, name, tensor, arrays)
    if datum.model_input_spans is not None:
        size += _put_spans(block, 3, datum.model_input_spans)
    if datum.loss_fn_input_spans is not None:
        size += _put_spans(block, 4, datum.loss_fn_input_spans)
    head = block[at] = _head(3, size)
    return len(head) + size


def _swapped(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("<"))


@lru_cache(4096)
def _text_chunk_head(nbytes: int) -> bytes:
    tokens = _head(1, nbytes) if nbytes else b""
    text = _head(1, len(tokens) + nbytes) + tokens
    return _head(1, len(text) + nbytes) + text


def _other_chunk(chunk: ModelInputChunk) -> bytes:
    """Encode the content of a chunk that is not text."""
    if isinstance(chunk, ImageChunk):
        content = _bytes(1, chunk.data) + _text(2, chunk.format)
        if chunk.expected_tokens is not None:
            content += _tag(3, _VARINT) + _varint(chunk.expected_tokens)
        return _message(2, content)
    if isinstance(chunk, DmelChunk):
        return _message(3, _bytes(1, chunk.dmel))
    raise InvalidInputError(
        f"{a_type(chunk)} has no protobuf form; it is for sampling only",
        hint="Load the image and pass its bytes as an ImageChunk.",
    )


@lru_cache(4096)
def _dense_frame(name: str, dtype: str, shape: Tuple[int, ...]) -> Tuple[bytes, bytes, int]:
    """Return the bytes before and after the values of a loss input, and the size of all three."""
    nbytes = math.prod(shape) * (4 if dtype == "float32" else 8)
    tail = _tensor_tail(dtype, shape)
    head = _head(1, nbytes)  # a case of a oneof, so written even if empty
    head = _entry_head(name, len(head) + nbytes + len(tail)) + head
    return head, tail, len(head) + nbytes + len(tail)


def _put_sparse(block: List[Part], name: str, tensor: TensorData, arrays: List[Array]) -> int:
    """Append a sparse loss input with its three *arrays*; return its size in bytes."""
    pairs = [(_head(field, a.nbytes), a) for field, a in enumerate(arrays, 1) if a.nbytes]
    size = sum(len(head) + array.nbytes for head, array in pairs)
    csr, tail = _head(2, size), _tensor_tail(tensor.dtype, tensor.shape)
    size += len(csr) + len(tail)
    entry = _entry_head(name, size)
    block += (entry, csr, *chain.from_iterable(pairs), tail)
    return len(entry) + size


def _entry_head(name: str, size: int) -> bytes:
    """Return the bytes that precede a tensor of *size* bytes in the map of loss inputs."""
    entry = _message(1, name.encode()) + _head(2, size)
    return _head(2, len(entry) + size) + entry


def _tensor_tail(dtype: str, shape: Tuple[int, ...]) -> bytes:
    """Return the bytes that follow a tensor's values: dtype and shape."""
    code = _FLOAT32 if dtype == "float32" else _INT64
    return _number(3, code) + _bytes(4, b"".join([_varint(n) for n in shape]))


def _put_spans(block: List[Part], field: int, spans: Sequence[ProvenanceSpan]) -> int:
    """Append *spans*; return their size in bytes."""
    written = [_message(field, _span(span)) for span in spans]
    block += written
    return sum(map(len, written))


def _span(span: ProvenanceSpan) -> bytes:
    content = _text(1, span.sequence_id) + _number(2, span.offset) + _number(3, span.length)
    return _message(2 if isinstance(span, SampledProvenanceSpan) else 1, content)


def _config(config: Mapping[str, Union[float, str]], forward_only: bool) -> List[bytes]:
    """Encode the config: numbers in both maps, for older servers; strings in the newer one."""
    older: List[bytes] = []
    newer: List[bytes] = []
    for name in sorted(config):
        value, key = config[name], _message(1, name.encode())
        if isinstance(value, str):
            newer.append(_message(7, key + _message(2, _message(2, value.encode()))))
            continue
        number = struct.pack("<d", float(value))
        older.append(_message(5, key + _tag(2, _FIXED64) + number))
        newer.append(_message(7, key + _message(2, _tag(1, _FIXED64) + number)))
    return [*older, _number(6, int(forward_only)), *newer]
