"""The server itself: health, flags, keys and tokens, telemetry (docs/protocol.md)."""

from __future__ import annotations

from typing import Sequence

from flask import Response

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.http.messages import json_body, json_response
from tinkex.local.http.signatures import TokenMint
from tinkex.local.routes.base import Routes, Rule
from tinkex.local.settings import ServerSettings
from tinkex.types import GetServerCapabilitiesResponse, SupportedModel

#: Telemetry is kept in memory.
_MAX_TELEMETRY_BYTES = 1 << 20


class ServiceRoutes(Routes):
    """Views about the server, not about anything in it.  *mint* makes the tokens."""

    def __init__(self, backend: Backend, settings: ServerSettings, mint: TokenMint) -> None:
        super().__init__(backend, settings)
        self._mint = mint

    def rules(self) -> Sequence[Rule]:
        """See Routes."""
        return [
            ("GET", "healthz", self.health),
            ("GET", "client/config", self.client_config),
            ("POST", "client/config", self.client_config),
            ("GET", "client/dynamic_config", self.dynamic_config),
            ("POST", "client/dynamic_config", self.dynamic_config),
            ("GET", "get_server_capabilities", self.capabilities),
            ("POST", "auth/token", self.exchange_key),
            ("GET", "auth/apikey/me", self.describe_key),
            ("DELETE", "auth/apikey/me", self.revoke_key),
            ("POST", "telemetry", self.keep_telemetry),
        ]

    def health(self) -> Response:
        """Respond as soon as the server runs."""
        return json_response({"status": "ok"})

    def client_config(self) -> Response:
        """Static flags."""
        return json_response(self._settings.client_config())

    def dynamic_config(self) -> Response:
        """Flags that clients ask for again and again."""
        return json_response(self._settings.client_dynamic_config())

    def capabilities(self) -> Response:
        """The one model.  Its aliases are understood, and not listed."""
        info = self._backend.info
        model = SupportedModel(
            info.model_name, info.context_length, trainable=True, sampleable=True
        )
        return json_response(GetServerCapabilitiesResponse([model]).to_wire())

    def exchange_key(self) -> Response:
        """Make a token of the key that was sent."""
        settings = self._settings
        claims = {"sub": settings.owner_urn, "org_id": settings.org_id, "iss": "tinkex"}
        return json_response({"jwt": self._mint.make(claims)})

    def describe_key(self) -> Response:
        """Whose key it is: there is one user."""
        has_key = bool(self._settings.api_key)
        org_id = self._settings.org_id
        return json_response(
            {
                "key_id": 0,
                "name": "local",
                "note": "set when the server was started" if has_key else "this server has no key",
                "details": {"org_details": {"name": org_id}, "user_details": {"email": ""}},
            }
        )

    def revoke_key(self) -> Response:
        """Reject it: the key was chosen when the server was started."""
        raise HTTPError(
            403, "this server's key is the one that it was started with; it stays valid"
        )

    def keep_telemetry(self) -> Response:
        """Keep events in memory."""
        body, raw = json_body()
        if len(raw) > _MAX_TELEMETRY_BYTES:
            raise HTTPError(
                413, f"the body is larger than {_MAX_TELEMETRY_BYTES} bytes; send fewer events"
            )
        self._backend.telemetry.add(body)
        return json_response({"status": "accepted"})
