"""Who may call: keys, and tokens in their place (docs/protocol.md, "Authentication")."""

from __future__ import annotations

import hmac
from typing import Optional

from flask import Flask, Response, request

from tinkex.local.http import answer, needs_no_key
from tinkex.local.problems import Problem
from tinkex.local.settings import ServerSettings
from tinkex.local.tokens import TokenMint


def register(app: Flask, settings: ServerSettings) -> None:
    """Add the routes to *app*, and have it refuse requests without a right key or token."""
    mint = TokenMint(settings.jwt_lifetime_s)
    _register_check(app, settings, mint)

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
        raise Problem(403, "this server's key is the one that it was started with; it stays valid")


def _register_check(app: Flask, settings: ServerSettings, mint: TokenMint) -> None:
    expected = None if settings.api_key is None else settings.api_key.encode()

    @app.before_request
    def check() -> Optional[Response]:
        if needs_no_key(request.path):
            return None
        given = request.headers.get("X-API-Key", "")
        if expected is not None and hmac.compare_digest(given.encode(), expected):
            return None
        if given.startswith("eyJ") and (settings.jwt or expected is not None):
            # Exchanged for another, a token would never have to prove itself again.
            fault = mint.fault_of(given)
            if fault is None and request.path.endswith("/auth/token"):
                fault = "a token cannot be exchanged; send the key"
            return None if fault is None else _refuse_token(fault)
        if expected is None:
            return None
        what = "is not the one of this server" if given else "is missing"
        return answer({"detail": f"the API key {what}; set TINKER_API_KEY, or api_key=..."}, 401)


def _refuse_token(fault: str) -> Response:
    refusal = answer({"detail": f"the token is not valid: {fault}"}, 401)
    refusal.headers["WWW-Authenticate"] = (
        f'Bearer error="invalid_token", error_description="{fault}"'
    )
    return refusal
