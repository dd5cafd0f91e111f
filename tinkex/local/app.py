"""The embedded server's WSGI application: routes, admission, errors as JSON.

Created by LocalServer, or by a test that drives it with Flask's test client.  Starts no threads.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Callable, Optional, Tuple

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Rule

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.http.admission import Admission, head_of
from tinkex.local.http.messages import MAX_BODY, error_response, json_response, server_failure
from tinkex.local.openai import routes as openai
from tinkex.local.page.routes import PageRoutes
from tinkex.local.routes.checkpoints import CheckpointRoutes
from tinkex.local.routes.downloads import DownloadRoutes
from tinkex.local.routes.futures import FutureRoutes
from tinkex.local.routes.runs import RunRoutes
from tinkex.local.routes.sampling import SamplingRoutes
from tinkex.local.routes.saves import SaveRoutes
from tinkex.local.routes.service import ServiceRoutes
from tinkex.local.routes.sessions import SessionRoutes
from tinkex.local.routes.training import TrainingRoutes
from tinkex.local.settings import ServerSettings

_log = logging.getLogger(__name__)

_TOPICS = (
    SessionRoutes,
    RunRoutes,
    TrainingRoutes,
    SaveRoutes,
    SamplingRoutes,
    FutureRoutes,
    CheckpointRoutes,
    DownloadRoutes,
    PageRoutes,
)


class _MatchedRule(Rule):
    """A rule that maps paths to views, and cannot build URLs.

    Compiling the functions that build URLs would take most of the start-up time of a server.
    """

    def _compile_builder(self, append_unknown: bool = True) -> Callable[..., Tuple[str, str]]:
        return _no_url


def _no_url(*args: Any, **values: Any) -> Tuple[str, str]:
    raise NotImplementedError("the server builds no URLs of its routes")


class _Application(Flask):
    url_rule_class = _MatchedRule


def create_app(
    backend: Backend,
    settings: Optional[ServerSettings] = None,
    admission: Optional[Admission] = None,
) -> Flask:
    """Make the application.

    Args:
        backend: does the work; started and closed by the caller.
        settings: the server's settings; the defaults if None.
        admission: decides which requests are let in; made from *settings* if None.
    """
    settings = settings or ServerSettings()
    admission = admission or Admission(settings)
    app = _Application(__name__, static_folder=None)
    app.config[MAX_BODY] = settings.max_body_bytes
    app.before_request(functools.partial(_admit, admission))
    topics = [topic(backend, settings) for topic in _TOPICS]
    for topic in (ServiceRoutes(backend, settings, admission.mint), *topics):
        # The endpoint's name contains the method, since a path may have a view for each method.
        for method, path, view in topic.rules():
            rule = path if path.startswith("/") else f"/api/v1/{path}"
            app.add_url_rule(rule, f"{method} {rule}", view, methods=[method])
    openai.register(app, backend, settings)
    app.register_error_handler(HTTPError, _rejected)
    app.register_error_handler(HTTPException, _not_routed)
    app.register_error_handler(Exception, _failed)
    return app


def _admit(admission: Admission) -> None:
    # The parser has checked the headers, too, but only to decide whether to keep the body
    # (http/serving.py).  This check turns a refusal into a response.
    admission.check(head_of(request.environ))
    try:
        request.query_string.decode()
    except UnicodeDecodeError as error:  # else a view that reads the query would fail
        raise HTTPError(400, "the query is not UTF-8; percent-encode it") from error


def _rejected(error: HTTPError) -> Response:
    return error_response(error, {"detail": error.detail})


def _not_routed(error: HTTPException) -> Response:
    route = f"{request.method} {request.path}"
    # Clients recognize a missing route by this text; any other 404 names a missing object.
    detail = f"no route {route}" if error.code == 404 else f"{route}: {error.description}"
    response = json_response({"detail": detail}, error.code or 500)
    # HTTP requires `Allow` with a 405.
    if error.code == 405:
        response.headers.extend((name, v) for name, v in error.get_headers() if name == "Allow")
    return response


def _failed(error: Exception) -> Response:
    _log.exception("%s %s failed", request.method, request.path)
    return _rejected(server_failure(error))
