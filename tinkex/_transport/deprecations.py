"""Says once what a server has to say about the end of a route: ``x-deprecation-note``."""

from __future__ import annotations

import logging
from typing import Mapping, Set

from tinkex._runtime import lifecycle

logger = logging.getLogger(__name__)

# So many different notes are told apart; a server that makes up new ones is not listened to.
_MOST = 256

# Notes that were logged.  Guarded by lifecycle.module_lock().
_told: Set[str] = set()


def note_deprecation(name: str, headers: Mapping[str, str]) -> None:
    """Log the note among an answer's *headers* (lower-case names), if it is new; *name* asked."""
    note = headers.get("x-deprecation-note", "")[:500]
    if not note:
        return
    with lifecycle.module_lock():
        new = note not in _told and len(_told) < _MOST
        if new:
            _told.add(note)
    if new:
        is_error = headers.get("x-deprecation-level", "").lower() == "error"
        logger.log(logging.ERROR if is_error else logging.WARNING, "%s: %s", name, note)
