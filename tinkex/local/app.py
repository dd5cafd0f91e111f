"""The embedded server's WSGI application: routes, authentication, errors as JSON.

Made by LocalServer, or by a test that drives it with Flask's test client.  No threads of its own.
"""

from __future__ import annotations

import hmac
import logging
from typing import Optional

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from tinkex.local.backend import Backend
from tinkex.local.http import answer
from tinkex.local.problems import Problem
from tinkex.local.routes import futures, rest, sampling, sessions, training

_log = logging.getLogger(__name__)


def create_app(
    backend: Backend,
    *,
    api_key: Optional[str] = None,
    max_held_polls: int = 1000,
    hold_s: float = 30.0,
) -> Flask:
    """Make the application.

    Args:
        backend: does the work; started and closed by the caller.
        api_key: what ``X-API-Key`` must carry; None lets everybody in.
        max_held_polls: so many polls are held at once, each in an HTTP thread; more get 429.
        hold_s: a poll for pending work is answered ``try_again`` after this long.
    """
    app = Flask(__name__, static_folder=None)
    if api_key is not None:
        _require_key(app, api_key)
    sessions.register(app, backend, max_held_polls)
    training.register(app, backend)
    sampling.register(app, backend)
    futures.register(app, backend, max_held_polls, hold_s)
    rest.register(app, backend)
    _register_errors(app)
    return app


def _require_key(app: Flask, api_key: str) -> None:
    expected = api_key.encode()

    @app.before_request
    def check_key() -> Optional[Response]:
        if request.path == "/api/v1/healthz":
            return None
        given = request.headers.get("X-API-Key", "").encode()
        if hmac.compare_digest(given, expected):
            return None
        what = "is not the one of this server" if given else "is missing"
        return answer({"detail": f"the API key {what}; set TINKER_API_KEY, or api_key=..."}, 401)


def _register_errors(app: Flask) -> None:
    @app.errorhandler(Problem)
    def problem(error: Problem) -> Response:
        response = answer({"detail": error.detail}, error.status)
        if error.retry_after_s is not None:
            response.headers["Retry-After"] = f"{error.retry_after_s:g}"
        return response

    @app.errorhandler(HTTPException)
    def no_such_route(error: HTTPException) -> Response:
        detail = f"{request.method} {request.path}: {error.description}"
        return answer({"detail": detail}, error.code or 500)

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        _log.exception("%s %s failed", request.method, request.path)
        return answer({"detail": f"the server failed: {type(error).__name__}: {error}"}, 500)
