"""JSON as the embedded server reads and writes it: of a bounded depth and number of values.

A body that is nested too deeply is rejected on arrival: if it were stored, every later response
that shows it would fail.  A body with too many values is rejected before it is parsed, since a
Python object takes many times the bytes of its JSON.  Pure; no threads.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import orjson

from tinkex.local.errors import HTTPError

#: Most levels of nesting in a body.  Low enough for responses, which nest stored values a little
#: deeper, and for Python's recursion limit.
MAX_LEVELS = 400

#: Most lists and objects in a body, which take up to 250 bytes each in memory, and most other
#: values, which take up to 100.
MAX_CONTAINERS = 1 << 20
MAX_VALUES = 1 << 23

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"')
_BRACKETS = b"[]{}"
_NO_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))


def read_json(raw: bytes) -> Any:
    """Decode *raw*.

    Raises:
        HTTPError: 400 if it is not JSON, or nested too deeply; 413 if it has too many values.
    """
    check_values(raw)
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise HTTPError(400, f"the body is not JSON: {error}") from error
    check_levels(raw)
    return value


def check_values(raw: bytes) -> None:
    """Raise HTTPError 413 if *raw*, which need not be JSON, has too many values."""
    if len(raw) <= MAX_CONTAINERS:
        return
    # Brackets and commas within strings are counted, too: these bounds need no precision.
    for found, most, what in (
        (raw.count(b"[") + raw.count(b"{"), MAX_CONTAINERS, "lists and objects"),
        (raw.count(b","), MAX_VALUES, "values"),
    ):
        if found > most:
            raise HTTPError(413, f"the body has more than {most} {what}; send smaller requests")


def check_levels(raw: bytes) -> None:
    """Raise HTTPError 400 if *raw*, which must be JSON, is nested too deeply."""
    if levels(raw) > MAX_LEVELS:
        raise HTTPError(400, f"the body is nested too deeply; at most {MAX_LEVELS} levels")


def levels(raw: bytes) -> int:
    """Return the depth of *raw*, which must be JSON, or a bound on it within `MAX_LEVELS`."""
    openings = raw.count(b"[") + raw.count(b"{")
    if openings <= MAX_LEVELS:
        return openings
    # From the text, because a large batch has too many parsed values to visit one by one.
    if b"\\" in raw:
        raw = _ESCAPE.sub(b"", raw)
    brackets = _STRING.sub(b"", raw).translate(None, _NO_BRACKETS)
    return max(itertools.accumulate(1 if byte in b"[{" else -1 for byte in brackets), default=0)


def write_json(value: Any, *, sort_keys: bool = False) -> bytes:
    """Encode *value*; numpy arrays are written as lists."""
    option = orjson.OPT_SERIALIZE_NUMPY | (orjson.OPT_SORT_KEYS if sort_keys else 0)
    try:
        return orjson.dumps(value, option=option)
    except TypeError:
        # orjson writes at most 254 levels.  A value of the wrong type raises TypeError here again.
        text = json.dumps(
            value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort_keys
        )
        return text.encode()
