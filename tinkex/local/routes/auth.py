"""Keys, and tokens in their place (docs/protocol.md, "Authentication")."""

from __future__ import annotations

from flask import Flask, Response

from tinkex.local.errors import HTTPError
from tinkex.local.http.messages import answer
from tinkex.local.http.tokens import TokenMint
from tinkex.local.settings import ServerSettings


def register(app: Flask, settings: ServerSettings, mint: TokenMint) -> None:
    """Add the routes to *app*; *mint* makes the tokens."""

    @app.post("/api/v1/auth/token")
    def exchange() -> Response:
        claims = {"sub": settings.owner_urn, "org_id": settings.org_id, "iss": "tinkex"}
        return answer({"jwt": mint.make(claims)})

    @app.get("/api/v1/auth/apikey/me")
    def about_the_key() -> Response:
        details = {"org_details": {"name": settings.org_id}, "user_details": {"email": ""}}
        note = (
            "set when the server was started" if settings.api_key else "this server asks for none"
        )
        return answer({"key_id": 0, "name": "local", "note": note, "details": details})

    @app.delete("/api/v1/auth/apikey/me")
    def revoke() -> Response:
        raise HTTPError(
            403, "this server's key is the one that it was started with; it stays valid"
        )
