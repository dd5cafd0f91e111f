"""The outcome of each HTTP status, for submissions, polls and direct requests.

Each column of the tables shows the behaviour of a real server (docs/servers.md).  Retries are quick
because the scripted server asks for a pause of a millisecond.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, NamedTuple, Optional, Type

import pytest
from api.endpoint import KEY
from support.scripted_server import Answer, ScriptedServer
from support.tinker_routes import API, TinkerRoutes

import tinkex
from tinkex import errors, types
from tinkex.retry import RetryConfig

pytestmark = pytest.mark.usefixtures("short_backoff")

SOON = {"retry-after-ms": "1"}
DETAIL = {"detail": "because"}
FASTAPI = {"detail": [{"type": "missing", "loc": ["body", "seq_id"], "msg": "Field required"}]}
ACCEPTED = {"request_id": "r-1"}


class Case(NamedTuple):
    """An answer other than plain success, and what the caller gets for it."""

    status: int
    error: Type[errors.TinkexError]
    body: Any = DETAIL
    says: str = "because"  # in the message
    hint: str = ""  # in the hint
    attempts: int = 1  # if every attempt gets this answer
    category: Optional[str] = None


#: For submissions and direct requests alike.
REFUSALS = (
    Case(400, errors.BadRequestError),
    Case(401, errors.AuthenticationError, hint="TINKER_API_KEY"),
    Case(402, errors.BillingError, hint="billing"),
    Case(403, errors.PermissionDeniedError, hint="key"),
    Case(404, errors.NotFoundError),
    Case(405, errors.APIStatusError),
    Case(409, errors.ConflictError),
    Case(410, errors.APIStatusError),
    Case(413, errors.APIStatusError, b"<html>too large</html>", "too large"),
    Case(415, errors.APIStatusError),
    Case(418, errors.APIStatusError),
    Case(422, errors.UnprocessableEntityError, FASTAPI, "seq_id"),
    Case(500, errors.InternalServerError, b"Internal Server Error", "Internal", attempts=4),
    Case(501, errors.InternalServerError),
)
#: Answers that are retried until the time limit.
PASSING = (
    Case(408, errors.APIStatusError),
    Case(429, errors.RateLimitError),
    Case(502, errors.InternalServerError),
    Case(503, errors.InternalServerError, b"busy", "busy"),
    Case(504, errors.InternalServerError),
    Case(529, errors.InternalServerError),
)

POLLS = (
    Case(400, errors.RequestFailedError, category="user"),
    Case(401, errors.AuthenticationError, hint="TINKER_API_KEY"),
    Case(402, errors.BillingError, hint="billing"),
    Case(403, errors.PermissionDeniedError),
    Case(404, errors.NotFoundError),
    Case(405, errors.APIStatusError),
    Case(409, errors.RequestFailedError, category="user"),
    Case(410, errors.ResultExpiredError, says="no longer", hint="before you submit"),
    Case(415, errors.APIStatusError),
    Case(422, errors.RequestFailedError, FASTAPI, "seq_id", category="user"),
    Case(500, errors.InternalServerError, b"Internal Server Error", "Internal", attempts=5),
    Case(501, errors.InternalServerError),
    Case(200, errors.RequestFailedError, {"error": "because", "category": "user"},
         category="user"),
    Case(200, errors.RequestFailedError, {"error": "because", "category": "Server"},
         category="server"),
    Case(200, errors.RequestFailedError, {"error": "because"}, category="unknown"),
    Case(200, errors.RequestFailedError, {"error": "because", "category": 7},
         category="unknown"),
    Case(200, errors.ResponseDecodeError, b"no json", "JSON", attempts=3),
)  # fmt: skip
PENDING = (
    Answer(408, {"detail": "still running"}),
    Answer(408, {"queue_state": "paused_capacity", "queue_state_reason": "full"}),
    Answer(408, b""),
    Answer(408, b"<html>gateway</html>", content_type="text/html"),
    Answer(200, {"type": "try_again", "request_id": "r-1", "queue_state": "active"}),
    Answer(200, {"type": "try_again", "queue_state": "new_state", "queue_state_reason": None}),
    Answer(200, {"status": "complete_metadata", "response_payload_size": 5}),
    Answer(429, DETAIL, SOON),
    Answer(500, DETAIL, SOON),
    Answer(502, b"", SOON),
    Answer(503, DETAIL, SOON),
)


class Place(NamedTuple):
    """A call of the public client, and the route whose answer is scripted."""

    name: str
    route: str
    call: Any

    def __str__(self) -> str:
        return self.name


def optim_step(service: Any) -> Any:
    trainer = service.create_lora_training_client("b", rank=8)
    return lambda: trainer.optim_step(types.AdamParams()).result()


def forward_backward(service: Any) -> Any:
    trainer = service.create_lora_training_client("b", rank=8)
    datum = types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [2]})
    return lambda: trainer.forward_backward([datum], "cross_entropy").result()


def sample(service: Any) -> Any:
    quick = RetryConfig(retry_delay_base=0.001, retry_delay_max=0.001)
    sampler = service.create_sampling_client(base_model="b", retry_config=quick)
    return lambda: sampler.sample(types.ModelInput.from_ints([1])).result()


PLACES = (
    Place("optim_step", f"POST {API}optim_step", optim_step),
    Place("forward_backward", f"POST {API}forward_backward", forward_backward),
    Place("sample", f"POST {API}asample", sample),
    Place("create", f"POST {API}create_model",
          lambda service: lambda: service.create_lora_training_client("b", rank=8)),
    Place("facts", f"GET {API}sessions/s",
          lambda service: lambda: service.create_rest_client().get_session("s").result()),
    Place("a change", f"DELETE {API}training_runs/r/checkpoints/weights/a",
          lambda service: lambda: service.create_rest_client().delete_checkpoint(
              "r", "weights/a").result()),
)  # fmt: skip


@contextlib.contextmanager
def ready(server: ScriptedServer, place: Place, **settings: Any) -> Iterator[Any]:
    """Yield the call of *place*, with everything it needs in place."""
    TinkerRoutes(server)
    server.on(f"GET {API}sessions/s", Answer(body={"training_run_ids": [], "sampler_ids": []}))
    server.on(f"DELETE {API}training_runs/r/checkpoints/weights/a", Answer(204, b""))
    defaults = {"base_url": server.url, "api_key": KEY, "wire": "protobuf"}
    with tinkex.ServiceClient(**{**defaults, **settings}) as service:
        yield place.call(service)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        yield scripted


def by_status(case: Case) -> str:
    return f"{case.status}{'' if case.category is None else ' ' + case.category}"


def check(error: errors.TinkexError, case: Case) -> None:
    assert type(error) is case.error
    assert case.says in error.message
    assert case.hint in (error.hint or "")
    assert KEY not in str(error)
    if case.status != 200:
        assert error.status == case.status
    if case.category is not None:
        assert error.category == case.category


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("case", REFUSALS, ids=by_status)
def test_a_refusal_is_a_response(server: ScriptedServer, place: Place, case: Case) -> None:
    with ready(server, place) as call:
        before = len(server.requests(place.route))
        server.on(place.route, Answer(case.status, case.body, SOON))
        with pytest.raises(errors.TinkexError) as failure:
            call()
        made = server.requests(place.route)[before:]
    if place.name in ("facts", "a change") and case.status in (405, 501):
        case = case._replace(error=errors.RouteMissingError, says="does not have")
    check(failure.value, case)
    assert len(made) == case.attempts
    assert failure.value.retryable is (case.status >= 500 and case.error not in ROUTES)
    assert len({request.body for request in made}) == 1
    assert len({request.headers.get("x-idempotency-key") for request in made}) == 1


ROUTES = (errors.RouteMissingError,)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("case", PASSING, ids=by_status)
def test_temporary_trouble_is_hidden_from_the_caller(
    server: ScriptedServer, place: Place, case: Case
) -> None:
    with ready(server, place) as call:
        good = {
            "facts": Answer(body={"training_run_ids": [], "sampler_ids": []}),
            "a change": Answer(204, b""),
        }.get(place.name, Answer(202, ACCEPTED))
        results = {
            "optim_step": {"metrics": {}},
            "forward_backward": {"loss_fn_outputs": [{}], "metrics": {}},
            "sample": {"sequences": [{"stop_reason": "length", "tokens": [5]}]},
            "create": {"model_id": "m"},
        }
        server.on(f"POST {API}retrieve_future", Answer(body=results.get(place.name, {})))
        trouble = Answer(case.status, case.body, SOON)
        before = len(server.requests(place.route))
        server.on(place.route, trouble, trouble, good)
        call()
        made = server.requests(place.route)[before:]
    assert len(made) == 3
    assert len({request.body for request in made}) == 1  # the same work with the same number
    assert len({request.headers.get("x-idempotency-key") for request in made}) == 1


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("case", PASSING, ids=by_status)
def test_persistent_trouble_is_reported_after_the_time_limit(
    server: ScriptedServer, place: Place, case: Case
) -> None:
    with ready(server, place, max_outage_s=20.0) as call:
        later = Answer(case.status, case.body, {"Retry-After": "30"})  # later than the time limit
        server.on(place.route, Answer(case.status, case.body, SOON), later)
        with pytest.raises(errors.TinkexError) as failure:
            call()
    check(failure.value, case)
    assert failure.value.attempts == 2
    assert failure.value.elapsed_s is not None


@pytest.mark.parametrize("status", [200, 201, 202, 207])
@pytest.mark.parametrize("place", PLACES[:4], ids=str)
def test_any_2xx_accepts_work(server: ScriptedServer, place: Place, status: int) -> None:
    with ready(server, place) as call:
        results = {
            "optim_step": {},
            "forward_backward": {"loss_fn_outputs": [{}], "metrics": {}},
            "sample": {"sequences": [{"stop_reason": "length", "tokens": [5]}]},
            "create": {"model_id": "m"},
        }
        server.on(f"POST {API}retrieve_future", Answer(status, results[place.name]))
        server.on(place.route, Answer(status, ACCEPTED))
        call()


@pytest.mark.parametrize("place", PLACES[:3], ids=str)
@pytest.mark.parametrize("case", POLLS, ids=by_status)
def test_a_poll_that_ends_in_an_error(server: ScriptedServer, place: Place, case: Case) -> None:
    with ready(server, place) as call:
        before = len(server.requests(f"POST {API}retrieve_future"))
        server.on(place.route, Answer(body=ACCEPTED))
        server.on(f"POST {API}retrieve_future", Answer(case.status, case.body, SOON))
        with pytest.raises(errors.TinkexError) as failure:
            call()
        made = server.requests(f"POST {API}retrieve_future")[before:]
    if case.status == 410 and place.name == "sample":
        case = case._replace(attempts=6)  # a sample with a lost result is drawn again 5 times
    check(failure.value, case)
    assert len(made) == case.attempts
    if case.error is not errors.ResponseDecodeError:
        assert failure.value.request_id == "r-1"


@pytest.mark.parametrize("pending", PENDING, ids=lambda one: f"{one.status} {one.body}"[:40])
def test_a_poll_that_must_be_repeated(server: ScriptedServer, pending: Answer) -> None:
    with ready(server, PLACES[0]) as call:
        server.on(PLACES[0].route, Answer(body=ACCEPTED))
        before = len(server.requests(f"POST {API}retrieve_future"))
        server.on(f"POST {API}retrieve_future", pending, Answer(body={"metrics": {"a:sum": 1.0}}))
        assert call().metrics == {"a:sum": 1.0}
        made = server.requests(f"POST {API}retrieve_future")[before:]
    assert len(made) == 2
    announced = isinstance(pending.body, dict) and "response_payload_size" in pending.body
    expected = [{"request_id": "r-1"}, {"request_id": "r-1"}]
    if announced:
        expected[1]["allow_metadata_only"] = False  # type: ignore[assignment]  # a JSON object
    assert [request.json() for request in made] == expected


def test_x_should_retry_decides_before_the_status(server: ScriptedServer) -> None:
    again, never = {**SOON, "x-should-retry": "true"}, {**SOON, "x-should-retry": "false"}
    place = PLACES[4]
    with ready(server, place) as call:
        good = Answer(body={"training_run_ids": [], "sampler_ids": []})
        server.on(place.route, Answer(400, DETAIL, again), good)
        call()
        server.on(place.route, Answer(503, DETAIL, never), good)
        with pytest.raises(errors.InternalServerError) as failure:
            call()
        assert failure.value.attempts == 1


@pytest.mark.parametrize("hint", ["0.001", "Sun, 22 Nov 1998 19:00:00 GMT", "soon", "-1", "1e400"])
def test_any_form_of_retry_after_is_accepted(server: ScriptedServer, hint: str) -> None:
    """Seconds, or a date; invalid values are ignored."""
    place = PLACES[4]
    with ready(server, place) as call:
        good = Answer(body={"training_run_ids": [], "sampler_ids": []})
        server.on(place.route, Answer(429, DETAIL, {"retry-after": hint}), good)
        call()
    assert len(server.requests(place.route)) == 2
