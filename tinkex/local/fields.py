"""Fields of JSON bodies, checked while they are read.  Pure; no threads."""

from __future__ import annotations

import math
from typing import Any, Dict, Optional, Type, TypeVar

from tinkex.errors import InvalidInputError, TinkexError
from tinkex.local.errors import HTTPError
from tinkex.local.json_text import write_json
from tinkex.types._wire import Wire

T = TypeVar("T")
W = TypeVar("W", bound=Wire)

#: Most of what a client may have the server keep: of a text, of metadata.
_MOST_CHARACTERS = 10_000
_MOST_KEPT_BYTES = 64 << 10


def need(body: Dict[str, Any], name: str, kind: Type[T]) -> T:
    """Return a field of the body; HTTPError 400 if it is missing or of another type."""
    value = optional(body, name, kind)
    if value is None:
        raise HTTPError(400, f"field {name!r} is missing")
    return value


def optional(body: Dict[str, Any], name: str, kind: Type[T]) -> Optional[T]:
    """Return a field of the body, None if it is missing or null; HTTPError 400 if mistyped."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise HTTPError(400, f"field {name!r} must be of type {kind.__name__}, not {value!r:.100}")
    if isinstance(value, str) and len(value) > _MOST_CHARACTERS:
        raise HTTPError(
            400, f"field {name!r} has {len(value)} characters; at most {_MOST_CHARACTERS}"
        )
    return value


def metadata(body: Dict[str, Any], name: str = "user_metadata") -> Optional[Dict[str, Any]]:
    """Return what a client keeps with a thing, None if nothing; HTTPError 400 if it is too much.

    Lists show it again and again.
    """
    value: Optional[Dict[str, Any]] = optional(body, name, dict)
    check_kept(name, value)
    return value


def check_kept(name: str, value: object) -> None:
    """Raise HTTPError 400 if *value*, which is to be kept, takes more than 64 KiB as JSON."""
    size = len(write_json(value))
    if size > _MOST_KEPT_BYTES:
        raise HTTPError(400, f"{name} takes {size} bytes as JSON; at most {_MOST_KEPT_BYTES}")


def need_seq_id(body: Dict[str, Any], name: str = "seq_id", least: int = 0) -> int:
    """Return a sequence number of the body; HTTPError 400 if it is missing or too small."""
    value = need(body, name, int)
    if value < least:
        raise HTTPError(400, f"{name} is {value}; it starts at {least}")
    return value


def read_wire(kind: Type[W], payload: Any, name: str) -> W:
    """Read a nested message; HTTPError 400 if it is malformed."""
    try:
        return kind.from_wire(payload)
    except TinkexError as error:
        raise HTTPError(400, f"{name}: {error}") from error


def ttl_seconds(body: Dict[str, Any]) -> Optional[float]:
    """Return the lifetime of a checkpoint, None for ever; HTTPError 400 out of its range."""
    value = body.get("ttl_seconds")
    if value is None:
        return None
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not 3600 <= value <= 10 * 366 * 86400:
        raise HTTPError(400, f"ttl_seconds is {value!r}; it must lie between 3600 and ten years")
    return float(value)


def as_problem(error: InvalidInputError) -> HTTPError:
    """The answer to a value that is not valid."""
    return HTTPError(400, str(error))
