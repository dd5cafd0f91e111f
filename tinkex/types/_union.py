"""Objects of several kinds, told apart by their ``type``; kinds made up later survive."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Dict, Mapping, Optional, Type

from dataclasses_json import config

from tinkex.errors import ResponseDecodeError
from tinkex.types._exact import CODERS
from tinkex.types._wire import Wire, bulk, excerpt


@dataclasses.dataclass(frozen=True)
class UnknownVariant(Wire):
    """An object whose ``type`` this version does not know; ``fields`` is all of it, as sent."""

    type: Optional[str] = None
    fields: Dict[str, Any] = bulk({})

    def to_wire(self) -> Dict[str, Any]:
        """Return the object as it was sent."""
        return dict(self.fields)


def reader(*members: Type[Wire]) -> Callable[[Any], Wire]:
    """Return what reads an object of one of *members*, whose ``type`` has a default value."""
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
    """A dataclass field that holds one of *members*, an UnknownVariant, or *default*."""
    read = reader(*members)
    metadata = {**config(encoder=_to_wire, decoder=read), CODERS: (_to_wire, read)}
    return dataclasses.field(default=default, metadata=metadata)


def _to_wire(value: Optional[Wire]) -> Any:
    return None if value is None else value.to_wire()
