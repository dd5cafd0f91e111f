"""Routes: the base class of each topic's views, and how they queue work."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, Dict, Iterator, Optional, Tuple, TypeVar, Union

from flask import Response

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.fields import required, required_seq_id
from tinkex.local.http.messages import JsonBody, json_body, json_response
from tinkex.local.scheduling.lanes import Job, Work
from tinkex.local.settings import ServerSettings
from tinkex.local.state.rows import CheckpointRow
from tinkex.types._wire import Wire
from tinkex.types.checkpoint_path import KINDS

V = TypeVar("V", bound=Callable[..., Any])

#: HTTP method, path (below ``/api/v1/``, unless it is absolute), and the view that responds.
Rule = Tuple[str, str, Callable[..., Response]]

#: What a view returns; anything but a Response is sent as JSON.
Result = Union[Response, Wire, Dict[str, Any]]

#: Checks the body of a submission and returns the work to do on the engine thread.
Prepare = Callable[[str, JsonBody], Work]


def route(method: str, path: str) -> Callable[[V], V]:
    """Make a view of a topic respond to *method* at *path*; one view may have several routes.

    The view gets the parameters of the path, and the JSON object of the request if it has a
    parameter *body*.
    """

    def mark(view: V) -> V:
        view.__dict__.setdefault("rules", []).append((method, path))
        return view

    return mark


class Routes:
    """The views of one topic.  A view runs in an HTTP thread, within one request."""

    def __init__(self, backend: Backend, settings: ServerSettings) -> None:
        self._backend = backend
        self._settings = settings

    def rules(self) -> Iterator[Rule]:
        """Yield the rules of all views."""
        for view in vars(type(self)).values():
            for method, path in getattr(view, "rules", ()):
                takes_body = "body" in inspect.signature(view).parameters
                yield method, path, functools.partial(self._respond, view, takes_body)

    def _respond(self, view: Callable[..., Result], takes_body: bool, **found: Any) -> Response:
        if takes_body:
            found["body"] = json_body()
        result = view(self, **found)
        if isinstance(result, Response):
            return result
        return json_response(result.to_wire() if isinstance(result, Wire) else result)

    def _checkpoint(self, run_id: str, kind: str, name: str) -> CheckpointRow:
        """Return a checkpoint; HTTPError 400 or 404 says what is wrong with its address."""
        if kind not in KINDS:
            raise HTTPError(
                400,
                f"{kind}/{name} is not a checkpoint id; it must begin with one of {list(KINDS)}",
            )
        return self._backend.catalog.checkpoint(run_id, kind, name)

    def _submit(self, body: JsonBody, prepare: Prepare, digest: Optional[bytes] = None) -> Result:
        """Queue the work for a training run, at the ``seq_id`` of its body."""
        model_id, seq_id = required(body, "model_id", str), required_seq_id(body)
        work = functools.partial(prepare, model_id, body)
        # Some routes pass a digest that leaves out the fields that may differ in a retry.
        return self._submit_at(model_id, seq_id, digest or body.digest, work)

    def _submit_at(
        self, model_id: str, seq_id: int, digest: bytes, prepare: Callable[[], Work]
    ) -> Result:
        """Queue what *prepare* returns at *seq_id*, unless the same body was submitted before."""
        self._backend.check_model(model_id)
        if seq_id < 1:
            raise HTTPError(400, f"seq_id is {seq_id}; the requests of a run are numbered from 1")
        scheduler = self._backend.scheduler
        # A repetition is not checked again: a checkpoint that it names may be gone by now.
        request_id = scheduler.find(model_id, seq_id, digest)
        if request_id is None:
            try:
                work = prepare()
            except HTTPError:
                # A rejected request consumes its seq_id, too (docs/protocol.md, "Sequence numbers",
                # rule 2): later requests would wait for it forever.
                scheduler.submit(model_id, seq_id, digest, None)
                raise
            request_id = scheduler.submit(
                model_id, seq_id, digest, Job(f"{model_id}:{seq_id}", work)
            )
        return {"request_id": request_id, "model_id": model_id}
