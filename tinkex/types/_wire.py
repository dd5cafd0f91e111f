"""The base of JSON control messages, built on dataclasses-json.

dataclasses-json (measured with 0.6.7) walks every element of a list (360 ms for 32k tokens), writes
None fields, reports a missing key as a bare KeyError, and only warns about a null in a field that
must not be None.  Hence `bulk`, which passes a value through unwalked, and `Wire`, which drops None
in both directions and raises typed errors.  Because dataclasses-json is slow, `_exact` converts
messages whose values have exactly the declared types.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import typing
from datetime import datetime
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Tuple, Type, TypeVar

from dataclasses_json import DataClassJsonMixin, config

from tinkex.errors import ResponseDecodeError
from tinkex.types._exact import CODERS, Unusual, reader_of, writer_of

W = TypeVar("W", bound="Wire")

_RFC3339 = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)[Tt ](?P<time>\d\d:\d\d:\d\d)(?:\.(?P<fraction>\d+))?"
    r"(?P<zone>[Zz]|[+-]\d\d:?\d\d)?"
)


def _identity(value: Any) -> Any:
    return value


def _as_it_is(value: Any) -> Any:
    if type(value) not in (dict, list):
        raise Unusual  # dataclasses-json converts other mappings and sequences
    return value


def json_object(value: Any) -> Any:
    """Return *value* if it is an object or None; otherwise raise ValueError."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{excerpt(value, 80)} is not an object")
    return value


def json_strings(value: Any) -> Any:
    """Return *value* if it is a list of strings or None; otherwise raise ValueError."""
    if value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        return value
    raise ValueError(f"{excerpt(value, 80)} is not a list of strings")


def json_string_map(value: Any) -> Any:
    """Return *value* if it maps names to strings; otherwise raise ValueError."""
    if any(not isinstance(one, str) for one in json_object(value).values()):
        raise ValueError(f"{excerpt(value, 80)} holds values that are not strings")
    return value


def json_number_map(value: Any) -> Dict[str, float]:
    """Return *value*, a map from names to numbers or null, as floats with NaN for null.

    JSON has no NaN, so servers write null.  Raises ValueError if *value* is not such a map.
    """
    items = json_object(value).values()
    if any(one is not None and type(one) not in (int, float) for one in items):
        raise ValueError(f"{excerpt(value, 80)} holds values that are not numbers")
    return {name: math.nan if one is None else float(one) for name, one in value.items()}


def bulk(default: Any = dataclasses.MISSING, *, read: Callable[[Any], Any] = json_object) -> Any:
    """Return a dataclass field whose value is passed to *read* whole, without being walked."""
    metadata = {**config(encoder=_identity, decoder=read), CODERS: (_as_it_is, read)}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_datetime(value: Any) -> Optional[datetime]:
    """Read an RFC 3339 time (docs/protocol.md, "Bodies"); a naive time is taken as UTC.

    Digits past the microseconds are dropped.  Raises ValueError if *value* is not such a time.
    """
    if value is None or isinstance(value, datetime):
        return value
    match = _RFC3339.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{excerpt(value, 80)} is not an RFC 3339 time")
    # Parsed by hand, because fromisoformat before Python 3.11 accepts only 3 or 6 digits, and no Z.
    fraction = (match["fraction"] or "")[:6].ljust(6, "0")
    zone = (match["zone"] or "Z").upper().replace(":", "").replace("Z", "+0000")
    text = f"{match['date']}T{match['time']}.{fraction}{zone[:3]}:{zone[3:]}"
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{excerpt(value, 80)} is not an RFC 3339 time: {error}") from error


def _format_datetime(value: Optional[datetime]) -> Optional[str]:
    return None if value is None else value.isoformat()


def instant(default: Any = None) -> Any:
    """Return a dataclass field that holds an aware datetime, RFC 3339 on the wire."""
    coding = config(encoder=_format_datetime, decoder=parse_datetime)
    metadata = {**coding, CODERS: (_format_datetime, parse_datetime)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Wire(DataClassJsonMixin):
    """A control message: a frozen dataclass with a JSON form."""

    def to_wire(self) -> Dict[str, Any]:
        """Return the JSON form without fields that are None, including in nested messages."""
        write = writer_of(type(self))
        if write is not None:
            try:
                written: Dict[str, Any] = write(self)
                return written
            except Unusual:
                pass
        cleaned: Dict[str, Any] = _without_nulls(type(self), self.to_dict(encode_json=False))
        return cleaned

    @classmethod
    def from_wire(cls: Type[W], payload: Any) -> W:
        """Read a decoded JSON value.  Unknown fields are ignored; null is the same as missing.

        Raises:
            ResponseDecodeError: a required field is missing, or a value is invalid.
        """
        if not isinstance(payload, dict):
            raise ResponseDecodeError(
                f"expected a JSON object for {cls.__name__}, got {excerpt(payload)}"
            )
        quick = reader_of(cls)
        try:
            if quick is not None:
                try:
                    found: W = quick(payload)
                    return found
                except Unusual:
                    pass
            return cls.from_dict(_without_nulls(cls, payload))
        except KeyError as error:  # how dataclasses-json reports a missing field
            raise ResponseDecodeError(
                f"{cls.__name__}: field {error.args[0]!r} is missing in {excerpt(payload)}"
            ) from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ResponseDecodeError(
                f"{cls.__name__}: {error}; the response was {excerpt(payload)}"
            ) from error

    def model_dump(
        self,
        *,
        mode: str = "python",
        include: Optional[Iterable[str]] = None,
        exclude: Iterable[str] = (),
        exclude_none: bool = False,
    ) -> Dict[str, Any]:
        """Return the fields as a dict, nested messages included, like the official SDK's pydantic.

        Args:
            mode: ``"python"``, or ``"json"`` for values that JSON can express: times become
                strings, NaN and infinity become None.
            include, exclude: names of fields of this message; None includes all.
            exclude_none: leave out fields that are None, also in nested messages.
        """
        dumped: Dict[str, Any] = _dumped(self, mode == "json", exclude_none)
        kept = set(dumped if include is None else include) - set(exclude)
        return {name: value for name, value in dumped.items() if name in kept}

    def model_dump_json(
        self,
        *,
        indent: Optional[int] = None,
        include: Optional[Iterable[str]] = None,
        exclude: Iterable[str] = (),
        exclude_none: bool = False,
    ) -> str:
        """Like `model_dump`, but return a JSON string: compact, or indented by *indent* spaces."""
        dumped = self.model_dump(
            mode="json", include=include, exclude=exclude, exclude_none=exclude_none
        )
        separators = (",", ":") if indent is None else None
        return json.dumps(dumped, indent=indent, ensure_ascii=False, separators=separators)


def _dumped(value: Any, as_json: bool, drop_none: bool) -> Any:
    """Return *value* with all messages inside it turned into dicts."""
    if isinstance(value, UnknownVariant):
        value = value.fields
    elif isinstance(value, Wire):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if drop_none:
            value = {name: item for name, item in value.items() if item is not None}
    if isinstance(value, dict):
        return {name: _dumped(item, as_json, drop_none) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_dumped(item, as_json, drop_none) for item in value]
    if as_json and isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if as_json and isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@functools.cache
def _message_fields(cls: Type[Wire]) -> Mapping[str, Tuple[Type[Wire], bool]]:
    """Map each field of *cls* that holds messages to their class, and whether it is a map."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        mapped = False
        while typing.get_args(hint):  # Optional[X], List[X] and Dict[str, X]
            mapped = mapped or typing.get_origin(hint) is dict
            inner = [one for one in typing.get_args(hint) if one not in (type(None), str)]
            hint = inner[0] if len(inner) == 1 else None  # unions have their own decoder
        if isinstance(hint, type) and issubclass(hint, Wire):
            found[name] = (hint, mapped)
    return found


def _without_nulls(cls: Type[Wire], payload: Any) -> Any:
    """Return *payload* without the nulls in fields of *cls* and the messages inside it.

    dataclasses-json only warns about nulls, and turning the warning into an error would need
    `warnings.catch_warnings`, which affects all threads.  Other values are unchanged.
    """
    if isinstance(payload, list):
        return [_without_nulls(cls, item) for item in payload if item is not None]
    if not isinstance(payload, dict):
        return payload
    cleaned = {name: value for name, value in payload.items() if value is not None}
    for name, (inner, mapped) in _message_fields(cls).items():
        value = cleaned.get(name)
        if mapped and isinstance(value, dict):
            cleaned[name] = {
                key: _without_nulls(inner, item) for key, item in value.items() if item is not None
            }
        elif value is not None:
            cleaned[name] = _without_nulls(inner, value)
    return cleaned


def excerpt(value: Any, limit: int = 300) -> str:
    """Return the repr of *value*, cut to *limit* characters, for an error message."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


@dataclasses.dataclass(frozen=True)
class UnknownVariant(Wire):
    """An object of a ``type`` that this version does not know; ``fields`` holds all of it."""

    type: Optional[str] = None
    fields: Dict[str, Any] = bulk({})

    def to_wire(self) -> Dict[str, Any]:
        """Return the object as it was sent."""
        return dict(self.fields)


def reader(*members: Type[Wire]) -> Callable[[Any], Wire]:
    """Return a decoder that picks the class among *members* by the default of its ``type``."""
    known: Mapping[str, Type[Wire]] = {
        field.default: member
        for member in members
        for field in dataclasses.fields(member)
        if field.name == "type" and isinstance(field.default, str)
    }

    def read(payload: Any) -> Wire:
        if isinstance(payload, Wire):
            return payload
        if not isinstance(payload, dict):
            raise ResponseDecodeError(f"expected an object with a type, got {excerpt(payload)}")
        kind = payload.get("type")
        member = known.get(kind) if isinstance(kind, str) else None
        if member is None:
            name = None if kind is None else str(kind)
            return UnknownVariant(name, dict(payload))
        return member.from_wire(payload)

    return read


def variant(*members: Type[Wire], default: Any = dataclasses.MISSING) -> Any:
    """Return a dataclass field that holds one of *members*, an UnknownVariant, or *default*."""
    read = reader(*members)
    metadata = {**config(encoder=_to_wire, decoder=read), CODERS: (_to_wire, read)}
    return dataclasses.field(default=default, metadata=metadata)


def _to_wire(value: Optional[Wire]) -> Any:
    return None if value is None else value.to_wire()
