"""Handles of samplers: text from which another process can make a client of the same one."""

from __future__ import annotations

import base64
from typing import Any, Dict, NamedTuple, Optional, Tuple

import orjson

from tinkex.config import Config
from tinkex.errors import InvalidInputError

#: What a handle tells of the settings.  Not the key, nor what may hold a secret or a path.
_SETTINGS = (
    "base_url",
    "wire",
    "heartbeat_interval_s",
    "heartbeat_warn_after_s",
    "max_outage_s",
    "max_concurrent_samples",
    "max_unanswered_samples",
)


class HandedOn(NamedTuple):
    """What another process must know of a sampler."""

    session_id: str
    sampling_session_id: str
    base_model: Optional[str]
    model_path: Optional[str]
    record_stability_info: bool


def write_handle(facts: HandedOn, config: Config, *, include_api_key: bool) -> str:
    """Return the handle."""
    settings = {name: getattr(config, name) for name in _SETTINGS}
    if include_api_key:
        settings["api_key"] = config.api_key
    state = {**facts._asdict(), "settings": settings}
    return base64.urlsafe_b64encode(orjson.dumps(state)).decode("ascii")


def read_handle(handle: str) -> Tuple[HandedOn, Dict[str, Any]]:
    """Return what is in a handle, and the settings.

    Raises:
        InvalidInputError: it is none.
    """
    try:
        state = orjson.loads(base64.urlsafe_b64decode(handle))
        facts = HandedOn(
            state["session_id"],
            state["sampling_session_id"],
            state.get("base_model"),
            state.get("model_path"),
            bool(state.get("record_stability_info")),
        )
        return facts, dict(state["settings"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInputError(f"this is not a sampler handle: {error}") from error
