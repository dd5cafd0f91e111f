"""Health, flags, sessions and capabilities (protocol reference, sections 1.5.1 and 5.3)."""

from __future__ import annotations

from flask import Flask, Response

from tinkex.local.backend import Backend
from tinkex.local.http import answer, json_body, need, optional, page
from tinkex.local.problems import Problem
from tinkex.types import (
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    SupportedModel,
)

_REASONS = ("success", "errored", "interrupted")


def register(app: Flask, backend: Backend, max_held_polls: int) -> None:
    """Add the routes to *app*."""

    @app.get("/api/v1/healthz")
    def healthz() -> Response:
        return answer({"status": "ok"})

    @app.route("/api/v1/client/config", methods=["GET", "POST"])
    def client_config() -> Response:
        # A client of ours or theirs must not hold more polls than there are threads for.
        return answer({"sample_max_concurrent_requests": max_held_polls})

    @app.route("/api/v1/client/dynamic_config", methods=["GET", "POST"])
    def dynamic_config() -> Response:
        return answer({"sample_cancel_enabled": False})

    @app.post("/api/v1/create_session")
    def create_session() -> Response:
        body, _ = json_body()
        facts = {
            name: body[name]
            for name in ("tags", "user_metadata", "sdk_version", "project_id", "display_name")
            if body.get(name) is not None
        }
        session_id = backend.create_session(facts)
        return answer({"session_id": session_id, "type": "create_session"})

    @app.post("/api/v1/session_heartbeat")
    def session_heartbeat() -> Response:
        body, _ = json_body()
        backend.heartbeat(need(body, "session_id", str))
        return answer({"type": "session_heartbeat"})

    @app.post("/api/v1/sessions/<session_id>/finish")
    def finish(session_id: str) -> Response:
        body, _ = json_body()
        reason = (optional(body, "reason", dict) or {}).get("type", "success")
        if reason not in _REASONS:
            raise Problem(400, f"reason {reason!r} is unknown; it must be one of {_REASONS}")
        detail = optional(body, "detail", str)
        backend.finish_session(session_id, f"{reason}, {detail}" if detail else reason)
        return answer({})

    @app.get("/api/v1/get_server_capabilities")
    def capabilities() -> Response:
        models = [
            SupportedModel(name, backend.info.context_length, trainable=True, sampleable=True)
            for name in backend.model_names()
        ]
        return answer(GetServerCapabilitiesResponse(models).to_wire())

    @app.get("/api/v1/sessions")
    def list_sessions() -> Response:
        rows = backend.store.sessions(*page(20))
        return answer(ListSessionsResponse([row.session_id for row in rows]).to_wire())

    @app.get("/api/v1/sessions/<session_id>")
    def get_session(session_id: str) -> Response:
        row = backend.store.session(session_id)
        if row is None:
            raise Problem(404, f"session {session_id} is unknown")
        found = GetSessionResponse(
            training_run_ids=backend.store.runs_of(session_id),
            sampler_ids=backend.store.samplers_of(session_id),
            user_metadata=row.facts.get("user_metadata"),
            display_name=row.facts.get("display_name"),
        )
        return answer(found.to_wire())
