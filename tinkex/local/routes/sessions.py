"""Sessions and capabilities (docs/protocol.md, "Sessions")."""

from __future__ import annotations

from typing import Any, Dict, Type

from flask import Flask, Response

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.fields import check_kept, need, optional
from tinkex.local.http.messages import answer, check_scope, idempotency_key, json_body, page
from tinkex.local.routes.session_search import Search, instant, project_of, status_of
from tinkex.local.settings import ServerSettings
from tinkex.local.state.rows import SessionRow
from tinkex.types import (
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    SupportedModel,
)

#: So much is kept of why a client ended a session.
_DETAIL_CHARACTERS = 2000

_REASONS = ("success", "errored", "interrupted")

#: What a client says about a session, and of what type it is.
_FACTS: Dict[str, Type[Any]] = {
    "tags": list,
    "user_metadata": dict,
    "sdk_version": str,
    "project_id": str,
    "display_name": str,
}


def register(app: Flask, backend: Backend, settings: ServerSettings) -> None:
    """Add the routes to *app*."""

    @app.post("/api/v1/create_session")
    def create_session() -> Response:
        body, _ = json_body()
        given = {name: optional(body, name, kind) for name, kind in _FACTS.items()}
        facts = {name: value for name, value in given.items() if value is not None}
        check_kept("what is said about the session", facts)
        session_id = backend.create_session(facts, idempotency_key())
        messages = {
            name: getattr(settings, name)
            for name in ("info_message", "warning_message", "error_message")
            if getattr(settings, name)
        }
        return answer({"session_id": session_id, "type": "create_session", **messages})

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
            raise HTTPError(400, f"reason {reason!r:.100} is unknown; it must be one of {_REASONS}")
        detail = body.get("detail")
        if not isinstance(detail, (str, type(None))):
            raise HTTPError(400, f"field 'detail' must be of type str, not {detail!r:.100}")
        # Cut, not refused: a client that ends has no use for an error.
        backend.finish_session(session_id, reason, detail and detail[:_DETAIL_CHARACTERS])
        return answer({})

    @app.get("/api/v1/get_server_capabilities")
    def capabilities() -> Response:
        info = backend.info  # one model, one name: its aliases are understood, and not listed
        model = SupportedModel(
            info.model_name, info.context_length, trainable=True, sampleable=True
        )
        return answer(GetServerCapabilitiesResponse([model]).to_wire())

    _register_lists(app, backend, settings)


def _register_lists(app: Flask, backend: Backend, settings: ServerSettings) -> None:
    @app.get("/api/v1/sessions")
    def list_sessions() -> Response:
        check_scope()
        rows = backend.store.sessions(*page(20))
        return answer(ListSessionsResponse([row.session_id for row in rows]).to_wire())

    @app.get("/api/v1/sessions/<session_id>")
    def get_session(session_id: str) -> Response:
        check_scope()
        row = _need_session(backend, session_id)
        found = GetSessionResponse(
            training_run_ids=backend.store.runs_of(session_id),
            sampler_ids=backend.store.samplers_of(session_id),
            user_metadata=row.facts.get("user_metadata"),
            display_name=row.facts.get("display_name"),
        )
        return answer(found.to_wire())

    @app.put("/api/v1/sessions/<session_id>/project")
    def assign_project(session_id: str) -> Response:
        body, _ = json_body()
        project_id = need(body, "project_id", str)
        if not project_id:
            raise HTTPError(400, "project_id is empty; name a project")
        _need_session(backend, session_id)
        backend.store.set_project(session_id, project_id)
        return answer({})

    @app.post("/api/v1/sessions/search")
    def search_sessions() -> Response:
        body, _ = json_body()
        search = Search.read(body)
        rows, cursor = search.page(backend.store.all_sessions(), settings.owner_urn)
        summaries = [_summary(backend, row, settings.owner_urn) for row in rows]
        return answer({"sessions": summaries, "next_cursor": cursor})


def _need_session(backend: Backend, session_id: str) -> SessionRow:
    row = backend.store.session(session_id)
    if row is None:
        raise HTTPError(404, f"session {session_id} is unknown")
    return row


def _summary(backend: Backend, row: SessionRow, owner_urn: str) -> Dict[str, Any]:
    count, size = backend.store.checkpoint_totals(row.session_id)
    return {
        "session_id": row.session_id,
        "created_at": instant(row.created_at),
        "owner": owner_urn,
        "project_id": project_of(row),
        "status": status_of(row),
        "checkpoints_count": count,
        "checkpoint_storage_bytes": size,
        "display_name": row.facts.get("display_name"),
        "user_metadata": row.facts.get("user_metadata"),
    }
