"""Bounds on the messages and fields in the protobuf body of a pass, checked before parsing.

A message of two bytes takes about fifty when it is parsed, and a thousand as a Python object.
Pure; no threads.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, Mapping, Tuple

from tinkex.local.errors import HTTPError

#: Most datums, chunks, loss inputs and spans of a request, together.
MAX_MESSAGES = 1 << 17

#: Most fields inside these messages, at any depth, and entries of shapes.  Enough for MAX_MESSAGES
#: loss inputs, of seven fields each.
MAX_FIELDS = 1 << 20

#: Bytes of the smallest message.
_LEAST_BYTES = 2

# For each message: the fields that hold messages, with the fields of those, or packed numbers
# (each byte may be a number).  Any other field is a single value.  Keys are the field numbers in
# docs/protocol.md, "Common messages" and "Requests in protobuf".
_Nested = Mapping[int, Any]
_PACKED = None
_VALUES: Dict[int, Any] = {}
_SPAN: _Nested = {1: _VALUES, 2: _VALUES}
_CHUNK: _Nested = {1: _VALUES, 2: {4: _VALUES}, 3: _VALUES}
_TENSOR: _Nested = {2: _VALUES, 4: _PACKED}
_DATUM: Dict[int, _Nested] = {1: _CHUNK, 2: {2: _TENSOR}, 3: _SPAN, 4: _SPAN}
_CONFIG: Dict[int, _Nested] = {5: _VALUES, 7: {2: _VALUES}}

_DATA_FIELD = 3


def check_messages(raw: bytes) -> None:
    """Raise HTTPError 413 if *raw*, a ForwardBackwardRequest, holds too many messages or fields."""
    if len(raw) <= MAX_MESSAGES * _LEAST_BYTES:
        return
    messages = 0
    room = MAX_FIELDS
    for number, start, stop in _fields(raw, 0, len(raw)):
        messages += 1
        if number == _DATA_FIELD:
            for inner, inner_start, inner_stop in _fields(raw, start, stop):
                messages += 1
                if messages > MAX_MESSAGES:
                    break
                nested = _DATUM.get(inner)
                if nested is not None:
                    room -= _count(raw, inner_start, inner_stop, nested, room)
        elif number in _CONFIG:
            room -= _count(raw, start, stop, _CONFIG[number], room)
        if messages > MAX_MESSAGES:
            raise HTTPError(
                413,
                f"the batch has more than {MAX_MESSAGES} datums, chunks and loss inputs; send "
                "smaller batches",
            )
        if room < 0:
            raise HTTPError(
                413,
                f"the chunks and loss inputs of the batch have more than {MAX_FIELDS} fields; send "
                "smaller batches",
            )


def _count(raw: bytes, start: int, stop: int, nested: _Nested, room: int) -> int:
    """Return how many fields a message has, at any depth; stop soon after *room* is exceeded.

    Like `_fields`, stops at a malformed field.  The parsing is inlined, for the speed of large
    batches.
    """
    count = 0
    while start < stop and count <= room:
        tag = raw[start]
        start += 1
        if tag > 0x7F:
            tag, start = _varint(raw, start - 1)
        count += 1
        kind = tag & 7
        if kind == 2:
            if start >= stop:
                break
            size = raw[start]
            start += 1
            if size > 0x7F:
                size, start = _varint(raw, start - 1)
            if size > stop - start:
                break
            number = tag >> 3
            if number in nested:
                within = nested[number]
                if within is _PACKED:
                    count += size
                elif size:
                    count += _count(raw, start, start + size, within, room - count)
            start += size
        elif kind == 0:
            if start < stop and raw[start] > 0x7F:
                _, start = _varint(raw, start)
            else:
                start += 1
        elif kind == 1:
            start += 8
        elif kind == 5:
            start += 4
    return count


def _fields(raw: bytes, start: int, stop: int) -> Iterator[Tuple[int, int, int]]:
    """Yield number, start and end of each field with a length, up to the first malformed field.

    The parser rejects a malformed field, too, and by then has built only what comes before it.
    """
    while start < stop:
        tag = raw[start]
        if tag > 0x7F:
            tag, start = _varint(raw, start)
        else:
            start += 1
        kind = tag & 7
        if kind == 0:
            _, start = _varint(raw, start)
        elif kind == 1:
            start += 8
        elif kind == 5:
            start += 4
        elif kind == 2:
            size, start = _varint(raw, start)
            if size > stop - start:
                return
            yield tag >> 3, start, start + size
            start += size


def _varint(raw: bytes, start: int) -> Tuple[int, int]:
    """Return the number at *start*, and the index after its last byte."""
    value = shift = 0
    end = len(raw)
    while start < end and shift < 70:  # seven bits in each of ten bytes at most
        byte = raw[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, start
