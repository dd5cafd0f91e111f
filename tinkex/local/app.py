"""The embedded server's WSGI application: routes, authentication, errors as JSON.

Made by LocalServer, or by a test that drives it with Flask's test client.  No threads of its own.
"""

from __future__ import annotations

import logging
from typing import Optional

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.http.admission import Admission, head_of
from tinkex.local.http.messages import MAX_BODY, answer
from tinkex.local.openai import routes as openai
from tinkex.local.routes import (
    auth,
    checkpoints,
    downloads,
    flags,
    futures,
    losses,
    passes,
    rest,
    runs,
    sampling,
    saves,
    sessions,
    telemetry,
)
from tinkex.local.settings import ServerSettings

_log = logging.getLogger(__name__)


def create_app(
    backend: Backend,
    settings: Optional[ServerSettings] = None,
    admission: Optional[Admission] = None,
) -> Flask:
    """Make the application.

    Args:
        backend: does the work; started and closed by the caller.
        settings: how it behaves; the defaults if None.
        admission: which requests are let in; by default, as *settings* say.
    """
    settings = settings or ServerSettings()
    admission = admission or Admission(settings)
    app = Flask(__name__, static_folder=None)
    app.config[MAX_BODY] = settings.max_body_bytes
    _register_admission(app, admission)
    auth.register(app, settings, admission.mint)
    flags.register(app, settings)
    sessions.register(app, backend, settings)
    runs.register(app, backend)
    passes.register(app, backend)
    losses.register(app, backend, settings)
    saves.register(app, backend)
    sampling.register(app, backend)
    holds = futures.Holds(settings.max_held_polls)
    futures.register(app, backend, settings, holds)
    rest.register(app, backend)
    checkpoints.register(app, backend)
    downloads.register(app, backend, settings)
    telemetry.register(app, backend)
    openai.register(app, backend, holds)
    _register_errors(app)
    return app


def _register_admission(app: Flask, admission: Admission) -> None:
    @app.before_request
    def check() -> None:
        admission.check(head_of(request.environ))


def _register_errors(app: Flask) -> None:
    @app.errorhandler(HTTPError)
    def problem(error: HTTPError) -> Response:
        response = answer({"detail": error.detail}, error.status)
        response.headers.extend(error.headers)
        if error.retry_after_s is not None:
            response.headers["Retry-After"] = f"{error.retry_after_s:g}"
        return response

    @app.errorhandler(HTTPException)
    def no_such_route(error: HTTPException) -> Response:
        response = answer(
            {"detail": f"{request.method} {request.path}: {error.description}"}, error.code or 500
        )
        if error.code == 405 and error.get_headers():
            response.headers.extend(
                (name, value) for name, value in error.get_headers() if name == "Allow"
            )
        return response

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        _log.exception("%s %s failed", request.method, request.path)
        return answer({"detail": f"the server failed: {type(error).__name__}: {error}"}, 500)
