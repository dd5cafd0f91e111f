"""The server itself: health, flags, keys and tokens, telemetry, audit log (docs/protocol.md)."""

from __future__ import annotations

from datetime import date, datetime, time, timezone
from typing import Optional

from flask import request

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.http.messages import JsonBody
from tinkex.local.http.signatures import TokenMint
from tinkex.local.routes.base import Result, Routes, route
from tinkex.local.settings import ServerSettings
from tinkex.types import (
    AuditLogEntry,
    AuditLogResponse,
    GetServerCapabilitiesResponse,
    SupportedModel,
)

_EVENT_TYPES = ("all", "checkpoints", "projects", "teams", "organizations")
_DAY_S = 86400.0

#: Largest body with telemetry, which is kept in memory.
_MAX_TELEMETRY_BYTES = 1 << 20


class ServiceRoutes(Routes):
    """Views of the server itself.  *mint* makes the tokens."""

    def __init__(self, backend: Backend, settings: ServerSettings, mint: TokenMint) -> None:
        super().__init__(backend, settings)
        self._mint = mint

    @route("GET", "healthz")
    def health(self) -> Result:
        """Respond as soon as the server runs."""
        return {"status": "ok"}

    @route("GET", "client/config")
    @route("POST", "client/config")
    def client_config(self) -> Result:
        """Return the static flags."""
        return self._settings.client_config()

    @route("GET", "client/dynamic_config")
    @route("POST", "client/dynamic_config")
    def dynamic_config(self) -> Result:
        """Return the flags that clients ask for repeatedly."""
        return self._settings.client_dynamic_config()

    @route("GET", "get_server_capabilities")
    def capabilities(self) -> Result:
        """List the one model; its aliases are accepted, but not listed."""
        info = self._backend.info
        model = SupportedModel(
            info.model_name, info.context_length, trainable=True, sampleable=True
        )
        return GetServerCapabilitiesResponse([model])

    @route("POST", "auth/token")
    def exchange_key(self) -> Result:
        """Return a token in exchange for the key that was sent."""
        settings = self._settings
        # Clients learn from these claims who they are: no endpoint says so (docs/protocol.md,
        # "Token exchange").
        claims = {"sub": settings.owner_urn, "org_id": settings.org_id, "iss": "tinkex"}
        return {"jwt": self._mint.make(claims)}

    @route("GET", "auth/apikey/me")
    def describe_key(self) -> Result:
        """Describe the key of the one user."""
        has_key = bool(self._settings.api_key)
        org_id = self._settings.org_id
        return {
            "key_id": 0,
            "name": "local",
            "note": "set when the server was started" if has_key else "this server has no key",
            "details": {"org_details": {"name": org_id}, "user_details": {"email": ""}},
        }

    @route("DELETE", "auth/apikey/me")
    def revoke_key(self) -> Result:
        """Refuse: the key was chosen when the server was started."""
        raise HTTPError(
            403, "this server's key is the one that it was started with; it stays valid"
        )

    @route("POST", "telemetry")
    def keep_telemetry(self, body: JsonBody) -> Result:
        """Keep events in memory."""
        if len(body.raw) > _MAX_TELEMETRY_BYTES:
            raise HTTPError(
                413, f"the body is larger than {_MAX_TELEMETRY_BYTES} bytes; send fewer events"
            )
        self._backend.telemetry.add(body)
        return {"status": "accepted"}

    @route("GET", "audit")
    def audit_log(self) -> Result:
        """List the audit entries of one day in UTC, oldest first; by default today's."""
        event_type = request.args.get("event_type", "all")
        if event_type not in _EVENT_TYPES:
            raise HTTPError(
                400,
                f"event_type is {event_type!r:.100}; it must be one of {', '.join(_EVENT_TYPES)}",
            )
        start = self._start_of_day(request.args.get("day"))
        chosen = None if event_type == "all" else event_type
        entries = [
            AuditLogEntry(
                timestamp=datetime.fromtimestamp(row.at, timezone.utc),
                event=row.event,
                event_details=row.details,
                model_id=row.run_id,
                tinker_path=row.tinker_path,
            )
            for row in self._backend.store.audit_log(start, start + _DAY_S, chosen)
        ]
        return AuditLogResponse(entries)

    def _start_of_day(self, day: Optional[str]) -> float:
        """Return when *day* (``YYYY-MM-DD``) begins; HTTPError 400 if it is not a date."""
        if not day:
            # Days of UTC begin at multiples of 86400 seconds since the epoch.
            return self._backend.wall() // _DAY_S * _DAY_S
        try:
            # Not strptime, which imports a module; requests must not import (local/server.py).
            midnight = datetime.combine(date.fromisoformat(day), time(), timezone.utc)
        except ValueError as error:
            raise HTTPError(400, f"day is {day!r:.100}; it must be YYYY-MM-DD") from error
        return midnight.timestamp()
