"""The sink of telemetry (docs/protocol.md, "Telemetry")."""

from __future__ import annotations

from flask import Flask, Response

from tinkex.local.backend import Backend
from tinkex.local.http import answer, json_body


def register(app: Flask, backend: Backend) -> None:
    """Add the route to *app*."""

    @app.post("/api/v1/telemetry")
    def telemetry() -> Response:
        body, _ = json_body()
        backend.telemetry.take(body)
        return answer({"status": "accepted"})
