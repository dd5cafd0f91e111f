"""Keeps the last telemetry events in memory (docs/protocol.md, "Telemetry").

Events are neither logged nor written to disk: they may hold more than their sender meant to share.
Starts no thread; thread-safe.
"""

from __future__ import annotations

import threading
from collections import deque
from datetime import datetime
from typing import Any, Deque, Dict, List

from tinkex.local.errors import HTTPError

_SEVERITIES = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_COMMON = {"event_id": str, "event_session_index": int, "severity": str, "timestamp": str}

#: The additional fields of each kind of event.
_OWN: Dict[str, Dict[str, type]] = {
    "SESSION_START": {},
    "SESSION_END": {"duration": str},
    "UNHANDLED_EXCEPTION": {"error_type": str, "error_message": str},
    "GENERIC_EVENT": {"event_name": str, "event_data": dict},
}

#: Most events of one request.
_MOST_EVENTS = 1000


class TelemetrySink:
    """The last *kept* events."""

    def __init__(self, kept: int) -> None:
        self._lock = threading.Lock()  # guards _events
        self._events: Deque[Dict[str, Any]] = deque(maxlen=kept)

    def add(self, batch: Dict[str, Any]) -> None:
        """Keep the events of a request body.  If one is malformed, keep none; HTTPError 400."""
        for name in ("platform", "sdk_version", "session_id", "process_uuid"):
            if not isinstance(batch.get(name), str):
                raise HTTPError(400, f"field {name!r} must be a text")
        events = batch.get("events")
        if not isinstance(events, list) or len(events) > _MOST_EVENTS:
            raise HTTPError(400, f"field 'events' must be a list of at most {_MOST_EVENTS} events")
        # All are checked before any is kept, so that a corrected batch can be sent again whole.
        for number, event in enumerate(events):
            _check(f"event {number}", event)
        common = {name: value for name, value in batch.items() if name != "events"}
        with self._lock:
            self._events.extend({**common, **event} for event in events)

    def events(self) -> List[Dict[str, Any]]:
        """Return the kept events, oldest first, each with the common fields of its request."""
        with self._lock:
            return list(self._events)


def _check(what: str, event: Any) -> None:
    kind = event.get("event") if isinstance(event, dict) else None
    if not isinstance(kind, str) or kind not in _OWN:
        raise HTTPError(400, f"{what} is {kind!r:.80}; it must be one of {', '.join(_OWN)}")
    for name, expected in {**_COMMON, **_OWN[kind]}.items():
        value = event.get(name)
        # In Python a bool is an int; in JSON it is not a number.
        if not isinstance(value, expected) or isinstance(value, bool):
            raise HTTPError(
                400,
                f"{what}: field {name!r} must be of type {expected.__name__}, not {value!r:.80}",
            )
    if event["severity"] not in _SEVERITIES:
        raise HTTPError(400, f"{what}: severity {event['severity']!r:.80} is unknown")
    try:
        datetime.fromisoformat(event["timestamp"].replace("Z", "+00:00"))
    except ValueError as error:
        raise HTTPError(
            400, f"{what}: timestamp {event['timestamp']!r:.80} is not an ISO 8601 time"
        ) from error
