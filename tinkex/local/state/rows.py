"""The rows of the store: frozen values, and how they are read from SQLite and written.

No state, no threads.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from datetime import datetime, timezone
from typing import Any, Dict, Optional, Tuple, Type, TypeVar

from tinkex.local.json_text import MAX_LEVELS, levels
from tinkex.types import LoraConfig

R = TypeVar("R")

#: Columns that hold JSON.
_JSON = frozenset({"facts", "lora", "optimizer", "user_metadata", "details"})


@dataclasses.dataclass(frozen=True)
class SessionRow:
    """A session.

    *state* is live, expired, finished or lost (the server ended first); *reason* is a sentence.
    *end_reason* and *end_detail* come from the client that finished it.
    """

    session_id: str
    created_at: float
    state: str
    facts: Dict[str, Any]
    ended_at: Optional[float]
    reason: Optional[str]
    project_id: Optional[str]
    end_reason: Optional[str]
    end_detail: Optional[str]


@dataclasses.dataclass(frozen=True)
class RunRow:
    """A training run, loaded or not.  The run of a copied checkpoint belongs to no session."""

    run_id: str
    session_id: str
    created_at: float
    last_request_at: float
    base_model: str
    lora: LoraConfig
    optimizer: Dict[str, Any]
    user_metadata: Optional[Dict[str, Any]]
    project_id: Optional[str]


@dataclasses.dataclass(frozen=True)
class CheckpointRow:
    """A saved checkpoint; *kind* is the path segment (weights, ...)."""

    run_id: str
    kind: str
    name: str
    created_at: float
    folder: str
    size_bytes: int
    public: bool
    expires_at: Optional[float]
    user_metadata: Optional[Dict[str, Any]]

    @property
    def key(self) -> Tuple[str, str, str]:
        """Its identity: run, kind and name."""
        return self.run_id, self.kind, self.name

    @property
    def tinker_path(self) -> str:
        """The ``tinker://`` path."""
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"


@dataclasses.dataclass(frozen=True)
class SamplerRow:
    """A sampling session."""

    sampler_id: str
    session_id: str
    created_at: float
    base_model: str
    model_path: Optional[str]


@dataclasses.dataclass(frozen=True)
class AuditRow:
    """An entry of the audit log; *event_type* is checkpoints or projects."""

    at: float
    event_type: str
    event: str
    details: Dict[str, Any]
    run_id: Optional[str]
    tinker_path: Optional[str]


def timestamp(seconds: float) -> str:
    """Return *seconds* as RFC 3339 in UTC, with microseconds; later times sort later."""
    # By default, isoformat leaves out a fraction of zero, and the texts would not sort by time.
    text = datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="microseconds")
    return text.replace("+00:00", "Z")


def dumps(value: Optional[Dict[str, Any]]) -> Optional[str]:
    """Return the JSON of an object for a column; None for None."""
    return None if value is None else json.dumps(value)


def audit_statement(
    at: float,
    event_type: str,
    event: str,
    details: Dict[str, Any],
    run_id: Optional[str] = None,
    tinker_path: Optional[str] = None,
) -> Tuple[Any, ...]:
    """Return the statement that adds a row to the audit log, for the change's transaction."""
    values = (at, event_type, event, json.dumps(details), run_id, tinker_path)
    return ("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?)", *values)


def _loads(text: str) -> Dict[str, Any]:
    value: Dict[str, Any] = json.loads(text)
    if levels(text.encode()) <= MAX_LEVELS:
        return value
    # Older versions stored values that are too deep for any response; these are left out.  In the
    # object, a value is one level deeper than by itself, hence `<` below.
    texts = {name: json.dumps(one).encode() for name, one in value.items()}
    return {name: one for name, one in value.items() if levels(texts[name]) < MAX_LEVELS}


def read_row(kind: Type[R], row: sqlite3.Row) -> R:
    """Return a row of SQLite as a value of *kind*."""
    facts: Dict[str, Any] = dict(row)
    for name in _JSON.intersection(facts):
        facts[name] = None if facts[name] is None else _loads(facts[name])
    if "lora" in facts:
        facts["lora"] = LoraConfig.from_wire(facts["lora"])
    if "public" in facts:
        facts["public"] = bool(facts["public"])
    return kind(**facts)
