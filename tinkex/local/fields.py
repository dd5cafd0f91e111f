"""Fields of JSON bodies, checked while they are read.  Pure; no threads."""

from __future__ import annotations

from typing import Any, Dict, Optional, Type, TypeVar

from tinkex._runtime.numeric import is_finite
from tinkex.errors import TinkexError
from tinkex.local.errors import HTTPError
from tinkex.local.json_text import write_json
from tinkex.types._wire import Wire

T = TypeVar("T")
W = TypeVar("W", bound=Wire)

#: Bounds on a text, and on metadata, which the server keeps and repeats in its lists.
_MAX_CHARACTERS = 10_000
_MAX_KEPT_BYTES = 64 << 10


def required(body: Dict[str, Any], name: str, kind: Type[T]) -> T:
    """Return a field of the body; HTTPError 400 if it is missing or of another type."""
    value = optional(body, name, kind)
    if value is None:
        raise HTTPError(400, f"field {name!r} is missing")
    return value


def optional(body: Dict[str, Any], name: str, kind: Type[T]) -> Optional[T]:
    """Return a field of the body, or None if it is missing or null.

    HTTPError 400 if it is of another type, or a text that is too long.
    """
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise HTTPError(400, f"field {name!r} must be of type {kind.__name__}, not {value!r:.100}")
    if isinstance(value, str) and len(value) > _MAX_CHARACTERS:
        raise HTTPError(
            400, f"field {name!r} has {len(value)} characters; at most {_MAX_CHARACTERS}"
        )
    return value


def required_seq_id(body: Dict[str, Any], name: str = "seq_id") -> int:
    """Return a sequence number of the body; HTTPError 400 if it is missing or negative."""
    value = required(body, name, int)
    if value < 0:
        raise HTTPError(400, f"{name} is {value}; it starts at 0")
    return value


def metadata(body: Dict[str, Any], name: str = "user_metadata") -> Optional[Dict[str, Any]]:
    """Return the metadata of a run or checkpoint, or None; HTTPError 400 if it is too large."""
    value: Optional[Dict[str, Any]] = optional(body, name, dict)
    check_kept(name, value)
    return value


def check_kept(name: str, value: object) -> None:
    """Raise HTTPError 400 if *value*, which the server would keep, exceeds 64 KiB as JSON."""
    size = len(write_json(value))
    if size > _MAX_KEPT_BYTES:
        raise HTTPError(400, f"{name} takes {size} bytes as JSON; at most {_MAX_KEPT_BYTES}")


def ttl_seconds(body: Dict[str, Any]) -> Optional[float]:
    """Return a checkpoint's lifetime, or None if unlimited; HTTPError 400 if out of range."""
    value = body.get("ttl_seconds")
    if value is None:
        return None
    if not is_finite(value) or not 3600 <= value <= 10 * 366 * 86400:
        raise HTTPError(400, f"ttl_seconds is {value!r}; it must lie between 3600 and ten years")
    return float(value)


def read_wire(kind: Type[W], payload: Any, name: str) -> W:
    """Read a nested message; HTTPError 400 if it is malformed."""
    try:
        return kind.from_wire(payload)
    except TinkexError as error:
        raise HTTPError(400, f"{name}: {error}") from error
