"""How many messages a protobuf body of a pass may hold, checked before it is parsed.

A message of two bytes becomes some fifty when it is parsed, and a thousand as a Python object.
Pure; no threads.
"""

from __future__ import annotations

from typing import Iterator, Tuple

from tinkex.local.errors import HTTPError

#: Most datums, chunks, loss inputs and spans of a request, together.
MAX_MESSAGES = 1 << 17

#: Bytes of the smallest message.
_LEAST_BYTES = 2

_DATA_FIELD = 3


def check_messages(raw: bytes) -> None:
    """Raise HTTPError 413 if *raw*, a ForwardBackwardRequest, holds too many messages."""
    if len(raw) <= MAX_MESSAGES * _LEAST_BYTES:
        return
    count = 0
    for number, start, stop in _fields(raw, 0, len(raw)):
        count += 1
        if number == _DATA_FIELD:
            for _ in _fields(raw, start, stop):
                count += 1
                if count > MAX_MESSAGES:
                    break
        if count > MAX_MESSAGES:
            raise HTTPError(
                413,
                f"the batch has more than {MAX_MESSAGES} datums, chunks and loss inputs; send "
                "smaller batches",
            )


def _fields(raw: bytes, start: int, stop: int) -> Iterator[Tuple[int, int, int]]:
    """Yield number, start and end of each field with a length, up to one that is malformed.

    The parser rejects what is malformed, and has kept nothing but what comes before it.
    """
    while start < stop:
        tag, start = _varint(raw, start)
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
    """Return the number at *start*, and where it ends; it may end behind *raw*."""
    value = shift = 0
    while start < len(raw) and shift < 70:
        byte = raw[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, start
