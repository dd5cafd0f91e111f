"""RestClient end to end: runs, checkpoints and sessions of the embedded server."""

from __future__ import annotations

import dataclasses
import functools
import gc
import re
import threading
import weakref
from datetime import timezone
from typing import Any, Callable, Dict, Iterator, Tuple

import pytest
from support.scripted_server import PATIENCE_S, Answer, ScriptedServer
from support.threads import wait_until

from tinkex import RestClient, ServiceClient, TrainingClient, types
from tinkex._api import _call
from tinkex.clients import rest as rest_client
from tinkex.errors import (
    APIConnectionError,
    ClientClosedError,
    ConflictError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    RequestFailedError,
    RouteMissingError,
)
from tinkex.local import LocalServer
from tinkex.retry import RetryPolicy


@pytest.fixture
def rest(service: ServiceClient) -> RestClient:
    return service.create_rest_client()


@pytest.fixture
def alone(server: ScriptedServer) -> Iterator[RestClient]:
    """A RestClient of the scripted server, without a session."""
    with RestClient(base_url=server.url) as client:
        yield client


@pytest.fixture
def saved(trainer: TrainingClient) -> str:
    """The path of a checkpoint."""
    return trainer.save_state("first", user_metadata={"step": "1"}).result(PATIENCE_S).path


def test_capabilities(service: ServiceClient, rest: RestClient) -> None:
    offered = rest.get_server_capabilities().result(PATIENCE_S)
    assert [m.model_name for m in offered.supported_models] == ["deterministic"]
    assert offered.supported_models[0].max_context_length == 64
    assert service.get_server_capabilities() == offered


def test_runs(service: ServiceClient, rest: RestClient, trainer: TrainingClient) -> None:
    second = service.create_lora_training_client("deterministic", rank=16, user_metadata={"k": "v"})
    page = rest.list_training_runs(limit=1).result(PATIENCE_S)
    assert page.cursor == types.Cursor(offset=0, limit=1, total_count=2)
    both = rest.list_training_runs().result(PATIENCE_S).training_runs
    assert {r.training_run_id for r in both} == {trainer.model_id, second.model_id}
    rest_of_them = rest.list_training_runs(limit=5, offset=1).result(PATIENCE_S).training_runs
    assert rest_of_them == both[1:]
    run = rest.get_training_run(second.model_id).result(PATIENCE_S)
    assert (run.base_model, run.is_lora, run.lora_rank) == ("deterministic", True, 16)
    assert run.user_metadata == {"k": "v"}
    assert run.last_request_time.tzinfo is not None


def test_a_checkpoint_from_creation_to_deletion(
    rest: RestClient, trainer: TrainingClient, saved: str
) -> None:
    assert saved == f"tinker://{trainer.model_id}/weights/first"
    info = rest.get_weights_info_by_tinker_path(saved).result(PATIENCE_S)
    assert (info.base_model, info.is_lora, info.lora_rank) == ("deterministic", True, 4)
    (checkpoint,) = rest.list_checkpoints(trainer.model_id).result(PATIENCE_S).checkpoints
    assert (checkpoint.checkpoint_id, checkpoint.checkpoint_type) == ("weights/first", "training")
    assert checkpoint.tinker_path == saved
    assert checkpoint.user_metadata == {"step": "1"}
    assert checkpoint.time.astimezone(timezone.utc) == checkpoint.time
    assert not checkpoint.public
    assert checkpoint.expires_at is None
    run = rest.get_training_run_by_tinker_path(saved).result(PATIENCE_S)
    assert run.last_checkpoint == checkpoint

    rest.publish_checkpoint_from_tinker_path(saved).result(PATIENCE_S)
    with pytest.raises(ConflictError):
        rest.publish_checkpoint_from_tinker_path(saved).result(PATIENCE_S)
    assert rest.list_user_checkpoints().result(PATIENCE_S).checkpoints[0].public
    rest.unpublish_checkpoint_from_tinker_path(saved).result(PATIENCE_S)
    with pytest.raises(ConflictError):
        rest.unpublish_checkpoint_from_tinker_path(saved).result(PATIENCE_S)

    rest.set_checkpoint_ttl_from_tinker_path(saved, 3600).result(PATIENCE_S)
    assert rest.list_user_checkpoints().result(PATIENCE_S).checkpoints[0].expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(saved, None).result(PATIENCE_S)
    assert rest.list_user_checkpoints().result(PATIENCE_S).checkpoints[0].expires_at is None

    rest.delete_checkpoint_from_tinker_path(saved).result(PATIENCE_S)
    with pytest.raises(NotFoundError, match="first"):
        rest.delete_checkpoint(trainer.model_id, "weights/first").result(PATIENCE_S)
    assert rest.list_user_checkpoints().result(PATIENCE_S).checkpoints == []


def test_pages_of_checkpoints(rest: RestClient, trainer: TrainingClient) -> None:
    for name in "abc":
        trainer.save_state(name).result(PATIENCE_S)
    page = rest.list_user_checkpoints(limit=2, offset=1).result(PATIENCE_S)
    assert [c.checkpoint_id for c in page.checkpoints] == ["weights/b", "weights/a"]


def test_sessions(service: ServiceClient, rest: RestClient, trainer: TrainingClient) -> None:
    sampler = service.create_sampling_client(base_model="deterministic")
    assert service.session_id in rest.list_sessions().result(PATIENCE_S).sessions
    session = rest.get_session(service.session_id).result(PATIENCE_S)
    assert session.training_run_ids == [trainer.model_id]
    assert session.sampler_ids == [sampler.sampling_session_id]
    info = rest.get_sampler(sampler.sampling_session_id).result(PATIENCE_S)
    assert info.base_model == "deterministic"


PATH = "tinker://nobody/weights/x"
AT = "training_runs/nobody/checkpoints/weights/x"
UNKNOWN = {
    "run": lambda r: r.get_training_run("nobody"),
    "run of a path": lambda r: r.get_training_run_by_tinker_path(PATH),
    "checkpoints": lambda r: r.list_checkpoints("nobody"),
    "weights": lambda r: r.get_weights_info_by_tinker_path(PATH),
    "delete": lambda r: r.delete_checkpoint_from_tinker_path(PATH),
    "publish": lambda r: r.publish_checkpoint_from_tinker_path(PATH),
    "ttl": lambda r: r.set_checkpoint_ttl_from_tinker_path(PATH, 3600),
    "session": lambda r: r.get_session("nobody"),
    "sampler": lambda r: r.get_sampler("nobody"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_objects_that_do_not_exist_are_not_found(rest: RestClient, what: str) -> None:
    with pytest.raises(NotFoundError):
        UNKNOWN[what](rest).result(PATIENCE_S)


@pytest.mark.parametrize(
    "path", ["", "/tmp/x", "tinker://", "tinker://run", "tinker://r/weights/", "tinker:///x", 7]
)
def test_a_wrong_path_is_refused_immediately(rest: RestClient, path: Any) -> None:
    for call in (
        rest.delete_checkpoint_from_tinker_path,
        rest.publish_checkpoint_from_tinker_path,
        rest.unpublish_checkpoint_from_tinker_path,
        rest.get_training_run_by_tinker_path,
        lambda p: rest.set_checkpoint_ttl_from_tinker_path(p, 5),
    ):
        with pytest.raises(InvalidInputError, match="tinker://"):
            call(path)


@pytest.mark.parametrize(("limit", "offset"), [(0, 0), (-1, 0), (5, -1), ("5", 0), (5, None)])
def test_limit_and_offset_are_checked(rest: RestClient, limit: Any, offset: Any) -> None:
    for call in (rest.list_training_runs, rest.list_user_checkpoints, rest.list_sessions):
        with pytest.raises(InvalidInputError, match="limit"):
            call(limit=limit, offset=offset)


@pytest.mark.parametrize("ttl", [0, -5, 1.5, "1h"])
def test_a_ttl_is_checked_immediately(rest: RestClient, ttl: Any) -> None:
    with pytest.raises(InvalidInputError, match="ttl_seconds"):
        rest.set_checkpoint_ttl_from_tinker_path(PATH, ttl)


def test_a_closed_client_raises_an_error_that_names_it(rest: RestClient) -> None:
    rest.close()
    with pytest.raises(ClientClosedError, match="RestClient"):
        rest.list_sessions()


# Requests that are sent again

GONE = {"detail": "training run nobody has no checkpoint weights/x"}
TAKEN = {"detail": f"{PATH} is public already"}
REPEATED: Dict[str, Tuple[Callable[[RestClient], Any], str, Answer]] = {
    "delete": (
        lambda r: r.delete_checkpoint_from_tinker_path(PATH),
        f"DELETE /api/v1/{AT}",
        Answer(404, GONE),
    ),
    "publish": (
        lambda r: r.publish_checkpoint_from_tinker_path(PATH),
        f"POST /api/v1/{AT}/publish",
        Answer(409, TAKEN),
    ),
    "unpublish": (
        lambda r: r.unpublish_checkpoint_from_tinker_path(PATH),
        f"DELETE /api/v1/{AT}/publish",
        Answer(409, TAKEN),
    ),
}
LOST = {
    "cut": Answer(200, {}, cut_after=1),
    "dropped": Answer(drop=True),
    "lost by a gateway": Answer(502, b"<html>Bad Gateway</html>", content_type="text/html"),
}


@pytest.fixture
def quick(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RestClient]:
    """A client of the scripted server that retries immediately."""
    monkeypatch.setattr(_call, "RetryPolicy", functools.partial(RetryPolicy, base_s=0.002))
    with RestClient(base_url=server.url) as client:
        yield client


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("what", REPEATED)
def test_a_change_whose_response_was_lost_counts_as_done(
    quick: RestClient, server: ScriptedServer, what: str, lost: str
) -> None:
    change, route, second = REPEATED[what]
    server.on(route, LOST[lost], second)
    assert change(quick).result(PATIENCE_S) is None
    keys = [r.headers["x-idempotency-key"] for r in server.requests(route)]
    assert len(keys) == 2
    assert keys[0] == keys[1]


@pytest.mark.parametrize("what", REPEATED)
def test_a_change_whose_first_attempt_was_refused_does_not_count_as_done(
    quick: RestClient, server: ScriptedServer, what: str
) -> None:
    change, route, second = REPEATED[what]
    server.on(route, second)
    with pytest.raises((NotFoundError, ConflictError)):
        change(quick).result(PATIENCE_S)
    server.on(route, Answer(429, headers={"Retry-After": "0.001"}), second)
    with pytest.raises((NotFoundError, ConflictError)):
        change(quick).result(PATIENCE_S)


@pytest.mark.parametrize("what", REPEATED)
def test_a_missing_route_does_not_count_as_done(
    quick: RestClient, server: ScriptedServer, what: str
) -> None:
    change, route, _ = REPEATED[what]
    server.on(route, LOST["dropped"], Answer(404, {"detail": "Not Found"}))
    with pytest.raises(RouteMissingError):
        change(quick).result(PATIENCE_S)


def test_publishing_a_missing_checkpoint_fails_although_the_first_response_was_lost(
    quick: RestClient, server: ScriptedServer
) -> None:
    change, route, _ = REPEATED["publish"]
    server.on(route, LOST["dropped"], Answer(404, GONE))
    with pytest.raises(NotFoundError, match="no checkpoint"):
        change(quick).result(PATIENCE_S)


# Clients on their own


def test_a_client_on_its_own_opens_no_session(server: ScriptedServer) -> None:
    server.on("GET /api/v1/sessions", Answer(body={"sessions": ["s"]}))
    with RestClient(base_url=server.url) as alone:
        assert alone.list_sessions().result(PATIENCE_S).sessions == ["s"]
        assert alone.result() is alone
    assert {r.path.partition("?")[0] for r in server.requests()} <= {
        "/api/v1/sessions",
        "/api/v1/client/config",
    }
    with pytest.raises(ClientClosedError):
        alone.list_sessions()
    server.wait_until_idle()


def test_a_client_on_its_own_works_like_that_of_a_session(
    local: LocalServer, trainer: TrainingClient, saved: str
) -> None:
    with RestClient(base_url=local.url) as alone:
        assert alone.config.base_url == local.url
        run = alone.get_training_run_by_tinker_path(saved).result(PATIENCE_S)
        assert run.training_run_id == trainer.model_id
        assert alone.get_telemetry() is None


def test_closing_a_client_settles_its_requests_in_flight(server: ScriptedServer) -> None:
    server.on("GET /api/v1/sessions", Answer(hold=threading.Event()))
    alone = RestClient(base_url=server.url)
    future = alone.list_sessions()
    server.wait_for("GET /api/v1/sessions")
    alone.close()
    with pytest.raises(ClientClosedError):
        future.result(PATIENCE_S)
    alone.close()


def test_a_forgotten_client_leaves_no_thread(server: ScriptedServer) -> None:
    server.on("GET /api/v1/sessions", Answer(body={"sessions": []}))
    alone: Any = RestClient(base_url=server.url)
    alone.list_sessions().result(PATIENCE_S)
    threads = [t for t in threading.enumerate() if t.name.startswith("tinkex-rest")]
    assert threads
    del alone
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(t.is_alive() for t in threads)


def test_a_dropped_client_is_freed_without_the_garbage_collector() -> None:
    alone: Any = RestClient(base_url="http://a.test")
    runtime = weakref.ref(alone._runtime)
    gc.disable()
    try:
        del alone
        assert runtime() is None
    finally:
        gc.enable()


def test_callbacks_of_a_future_are_called_after_its_client_was_dropped(
    server: ScriptedServer,
) -> None:
    server.on("GET /api/v1/sessions", Answer(body={"sessions": []}))
    alone: Any = RestClient(base_url=server.url)
    runtime = weakref.ref(alone._runtime)
    first, gone, second = threading.Event(), threading.Event(), threading.Event()
    future = alone.list_sessions()

    def wait(_: Any) -> None:
        first.set()
        assert gone.wait(PATIENCE_S)

    future.add_done_callback(wait)
    future.add_done_callback(lambda _: second.set())
    del alone
    assert first.wait(PATIENCE_S)
    wait_until(lambda: runtime() is None, "the client to be collected")
    gone.set()
    assert second.wait(PATIENCE_S)


def test_an_absent_server_is_reported_soon() -> None:
    with ScriptedServer() as gone:
        url = gone.url
    with RestClient(base_url=url, startup_timeout_s=0.2) as alone:
        with pytest.raises(APIConnectionError, match="refused") as caught:
            alone.list_sessions().result(PATIENCE_S)
    assert caught.value.elapsed_s is not None
    assert caught.value.elapsed_s < 5


def test_a_server_that_has_responded_before_is_retried_for_longer(server: ScriptedServer) -> None:
    server.on("GET /api/v1/sessions", Answer(body={"sessions": []}))
    with RestClient(base_url=server.url, startup_timeout_s=0.2) as alone:
        assert alone.transport.config.max_outage_s == 0.2
        alone.list_sessions().result(PATIENCE_S)
        assert alone.transport.config.max_outage_s == 300


def test_runtime_config_and_settings_exclude_each_other(
    service: ServiceClient, rest: RestClient
) -> None:
    with pytest.raises(InvalidInputError):
        RestClient(rest._runtime, base_url="http://localhost:1")
    with pytest.raises(InvalidInputError):
        RestClient(config=service.config, base_url="http://localhost:1")


def test_a_client_raises_an_error_in_the_child_of_a_fork(server: ScriptedServer) -> None:
    with RestClient(base_url=server.url) as alone:
        alone._runtime._pid += 1  # as in a forked child
        with pytest.raises(ClientClosedError, match="fork"):
            alone.list_sessions()
        alone._runtime._pid -= 1


# Routes that a server may lack

_CP = "training_runs/{id}/checkpoints/{checkpoint}"
LACKING: Dict[str, Tuple[Callable[[RestClient], Any], str, str]] = {
    "runs": (lambda r: r.list_training_runs(), "GET training_runs", "training_runs"),
    "run": (lambda r: r.get_training_run("r"), "GET training_runs/{id}", "training_runs/r"),
    "checkpoints": (lambda r: r.list_user_checkpoints(), "GET checkpoints", "checkpoints"),
    "of a run": (
        lambda r: r.list_checkpoints("r"),
        "GET training_runs/{id}/checkpoints",
        "training_runs/r/checkpoints",
    ),
    "info": (
        lambda r: r.get_weights_info_by_tinker_path(PATH),
        "POST weights_info",
        "weights_info",
    ),
    "delete": (lambda r: r.delete_checkpoint_from_tinker_path(PATH), f"DELETE {_CP}", AT),
    "publish": (
        lambda r: r.publish_checkpoint_from_tinker_path(PATH),
        f"POST {_CP}/publish",
        f"{AT}/publish",
    ),
    "unpublish": (
        lambda r: r.unpublish_checkpoint_from_tinker_path(PATH),
        f"DELETE {_CP}/publish",
        f"{AT}/publish",
    ),
    "ttl": (
        lambda r: r.set_checkpoint_ttl_from_tinker_path(PATH, 3600),
        f"PUT {_CP}/ttl",
        f"{AT}/ttl",
    ),
    "archive": (
        lambda r: r.get_checkpoint_archive_url_from_tinker_path(PATH),
        f"GET {_CP}/archive",
        f"{AT}/archive",
    ),
    "urls": (
        lambda r: r.get_external_weights_urls("tinker://nobody/external_weights/x"),
        f"GET {_CP}/external_weights_urls",
        "training_runs/nobody/checkpoints/external_weights/x/external_weights_urls",
    ),
    "copy": (lambda r: r.copy_weights(PATH, "p"), "POST copy_weights", "copy_weights"),
    "sessions": (lambda r: r.list_sessions(), "GET sessions", "sessions"),
    "session": (lambda r: r.get_session("s"), "GET sessions/{id}", "sessions/s"),
    "project": (
        lambda r: r.assign_session_project("s", "p"),
        "PUT sessions/{id}/project",
        "sessions/s/project",
    ),
    "trace": (
        lambda r: r.export_session_trace("s"),
        "GET sessions/{id}/trace_export",
        "sessions/s/trace_export",
    ),
    "search": (
        lambda r: r.search_sessions(types.SessionSearchRequest()),
        "POST sessions/search",
        "sessions/search",
    ),
}
# The next three look like a gateway's answers, and are believed only after some attempts.
SOON = {"Retry-After": "0.001"}
ABSENT = {
    "FastAPI": Answer(404, {"detail": "Not Found"}),
    "Flask": Answer(404, b"<!doctype html><h1>Not Found</h1>", SOON, content_type="text/html"),
    "Go": Answer(404, b"404 page not found", SOON, content_type="text/plain"),
    "empty": Answer(404, b"", SOON),
    "another method": Answer(405, {"detail": "Method Not Allowed"}),
    "not implemented": Answer(501, {"detail": "maybe one day"}),
}


def method_and(route: str, concrete: str) -> str:
    return f"{route.partition(' ')[0]} /api/v1/{concrete}"


@pytest.mark.parametrize("framework", ABSENT)
@pytest.mark.parametrize("what", LACKING)
def test_the_error_names_the_route_that_a_server_lacks(
    server: ScriptedServer, alone: RestClient, what: str, framework: str
) -> None:
    call, route, concrete = LACKING[what]
    server.on(method_and(route, concrete), ABSENT[framework])
    with pytest.raises(RouteMissingError, match=re.escape(f"does not have {route} ")) as caught:
        call(alone).result(PATIENCE_S)
    assert caught.value.status == ABSENT[framework].status
    assert "Many servers" in str(caught.value)


#: Requests that name no object: a 404 is about the route, whatever its text.
NAME_NOTHING = {"runs", "checkpoints", "sessions", "search"}


@pytest.mark.parametrize("what", sorted(set(LACKING) - NAME_NOTHING))
def test_a_missing_object_is_not_a_missing_route(
    server: ScriptedServer, alone: RestClient, what: str
) -> None:
    call, route, concrete = LACKING[what]
    server.on(method_and(route, concrete), Answer(404, {"detail": "nobody is unknown"}))
    with pytest.raises(NotFoundError, match="nobody is unknown"):
        call(alone).result(PATIENCE_S)


# Routes that the embedded server may lack


def test_weights_are_copied_into_a_project(server: ScriptedServer) -> None:
    server.on(
        "POST /api/v1/copy_weights",
        Answer(503, headers={"retry-after-ms": "1"}),
        Answer(body={"tinker_path": "tinker://copy/weights/x"}),
    )
    with RestClient(base_url=server.url, project_id="mine") as alone:
        future = alone.copy_weights(PATH, ttl_seconds=3600, weights_access_token="tok-en")
        assert future.result(PATIENCE_S) == "tinker://copy/weights/x"
        alone.copy_weights(PATH, "theirs").result(PATIENCE_S)
    first, again, other = server.requests("POST /api/v1/copy_weights")
    assert first.json() == {
        "source_path": PATH,
        "destination_project_id": "mine",
        "ttl_seconds": 3600,
    }
    assert first.headers["x-tinker-weights-access-token"] == "tok-en"
    assert again.headers["x-idempotency-key"] == first.headers["x-idempotency-key"]
    assert again.body == first.body
    assert other.json() == {"source_path": PATH, "destination_project_id": "theirs"}
    assert "x-tinker-weights-access-token" not in other.headers
    assert other.headers["x-idempotency-key"] != first.headers["x-idempotency-key"]


def test_a_token_that_the_server_echoes_is_not_shown(
    server: ScriptedServer, alone: RestClient
) -> None:
    server.on("POST /api/v1/copy_weights", Answer(403, {"detail": "token tok-en is not valid"}))
    with pytest.raises(PermissionDeniedError) as caught:
        alone.copy_weights(PATH, "p", weights_access_token="tok-en").result(PATIENCE_S)
    assert "tok-en" not in str(caught.value) + repr(caught.value.body)


def test_a_copy_needs_a_project(alone: RestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_PROJECT_ID", raising=False)
    with pytest.raises(InvalidInputError, match="TINKER_PROJECT_ID"):
        alone.copy_weights(PATH)


def test_a_session_is_moved_to_a_project(server: ScriptedServer, alone: RestClient) -> None:
    server.on("PUT /api/v1/sessions/s-1/project", Answer(204, b""))
    assert alone.assign_session_project("s-1", "p").result(PATIENCE_S) is None
    (sent,) = server.requests("PUT /api/v1/sessions/s-1/project")
    assert sent.json() == {"project_id": "p"}
    with pytest.raises(InvalidInputError):
        alone.assign_session_project("s-1", "")


TRACE = "GET /api/v1/sessions/s-1/trace_export"


def test_a_trace_is_waited_for(
    server: ScriptedServer, alone: RestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_client, "TRACE_POLL_S", 0.001)
    pending = Answer(body={"status": "pending"})
    ready = Answer(body={"status": "ready", "url": "https://host/t?sig=1"})
    server.on(TRACE, pending, pending, ready)
    assert alone.export_session_trace("s-1").result(PATIENCE_S) == "https://host/t?sig=1"
    assert len(server.requests(TRACE)) == 3


@pytest.mark.parametrize(
    "state",
    [{"status": "failed", "error": "too old"}, {"status": "failed"}, {"status": "ready"}],
    ids=str,
)
def test_a_trace_whose_export_fails(
    server: ScriptedServer, alone: RestClient, state: Dict[str, str]
) -> None:
    server.on(TRACE, Answer(body=state))
    with pytest.raises(RequestFailedError, match=state.get("error", state["status"])):
        alone.export_session_trace("s-1").result(PATIENCE_S)


def test_closing_interrupts_the_wait_for_a_trace(server: ScriptedServer) -> None:
    server.on(TRACE, Answer(body={"status": "pending"}))
    alone = RestClient(base_url=server.url)
    future = alone.export_session_trace("s-1")
    server.wait_for(TRACE)
    alone.close()
    with pytest.raises(ClientClosedError):
        future.result(PATIENCE_S)


SEARCH = "POST /api/v1/sessions/search"
FOUND = {
    "session_id": "s-1",
    "created_at": "2026-01-02T03:04:05Z",
    "owner": "tml:user:1",
    "project_id": "p",
    "checkpoints_count": 3,
    "user_metadata": {"a": "b"},
}
STATUSES = {
    "active": ({"type": "active"}, types.SessionActive()),
    "cancelled": (
        {"type": "cancelled", "detail": "by hand"},
        types.SessionCancelled(detail="by hand"),
    ),
    "finished": (
        {"type": "client_finished", "reason": {"type": "errored"}, "detail": None},
        types.SessionClientFinished(types.SessionFinishReason("errored")),
    ),
    "failed request": (
        {
            "type": "failed",
            "category": "user",
            "message": "bad",
            "reason": {"type": "request", "request_id": "r", "request_type": "forward"},
        },
        types.SessionFailed("user", "bad", types.RequestFailure("r", "forward")),
    ),
    "failed run": (
        {
            "type": "failed",
            "category": "internal",
            "message": "bad",
            "reason": {"type": "training_run", "training_run_id": "t"},
        },
        types.SessionFailed("internal", "bad", types.TrainingRunFailure("t")),
    ),
    "failed sampler": (
        {
            "type": "failed",
            "category": "internal",
            "message": "bad",
            "reason": {"type": "sampling_session", "sampling_session_id": "x"},
        },
        types.SessionFailed("internal", "bad", types.SamplingSessionFailure("x")),
    ),
    "one of tomorrow": (
        {"type": "asleep", "since": 5},
        types.UnknownVariant("asleep", {"type": "asleep", "since": 5}),
    ),
    "none": (None, None),
}


@pytest.mark.parametrize("how", STATUSES)
def test_sessions_are_found_whatever_their_status(
    server: ScriptedServer, alone: RestClient, how: str
) -> None:
    status, expected = STATUSES[how]
    server.on(SEARCH, Answer(body={"sessions": [{**FOUND, "status": status}]}))
    found = alone.search_sessions(types.SessionSearchRequest()).result(PATIENCE_S)
    (session,) = found.sessions
    assert session.status == expected
    assert (session.session_id, session.owner, session.checkpoints_count) == (
        "s-1",
        "tml:user:1",
        3,
    )
    assert found.next_cursor is None
    assert server.requests(SEARCH)[0].json() == {"user_metadata": {}, "owner": {"type": "own"}}


def test_a_search_may_be_written_as_plain_objects(
    server: ScriptedServer, alone: RestClient
) -> None:
    server.on(SEARCH, Answer(body={"sessions": []}))
    request = types.SessionSearchRequest(
        owner={"type": "team", "id": 5}, statuses=[{"type": "asleep"}]
    )
    alone.search_sessions(request).result(PATIENCE_S)
    assert server.requests(SEARCH)[0].json() == {
        "user_metadata": {},
        "owner": {"type": "team", "id": 5},
        "statuses": [{"type": "asleep"}],
    }


def test_a_search_sends_all_filters_and_continues_with_the_cursor(
    server: ScriptedServer, alone: RestClient
) -> None:
    cursor = {"last_created_at": "2026-01-02T03:04:05Z", "last_session_id": "s-1"}
    server.on(
        SEARCH,
        Answer(body={"sessions": [FOUND], "next_cursor": cursor}),
        Answer(body={"sessions": []}),
    )
    request = types.SessionSearchRequest(
        session_id="s-1",
        project_ids=["p"],
        user_metadata={"a": "b"},
        display_name="n",
        owner=types.SessionsOfUsers(["tml:user:1"]),
        statuses=[
            types.SessionStatusFilter("active"),
            types.SessionStatusFilter("client_finished", ["errored"]),
        ],
        limit=1,
    )
    first = alone.search_sessions(request).result(PATIENCE_S)
    more = dataclasses.replace(request, cursor=first.next_cursor)
    assert alone.search_sessions(more).result(PATIENCE_S).sessions == []
    asked, again = (r.json() for r in server.requests(SEARCH))
    assert asked == {
        "session_id": "s-1",
        "project_ids": ["p"],
        "user_metadata": {"a": "b"},
        "display_name": "n",
        "owner": {"type": "user", "owner_urns": ["tml:user:1"]},
        "statuses": [{"type": "active"}, {"type": "client_finished", "reasons": ["errored"]}],
        "limit": 1,
    }
    assert again == {**asked, "cursor": cursor}


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": 0},
        {"limit": 201},
        {"limit": True},
        {"display_name": ""},
        {"owner": "own"},
        {"owner": {"owner_urns": ["u"]}},
        {"statuses": ["active"]},
        {"owner": types.SessionsOfUsers([])},
        {"owner": types.SessionsOfUsers(["u"] * 11)},
    ],
    ids=str,
)
def test_a_search_is_checked_immediately(alone: RestClient, wrong: Dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        alone.search_sessions(types.SessionSearchRequest(**wrong))
    with pytest.raises(InvalidInputError):
        alone.search_sessions({"limit": 5})  # type: ignore[arg-type]


def test_only_exports_have_urls(alone: RestClient) -> None:
    for path in (PATH, "tinker://r/sampler_weights/x", "tinker://r/x"):
        with pytest.raises(InvalidInputError, match="not an exported one"):
            alone.get_external_weights_urls(path)


def test_paths_of_other_servers_are_returned_unchanged(
    server: ScriptedServer, alone: RestClient
) -> None:
    route = "GET /api/v1/training_runs/model_1/checkpoints/s1/archive"
    server.on(route, Answer(body={"url": "https://host/s1"}))
    found = alone.get_checkpoint_archive_url_from_tinker_path("tinker://model_1/s1")
    assert found.result(PATIENCE_S).url == "https://host/s1"
    route = "DELETE /api/v1/training_runs/mdl/checkpoints/checkpoints/c1"
    server.on(route, Answer())
    alone.delete_checkpoint_from_tinker_path("tinker://mdl/checkpoints/c1").result(PATIENCE_S)
    assert len(server.requests(route)) == 1


MOVED = {
    "get_audit_log": ("audit", (), {"entries": []}, types.AuditLogResponse([])),
    "get_billing_usage": (
        "billing/usage/events",
        ("2026-01-01", "2026-01-02"),
        {"data": []},
        types.BillingUsageResponse([]),
    ),
    "get_current_checkpoint_storage_usage": (
        "billing/usage/checkpoints/current",
        (),
        {"data": []},
        types.CurrentCheckpointStorageUsageResponse([]),
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_methods_that_moved_to_the_admin_client_work_with_a_warning(
    server: ScriptedServer, alone: RestClient, name: str
) -> None:
    route, arguments, body, expected = MOVED[name]
    server.on(f"GET /api/v1/{route}", Answer(body=body))
    with pytest.warns(DeprecationWarning, match=rf"AdminClient\(\).{name}") as caught:
        future = getattr(alone, name)(*arguments)
    assert future.result(PATIENCE_S) == expected
    assert caught[0].filename == __file__
