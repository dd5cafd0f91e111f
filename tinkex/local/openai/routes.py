"""The HTTP routes: ``models``, ``completions``, ``chat/completions``."""

from __future__ import annotations

import logging
from typing import Any, Callable, Dict, Iterator, List, Optional

from flask import Blueprint, Flask, Response, request
from werkzeug.exceptions import HTTPException

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.http.admission import OPENAI_PREFIXES
from tinkex.local.http.messages import error_response, json_body, json_response, server_failure
from tinkex.local.http.threads import HeldPolls
from tinkex.local.json_text import write_json
from tinkex.local.openai.bodies import Writer, usage_of
from tinkex.local.openai.choices import Delta
from tinkex.local.openai.errors import OpenAIError, error_body
from tinkex.local.openai.generation import Generation
from tinkex.local.openai.parameters import Call, read_chat, read_completions
from tinkex.local.openai.samplers import Samplers
from tinkex.local.openai.text import Text, text_of
from tinkex.local.settings import ServerSettings
from tinkex.local.state.rows import CheckpointRow

_log = logging.getLogger(__name__)

#: After this long without a token, a stream gets a comment, and a request without a stream checks
#: whether its client is gone.
_PAUSE_S = 2.0

_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")

#: Most checkpoints in the list of models.
_MOST_LISTED = 1000


def register(app: Flask, backend: Backend, settings: ServerSettings) -> None:
    """Add the routes to *app*."""
    endpoint = _Endpoint(backend, settings)
    for prefix in OPENAI_PREFIXES:
        prefix = prefix.rstrip("/")
        name = "openai" + prefix.replace("/", "_")
        app.register_blueprint(endpoint.blueprint(name), url_prefix=prefix)


class _Endpoint:
    """The views.  Thread-safe."""

    def __init__(self, backend: Backend, settings: ServerSettings) -> None:
        self._backend = backend
        # Each request occupies an HTTP thread, as a held poll does.
        self._held = HeldPolls(settings.max_held_polls)
        self._samplers = Samplers(backend)
        self._started_at = int(backend.wall())
        self._kept_text: Optional[Text] = None  # made with the first request

    def blueprint(self, name: str) -> Blueprint:
        """Return the routes; the blueprint handles all requests and errors below its prefix."""
        routes = Blueprint(name, __name__)
        routes.get("/models")(self.models)
        # Slashes are not merged, because names hold "tinker://".
        routes.get("/models/<path:model>", merge_slashes=False)(self.model)
        routes.post("/completions")(self.completions)
        routes.post("/chat/completions")(self.chat_completions)
        # Unknown paths, too, since a blueprint handles errors of its own routes only.
        routes.route("/<path:path>", methods=_METHODS)(self.no_such_route)
        routes.errorhandler(HTTPError)(_problem)
        routes.errorhandler(HTTPException)(_http_error)
        routes.errorhandler(Exception)(_unexpected)
        return routes

    def models(self) -> Response:
        """List the base model and the checkpoints for sampling, newest first."""
        rows, _ = self._backend.store.checkpoints.page(_MOST_LISTED, 0)
        listed = [self._listed(self._backend.info.model_name, None)]
        for row in rows:
            if row.kind == "sampler_weights":
                listed.append(self._listed(row.tinker_path, row))
        return json_response({"object": "list", "data": listed})

    def model(self, model: str) -> Response:
        """Show one model."""
        return json_response(self._listed(model, self._samplers.checkpoint(model)))

    def _listed(self, model: str, checkpoint: Optional[CheckpointRow]) -> Dict[str, Any]:
        created = self._started_at if checkpoint is None else int(checkpoint.created_at)
        return {"id": model, "object": "model", "created": created, "owned_by": "tinkex"}

    def completions(self) -> Response:
        """Continue prompts."""
        return self._respond(read_completions)

    def chat_completions(self) -> Response:
        """Reply to a conversation."""
        return self._respond(read_chat)

    def no_such_route(self, path: str) -> Response:
        """Refuse routes that OpenAI has and this server does not."""
        raise OpenAIError(f"{request.method} {request.path} is not offered", status=404)

    def _text(self) -> Text:
        if self._kept_text is None:  # two threads may both make it, which is harmless
            self._kept_text = text_of(self._backend.engine)
        return self._kept_text

    def _respond(self, read: Callable[..., Call]) -> Response:
        body = json_body()
        most = self._backend.settings.limits.max_num_samples
        call = read(body, self._text(), self._backend.info, most)
        # Released where the response ends: for a stream, long after this function has returned.
        self._held.acquire()
        try:
            generation = Generation(self._samplers, self._text(), call)
        except BaseException:
            self._held.release()
            raise
        writer = Writer(call, self._text())
        if not call.stream:
            try:
                return json_response(_whole(generation, writer, len(call.prompts) * call.n))
            finally:
                generation.close()
                self._held.release()
        response = Response(_events(generation, writer, call), mimetype="text/event-stream")
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"  # else nginx would buffer the tokens

        # Called when the response was sent, or when the client is gone.
        @response.call_on_close
        def done() -> None:
            generation.close()
            self._held.release()

        return response


def _never() -> bool:
    return False


def _whole(generation: Generation, writer: Writer, choices: int) -> Dict[str, Any]:
    # Nothing else would stop the engine when the client hangs up.  The key is waitress's own.
    is_gone = request.environ.get("waitress.client_disconnected", _never)
    deltas: List[List[Delta]] = [[] for _ in range(choices)]
    for part in generation.parts(_PAUSE_S):
        if is_gone():
            raise HTTPError(499, "the client closed the connection")
        if part is not None and part.delta:
            deltas[part.choice].append(part.delta)
    return writer.response(deltas, usage_of(generation.prompt_tokens, generation.completion_tokens))


def _events(generation: Generation, writer: Writer, call: Call) -> Iterator[bytes]:
    """Yield the events of a stream, in the form in which they are sent."""
    if call.chat:
        for index in range(call.n):
            yield _event(writer.first_chunk(index))
    try:
        for part in generation.parts(_PAUSE_S):
            if part is None:
                yield b": waiting\n\n"
            elif part.delta:
                yield _event(writer.chunk(part.choice, part.delta))
    # The status has been sent: an error is an event of the stream, as OpenAI's clients expect.
    except HTTPError as problem:
        yield _event(error_body(problem))
        return
    except Exception as error:
        _log.exception("a stream of %s failed", call.model)
        yield _event(error_body(server_failure(error)))
        return
    if call.include_usage:
        usage = usage_of(generation.prompt_tokens, generation.completion_tokens)
        yield _event(writer.usage_chunk(usage))
    yield b"data: [DONE]\n\n"


def _event(value: Dict[str, Any]) -> bytes:
    return b"data: " + write_json(value) + b"\n\n"


def _problem(problem: HTTPError) -> Response:
    return error_response(problem, error_body(problem))


def _http_error(error: HTTPException) -> Response:
    detail = f"{request.method} {request.path}: {error.description}"
    return _problem(HTTPError(error.code or 500, detail))


def _unexpected(error: Exception) -> Response:
    _log.exception("%s %s failed", request.method, request.path)
    return _problem(server_failure(error))
