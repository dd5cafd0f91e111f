"""Fast reading and writing of messages whose values have exactly the declared types.

dataclasses-json takes 0.4 ms for an object of eight fields, nearly a second for a list of 2000
checkpoints, because it inspects the class each time.  Here each class is inspected only once.
Values of any other type are left to dataclasses-json, which converts them or raises an error.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any, Callable, Dict, List, Optional, Tuple

Convert = Callable[[Any], Any]

#: Key in a field's metadata for the field's own encoder and decoder.
CODERS = "tinkex"

_PLAIN = (str, int, bool, float)


class Unusual(Exception):
    """A value does not have exactly the declared type."""


@functools.cache
def reader_of(cls: type) -> Optional[Convert]:
    """Return a function from decoded JSON to *cls*; None if a field has an unsupported type.

    The function treats null as missing.  It raises Unusual, or whatever a field's decoder raises.
    """
    found = _converters(cls, reads=True)
    if found is None:
        return None
    fields = [(field.name, convert, _is_required(field)) for field, convert in found]

    def read(payload: Any) -> Any:
        if type(payload) is not dict:
            raise Unusual
        values: Dict[str, Any] = {}
        for name, convert, required in fields:
            value = payload.get(name)
            if value is not None:
                values[name] = convert(value)
            elif required:
                raise Unusual
        return cls(**values)

    return read


@functools.cache
def writer_of(cls: type) -> Optional[Convert]:
    """Return a function from *cls* to JSON without nulls; None if a field has an unsupported type.

    The function raises Unusual.
    """
    found = _converters(cls, reads=False)
    if found is None:
        return None
    fields = [(field.name, convert) for field, convert in found]

    def write(message: Any) -> Dict[str, Any]:
        if type(message) is not cls:
            raise Unusual
        values = ((name, convert, getattr(message, name)) for name, convert in fields)
        return {name: convert(value) for name, convert, value in values if value is not None}

    return write


def _converters(
    cls: type, *, reads: bool
) -> Optional[List[Tuple[dataclasses.Field[Any], Convert]]]:
    """Return the fields of *cls* with their converters; None if any field has no converter."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        convert = _of_field(field, hints[field.name], reads)
        if convert is None:
            return None
        found.append((field, convert))
    return found


def _of_field(field: dataclasses.Field[Any], hint: Any, reads: bool) -> Optional[Convert]:
    if CODERS in field.metadata:
        encode, decode = field.metadata[CODERS]
        found: Optional[Convert] = decode if reads else encode
        return found
    return None if field.metadata else _of_type(hint, reads)


def _of_type(hint: Any, reads: bool) -> Optional[Convert]:
    inner = [one for one in typing.get_args(hint) if one is not type(None)]
    if typing.get_origin(hint) is typing.Union and len(inner) == 1:
        return _of_type(inner[0], reads)
    if typing.get_origin(hint) is list:
        one = _of_type(inner[0], reads)
        return None if one is None else functools.partial(_each, one)
    if hint in _PLAIN:
        return functools.partial(_exactly, hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return reader_of(hint) if reads else writer_of(hint)
    return None


def _exactly(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise Unusual
    return value


def _each(convert: Convert, values: Any) -> List[Any]:
    if type(values) is not list:
        raise Unusual
    return [convert(value) for value in values]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
