"""The WSGI layer that makes the application behave like one particular server.

It sits between HTTP and the application: it refuses the requests that the server would refuse,
rewrites the others for the application, and has `answers` rewrite the application's answers.  Made
by `assemble`; runs in HTTP threads.
"""

from __future__ import annotations

import re
from typing import Callable, Iterable, List, Optional, Tuple

import orjson
from servers.profiles import bodies, ids, results
from servers.profiles.answers import Answers
from servers.profiles.call import PASSES, Call, Environ, Refusal, StartResponse
from servers.profiles.numbers import lane_of
from servers.profiles.profile import Profile
from servers.profiles.routes import RouteTable
from servers.profiles.table import settings_of
from servers.profiles.vocabulary import lenient
from werkzeug.wrappers import Response

from tinkex.local.app import create_app
from tinkex.local.backend import Backend
from tinkex.local.engines.engine import Engine
from tinkex.local.errors import HTTPError
from tinkex.local.http.admission import Admission, head_of
from tinkex.local.json_text import check_levels
from tinkex.local.settings import ServerSettings
from tinkex.local.state.store import Store
from tinkex.wire.codec import JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE

_SAVES = ("save_weights", "save_weights_for_sampler")

#: Field of a route that holds a checkpoint's path -> the checkpoint's possible kinds, likeliest
#: first.
_PATHS = {
    "load_weights": ("path", ("weights", "sampler_weights")),
    "weights_info": ("tinker_path", ("weights", "sampler_weights")),
    "create_sampling_session": ("model_path", ("sampler_weights", "weights")),
    "asample": ("model_path", ("sampler_weights", "weights")),
}

_SHORT_ARCHIVE = re.compile(r"^(/api/v1/training_runs/[^/]+/checkpoints)/([^/]+)/archive$")


class ProfileLayer:
    """Makes the application *inner* of *backend* behave as *profile* describes.  Thread-safe."""

    def __init__(
        self,
        inner: Callable[[Environ, StartResponse], Iterable[bytes]],
        backend: Backend,
        profile: Profile,
        *,
        has_key: bool,
        admission: Admission,
    ) -> None:
        self._inner = inner
        self._backend = backend
        self._profile = profile
        self._has_key = has_key  # the application checks it, then
        self._admission = admission
        self._max_body_bytes = backend.settings.max_body_bytes
        self._routes = RouteTable(profile.routes, profile.lacks)
        self._answers = Answers(backend, profile)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request (WSGI)."""
        admitted = self._admission.admits(head_of(environ))  # the application refuses the others
        try:
            call = Call(environ, max_body_bytes=self._max_body_bytes, with_body=admitted)
            if call.route is None:  # a signed URL, or not part of the protocol
                return self._inner(environ, start_response)
            if admitted:
                self._refuse(call)
                self._rewrite(call)
            response = self._answers.rewrite(call, Response.from_app(self._inner, call.environ))
        except Refusal as refusal:
            response = refusal.response
        return response(environ, start_response)

    # Before the application

    def _refuse(self, call: Call) -> None:
        """Raise Refusal if this server would not accept the request."""
        profile, route = self._profile, str(call.route)
        self._check_key(call)
        missing = self._routes.refusal(call.method, route)
        if missing is not None:
            raise Refusal(missing, "Not Found" if missing == 404 else "Method Not Allowed")
        if call.method != "POST":
            return
        if route in PASSES:
            encoding = "protobuf" if call.in_protobuf else "json"
            if encoding not in profile.reads:
                # A server that expects JSON crashes on protobuf, with a 500 in plain text.
                detail = None if profile.unreadable == 500 else f"send {profile.reads[0]}"
                raise Refusal(profile.unreadable, detail)
        self._read_json(call)
        into_new = route == "load_weights" and call.body.get("model_id") is None
        if into_new and profile.load_into_new == 400:
            raise Refusal(400, "Missing model_id")
        if route == "load_weights" and profile.load_first_only and call.body.get("seq_id") != 1:
            raise Refusal(400, "load_weights must be the first request of a model (seq_id 1)")

    def _check_key(self, call: Call) -> None:
        environ = call.environ
        if self._profile.key == "bearer" and "HTTP_X_API_KEY" not in environ:
            scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
            if scheme.lower() == "bearer":
                environ["HTTP_X_API_KEY"] = token.strip()
        keyless = self._profile.key == "none" or self._has_key or call.route == "healthz"
        if not keyless and not environ.get("HTTP_X_API_KEY"):
            raise Refusal(401, "Missing API key")

    def _read_json(self, call: Call) -> None:
        """Parse the body, if it is JSON, into ``call.body``; 422 in FastAPI's words if broken."""
        if call.in_protobuf:
            call.body = {}
            return
        found: List[bodies.Fault] = []
        try:
            call.body = orjson.loads(call.raw) if call.raw else {}
        except orjson.JSONDecodeError as error:
            call.body, found = {}, [bodies.not_json(error.pos, error.msg)]
        if not found:
            found = bodies.faults(
                str(call.route),
                call.body,
                refuse_extras=self._profile.refuses_extras,
                new_runs=self._profile.load_into_new != 422,
            )
        try:
            check_levels(call.raw)
        except HTTPError as problem:
            raise Refusal(problem.status, problem.detail) from problem
        if found and self._profile.checks_bodies:
            raise Refusal(422, found)
        if not isinstance(call.body, dict):
            call.body = {}

    # Requests rewritten

    def _rewrite(self, call: Call) -> None:
        """Turn the request into one that the application accepts."""
        profile, route, environ = self._profile, call.route, call.environ
        if profile.plain_ids:
            path = environ["PATH_INFO"].encode("latin-1")
            environ["PATH_INFO"] = ids.inward(path).decode("latin-1")
            call.raw = ids.inward(call.raw)
        if profile.sampler_paths == "two":
            # The checkpoint id that remains of a path with two segments.
            environ["PATH_INFO"] = _SHORT_ARCHIVE.sub(
                r"\1/sampler_weights/\2/archive", environ["PATH_INFO"]
            )
        if call.method != "POST":
            return
        call.replace(call.raw)
        if not call.in_protobuf:
            call.body = orjson.loads(call.raw) if call.body else {}
        if route in _PATHS and isinstance(call.body.get(_PATHS[route][0]), str):
            field, kinds = _PATHS[route]
            call.change(**{field: self._checkpoint_path(call.body[field], kinds)})
        named_save = route in _SAVES and call.body.get("path") is not None
        if named_save and profile.overwrites is not None:
            call.change(overwrite=profile.overwrites)
        if route == "retrieve_future" and profile.results != "accept":
            call.environ["HTTP_ACCEPT"] = (
                PROTOBUF_CONTENT_TYPE if profile.results == "protobuf" else JSON_CONTENT_TYPE
            )
        if route == "retrieve_future" and profile.routes is not None:
            call.change(allow_metadata_only=False)  # none of these servers reports sizes first
        by_path = call.body.get("model_path") is not None
        if route == "create_sampling_session" and by_path and not profile.sampler_by_path:
            raise Refusal(500)

    def _checkpoint_path(self, path: str, kinds: Tuple[str, ...]) -> str:
        candidates = results.path_inward(self._profile, path, kinds)
        for candidate in candidates:
            try:
                self._backend.catalog.checkpoint_at(candidate)
            except HTTPError:
                continue
            return candidate
        return candidates[0]


def admission_of(profile: Profile, settings: ServerSettings) -> Admission:
    """Return which requests a server with *profile* admits."""
    return Admission(settings_of(profile, settings), bearer=profile.key == "bearer")


def assemble(
    profile: Profile,
    engine: Engine,
    store: Store,
    settings: ServerSettings,
    admission: Optional[Admission] = None,
) -> Tuple[Backend, ProfileLayer]:
    """Make the backend and the application of an embedded server that behaves as *profile* says."""
    if profile.strange_tokens != "refused":
        engine = lenient(engine, tell_nan=profile.strange_tokens == "nan")
    admission = admission or admission_of(profile, settings)
    settings = settings_of(profile, settings)
    backend = Backend(engine, store, settings, lane_type=lane_of(profile))
    app = create_app(backend, settings, admission)
    has_key = settings.api_key is not None
    return backend, ProfileLayer(app, backend, profile, has_key=has_key, admission=admission)
