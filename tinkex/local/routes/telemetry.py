"""The sink of telemetry (docs/protocol.md, "Telemetry")."""

from __future__ import annotations

from flask import Flask, Response

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.http.messages import answer, json_body

#: Events are kept in memory.
_MOST_BYTES = 1 << 20


def register(app: Flask, backend: Backend) -> None:
    """Add the route to *app*."""

    @app.post("/api/v1/telemetry")
    def telemetry() -> Response:
        body, raw = json_body()
        if len(raw) > _MOST_BYTES:
            raise HTTPError(413, f"the body is larger than {_MOST_BYTES} bytes; send fewer events")
        backend.telemetry.take(body)
        return answer({"status": "accepted"})
