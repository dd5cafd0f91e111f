"""Health, and what clients are told to do (docs/protocol.md, "Server flags")."""

from __future__ import annotations

from flask import Flask, Response

from tinkex.local.http.messages import answer
from tinkex.local.settings import ServerSettings


def register(app: Flask, settings: ServerSettings) -> None:
    """Add the routes to *app*."""

    @app.get("/api/v1/healthz")
    def healthz() -> Response:
        return answer({"status": "ok"})

    @app.route("/api/v1/client/config", methods=["GET", "POST"])
    def client_config() -> Response:
        return answer(settings.client_config())

    @app.route("/api/v1/client/dynamic_config", methods=["GET", "POST"])
    def dynamic_config() -> Response:
        return answer(settings.client_dynamic_config())
