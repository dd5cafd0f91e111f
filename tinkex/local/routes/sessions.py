"""Sessions: create, keep alive, end, list and search (docs/protocol.md, "Sessions")."""

from __future__ import annotations

from typing import Any, Dict, Type

from tinkex.local.errors import HTTPError
from tinkex.local.fields import check_kept, optional, required
from tinkex.local.http.messages import JsonBody, check_scope, idempotency_key, page
from tinkex.local.routes.base import Result, Routes, route
from tinkex.local.routes.session_search import REASONS, Search, project_of, status_of
from tinkex.local.state.rows import SessionRow, timestamp
from tinkex.types import GetSessionResponse, ListSessionsResponse

#: Most characters that are kept of a client's detail on why it ended a session.
_DETAIL_CHARACTERS = 2000

#: The facts that a client may declare about a session, and their types.
_FACTS: Dict[str, Type[Any]] = {
    "tags": list,
    "user_metadata": dict,
    "sdk_version": str,
    "project_id": str,
    "display_name": str,
}


class SessionRoutes(Routes):
    """Views of sessions."""

    @route("POST", "create_session")
    def create(self, body: JsonBody) -> Result:
        """Start a session."""
        given = {name: optional(body, name, kind) for name, kind in _FACTS.items()}
        facts = {name: value for name, value in given.items() if value is not None}
        check_kept("the description of the session", facts)
        # The request has no sequence number: a repetition has the same key (docs/protocol.md,
        # "Idempotency keys").
        session_id = self._backend.create_session(facts, idempotency_key())
        messages = {
            name: getattr(self._settings, name)
            for name in ("info_message", "warning_message", "error_message")
            if getattr(self._settings, name)
        }
        return {"session_id": session_id, "type": "create_session", **messages}

    @route("POST", "session_heartbeat")
    def heartbeat(self, body: JsonBody) -> Result:
        """Keep a session alive."""
        self._backend.heartbeat(required(body, "session_id", str))
        return {"type": "session_heartbeat"}

    @route("POST", "sessions/<session_id>/finish")
    def finish(self, body: JsonBody, session_id: str) -> Result:
        """End a session."""
        reason = (optional(body, "reason", dict) or {}).get("type", "success")
        if reason not in REASONS:
            raise HTTPError(400, f"reason {reason!r:.100} is unknown; it must be one of {REASONS}")
        detail = body.get("detail")
        if not isinstance(detail, (str, type(None))):
            raise HTTPError(400, f"field 'detail' must be of type str, not {detail!r:.100}")
        # Cut, not rejected: a client that ends has no use for an error.
        self._backend.finish_session(session_id, reason, detail and detail[:_DETAIL_CHARACTERS])
        return {}

    @route("GET", "sessions")
    def list_ids(self) -> Result:
        """List ids of sessions, newest first."""
        check_scope()
        rows = self._backend.store.sessions(*page(20))
        return ListSessionsResponse([row.session_id for row in rows])

    @route("GET", "sessions/<session_id>")
    def describe(self, session_id: str) -> Result:
        """Describe a session and list what is in it."""
        check_scope()
        row, store = self._row(session_id), self._backend.store
        return GetSessionResponse(
            training_run_ids=store.runs_of(session_id),
            sampler_ids=store.samplers_of(session_id),
            user_metadata=row.facts.get("user_metadata"),
            display_name=row.facts.get("display_name"),
        )

    @route("PUT", "sessions/<session_id>/project")
    def assign_project(self, body: JsonBody, session_id: str) -> Result:
        """Move a session to another project."""
        project_id = required(body, "project_id", str)
        if not project_id:
            raise HTTPError(400, "project_id is empty; name a project")
        self._row(session_id)
        self._backend.store.set_project(session_id, project_id)
        return {}

    @route("POST", "sessions/search")
    def search(self, body: JsonBody) -> Result:
        """List a page of the sessions that match, newest first."""
        search = Search.read(body)
        rows, cursor = search.page(self._backend.store.all_sessions(), self._settings.owner_urn)
        summaries = [self._summary(row) for row in rows]
        return {"sessions": summaries, "next_cursor": cursor}

    def _row(self, session_id: str) -> SessionRow:
        row = self._backend.store.session(session_id)
        if row is None:
            raise HTTPError(404, f"session {session_id} is unknown")
        return row

    def _summary(self, row: SessionRow) -> Dict[str, Any]:
        count, size = self._backend.store.checkpoints.totals(row.session_id)
        return {
            "session_id": row.session_id,
            "created_at": timestamp(row.created_at),
            "owner": self._settings.owner_urn,
            "project_id": project_of(row),
            "status": status_of(row),
            "checkpoints_count": count,
            "checkpoint_storage_bytes": size,
            "display_name": row.facts.get("display_name"),
            "user_metadata": row.facts.get("user_metadata"),
        }
