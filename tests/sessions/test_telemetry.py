"""Telemetry: what is reported, what is never reported, and that nothing waits for it."""

from __future__ import annotations

import datetime
import gc
import json
import logging
import os
import platform
import re
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest
from sessions.processes import Script
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.threads import promptly, wait_until
from support.tinker_routes import TinkerRoutes

from tinkex import RestClient, SamplingClient, ServiceClient, SessionManager, types
from tinkex._sessions import telemetry
from tinkex._sessions.runtime import Runtime
from tinkex._sessions.telemetry_events import (
    failed_request,
    is_user_error,
    package_path,
    safe_message,
    safe_traceback,
    unhandled,
)
from tinkex._version import PROTOCOL_VERSION
from tinkex.config import Config
from tinkex.errors import (
    APIConnectionError,
    APITimeoutError,
    BillingError,
    ClientClosedError,
    InternalServerError,
    InvalidInputError,
    NoProgressError,
    NotFoundError,
    RequestFailedError,
    ResponseDecodeError,
    SessionLostError,
    TinkexError,
)

ROUTE = "POST /api/v1/telemetry"
KEY = "tml-secret-4711"
PROMPT = types.ModelInput.from_ints([31337, 31338])
ACCEPTED = Answer(body={"status": "accepted"})


@pytest.fixture(autouse=True)
def sink(routes: TinkerRoutes) -> None:
    routes.serve("telemetry", ACCEPTED)


@pytest.fixture
def reporting(server: ScriptedServer) -> Iterator[ServiceClient]:
    """A client with telemetry enabled."""
    with ServiceClient(base_url=server.url, api_key=KEY, telemetry=True) as client:
        yield client


@pytest.fixture
def sessions() -> Iterator[SessionManager]:
    """A separate manager, for a second client of a server that has only one session id."""
    manager = SessionManager()
    yield manager
    manager.close()


def reporter(client: ServiceClient) -> telemetry.Reporter:
    found = client.get_telemetry()
    assert found is not None
    return found


def events(server: ScriptedServer) -> List[Dict[str, Any]]:
    return [event for r in server.requests(ROUTE) for event in r.json()["events"]]


def generic(server: ScriptedServer) -> Dict[str, Any]:
    """Return the data of the generic events, by name."""
    return {
        e["event_name"]: e["event_data"] for e in events(server) if e["event"] == "GENERIC_EVENT"
    }


# Off by default


def test_nothing_is_reported_by_default(scripted: ServiceClient, server: ScriptedServer) -> None:
    sampler = scripted.create_sampling_client(base_model="base")
    trainer = scripted.create_lora_training_client("base")
    assert [c.get_telemetry() for c in (scripted, sampler, trainer)] == [None] * 3
    scripted.close()
    assert server.requests(ROUTE) == []


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("1", True),
        ("true", True),
        (" YES ", True),
        ("On", True),
        ("", False),
        ("0", False),
        ("off", False),
        ("2", False),
        (None, False),
    ],
)
def test_the_environment_can_switch_telemetry_on(value: Optional[str], wanted: bool) -> None:
    environ = {} if value is None else {"TINKER_TELEMETRY": value}
    url = "http://127.0.0.1:1"
    assert Config.resolve(environ=environ, base_url=url).telemetry is wanted
    assert Config.resolve(environ=environ, base_url=url, telemetry=False).telemetry is False
    assert Config.resolve(environ=environ, base_url=url, telemetry=True).telemetry is True


# What is reported


def test_a_session_is_reported_from_its_start_to_its_end(server: ScriptedServer) -> None:
    with ServiceClient(base_url=server.url, telemetry=True) as client:
        names = client, client.create_sampling_client(base_model="b")
        assert {c.get_telemetry() for c in names} == {reporter(client)}
    bodies = [r.json() for r in server.requests(ROUTE)]
    for body in bodies:
        assert set(body) == {"events", "platform", "sdk_version", "session_id", "process_uuid"}
        assert body["platform"] == platform.system()
        assert body["sdk_version"] == PROTOCOL_VERSION
        assert body["session_id"] == "session-1"
        assert uuid.UUID(body["process_uuid"]).version == 4
    start, end = events(server)
    common = {"event", "event_id", "event_session_index", "severity", "timestamp"}
    assert set(start) == common
    assert set(end) == common | {"duration"}
    assert [start["event"], end["event"]] == ["SESSION_START", "SESSION_END"]
    assert [e["event_session_index"] for e in (start, end)] == [0, 1]
    assert [e["severity"] for e in (start, end)] == ["INFO", "INFO"]
    assert start["event_id"] != end["event_id"]
    for event in (start, end):
        at = datetime.datetime.strptime(event["timestamp"], "%Y-%m-%dT%H:%M:%S.%fZ")
        age = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None) - at
        assert abs(age) < datetime.timedelta(minutes=1)
    assert re.fullmatch(r"0:00:0\d(\.\d{6})?", end["duration"])


def test_telemetry_is_sent_after_the_session_is_finished(
    server: ScriptedServer, reporting: ServiceClient
) -> None:
    reporting.close()
    order = [r.path.rpartition("/")[2] for r in server.requests()]
    assert order.index("finish") < order.index("telemetry")


def test_a_mistake_of_the_user_is_reported_as_a_user_error(
    server: ScriptedServer, routes: TinkerRoutes, reporting: ServiceClient
) -> None:
    failed = Answer(body={"error": "31337 is no token", "category": "user"})
    routes.serve("retrieve_future", failed)
    sampler = reporting.create_sampling_client(base_model="base")
    future = sampler.sample(PROMPT)
    with pytest.raises(RequestFailedError):
        future.result(PATIENCE_S)
    reporting.close()
    found = generic(server)
    assert found["user_error"] == {
        "error_type": "RequestFailedError",
        "message": "sample failed on the server",
    }
    application = found["APIFuture.result_async.application_error"]
    assert application.pop("elapsed_time") >= 0
    assert application == {
        "request_id": future.request_id,
        "request_type": "sample",
        "error": "sample failed on the server",
        "error_category": "user",
        "is_user_error": True,
        "iteration": 1,
    }
    severities = {e["severity"] for e in events(server) if e["event"] == "GENERIC_EVENT"}
    assert severities == {"WARNING"}
    assert not [e for e in events(server) if e["event"] == "UNHANDLED_EXCEPTION"]


def test_other_failures_are_reported_as_unhandled_exceptions(
    server: ScriptedServer, routes: TinkerRoutes, reporting: ServiceClient
) -> None:
    routes.serve("retrieve_future", Answer(body={"error": "a GPU fell off"}))
    with pytest.raises(RequestFailedError):
        reporting.create_sampling_client(base_model="base").sample(PROMPT).result(PATIENCE_S)
    reporting.close()
    (event,) = [e for e in events(server) if e["event"] == "UNHANDLED_EXCEPTION"]
    assert event["severity"] == "ERROR"
    assert event["error_type"] == "RequestFailedError"
    assert event["error_message"] == "sample failed on the server"
    lines = event["traceback"].splitlines()
    assert re.fullmatch(r'File "tinkex/_results/poll_loop.py", line \d+, in \w+', lines[-1])
    assert generic(server)["APIFuture.result_async.application_error"]["is_user_error"] is False


def test_a_failed_creation_is_reported_too(
    server: ScriptedServer, routes: TinkerRoutes, reporting: ServiceClient
) -> None:
    routes.serve("create_sampling_session", Answer(404, {"detail": "no such model"}))
    with pytest.raises(NotFoundError):
        reporting.create_sampling_client(base_model="base")
    reporting.close()
    assert generic(server) == {
        "user_error": {
            "error_type": "NotFoundError",
            "message": "POST /api/v1/create_sampling_session returned 404",
            "status_code": 404,
        }
    }


def test_a_failure_is_reported_once_although_several_threads_wait_for_it(
    server: ScriptedServer, routes: TinkerRoutes, reporting: ServiceClient
) -> None:
    routes.serve("retrieve_future", Answer(body={"error": "no GPU", "category": "server"}))
    with pytest.raises(RequestFailedError) as caught:
        reporting.create_lora_training_client("base")
    reporting.close()
    found = [e.get("event_name", e["event"]) for e in events(server)]
    assert sorted(found) == [
        "APIFuture.result_async.application_error",
        "SESSION_END",
        "SESSION_START",
        "UNHANDLED_EXCEPTION",
    ]
    name = "APIFuture.result_async.application_error"
    assert generic(server)[name]["request_id"] == caught.value.request_id


def test_closing_is_not_reported_as_a_failure(
    server: ScriptedServer, routes: TinkerRoutes, reporting: ServiceClient
) -> None:
    routes.serve("retrieve_future", Answer(hold=threading.Event()))
    future = reporting.create_sampling_client(base_model="base").sample(PROMPT)
    server.wait_for("POST /api/v1/retrieve_future")
    reporting.close()
    assert isinstance(future.exception(0), ClientClosedError)
    assert [e["event"] for e in events(server)] == ["SESSION_START", "SESSION_END"]


def test_programs_may_report_their_own_events(
    server: ScriptedServer, reporting: ServiceClient
) -> None:
    assert reporter(reporting).log("epoch_done", {"epoch": 3}, "DEBUG")
    assert not reporter(reporting).log("impossible", {"what": object()})
    assert not reporter(reporting).log("too large", {"what": "x" * 100_000})
    reporting.close()
    (event,) = [e for e in events(server) if e["event"] == "GENERIC_EVENT"]
    assert (event["event_name"], event["event_data"]) == ("epoch_done", {"epoch": 3})
    assert event["severity"] == "DEBUG"


def test_a_clone_reports_neither_start_nor_end_of_a_session_that_is_not_its_own(
    server: ScriptedServer, sessions: SessionManager
) -> None:
    config = Config.resolve(environ={}, base_url=server.url, telemetry=True)
    borrowed = Runtime(config, sessions, "session-1")
    clone = SamplingClient(borrowed, "session-1:sample:0", clone=True)
    found = clone.get_telemetry()
    assert found is not None
    found.log("hello")
    borrowed.close()
    assert [e["event"] for e in events(server)] == ["GENERIC_EVENT"]


def test_a_client_without_a_session_reports_failures_only(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    with RestClient(base_url=server.url, telemetry=True) as client:
        with pytest.raises(TinkexError):
            client.get_training_run("unknown").result(PATIENCE_S)
        found = client.get_telemetry()
        assert found is not None
        assert found.session_id.startswith("sessionless-")
    assert [e.get("event_name") for e in events(server)] == ["user_error"]
    (body,) = [r.json() for r in server.requests(ROUTE)]
    assert body["session_id"] == found.session_id


# What is never reported


def test_no_secret_and_no_user_data_leaves_the_process(
    server: ScriptedServer, routes: TinkerRoutes, reporting: ServiceClient
) -> None:
    # A server that echoes everything it was sent, and a program with failures of its own.
    def echo(received: Received) -> Answer:
        said = f"{received.headers.get('x-api-key')} {received.body.decode('latin-1')}"
        return Answer(422, {"detail": [{"input": said, "msg": f"/home/user/secret.txt: {said}"}]})

    routes.serve("asample", echo, echo, routes.accept)
    routes.serve("retrieve_future", echo)
    sampler = reporting.create_sampling_client(base_model="base")
    for _ in range(3):
        assert sampler.sample(PROMPT).exception(PATIENCE_S) is not None
    found = reporter(reporting)
    found.log_exception(KeyError(f"{KEY} /home/user/secret.txt 31337"))
    found.log_exception(InvalidInputError("the tokens [31337] of /home/user/secret.txt"))
    found.log("careless", {"headers": {"x-api-key": KEY}})
    reporting.close()
    assert {e["event"] for e in events(server)} >= {"UNHANDLED_EXCEPTION", "GENERIC_EVENT"}
    sent = b"".join(r.body for r in server.requests(ROUTE))
    for secret in (KEY, "31337", "secret.txt", "/home/user"):
        assert secret.encode() not in sent, secret


def test_messages_end_before_quoted_text() -> None:
    cut = NotFoundError("GET /api/v1/x returned 404: no /home/me/x", status=404)
    assert safe_message(cut) == "GET /api/v1/x returned 404"
    assert safe_message(APIConnectionError("cannot reach h:80 for POST /x: refused by me")) == (
        "cannot reach h:80 for POST /x"
    )
    for other in (ValueError("mine"), InvalidInputError("mine"), TinkexError("mine"), OSError(2)):
        assert safe_message(other) == ""


def test_paths_begin_with_the_package_name(tmp_path: Any) -> None:
    assert package_path(telemetry.__file__) == "tinkex/_sessions/telemetry.py"
    assert package_path("/home/me/venv/lib/python3.11/site-packages/requests/api.py") == (
        "requests/api.py"
    )
    assert package_path("/usr/lib/python3.12/threading.py") == "threading.py"
    assert package_path("C:\\Users\\me\\secret\\train.py") == "train.py"
    assert package_path("/home/me/secret/train.py") == "train.py"
    assert package_path("/home/me/python3-notes/secret/train.py") == "train.py"


def test_a_traceback_reports_places_and_no_code() -> None:
    try:
        raise ValueError("x")
    except ValueError as error:
        places = safe_traceback(error.__traceback__)
    assert re.fullmatch(r'File "test_telemetry.py", line \d+, in test_a_traceback\w+', places)


# Whose fault it was


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "users"),
    [
        (RequestFailedError("x", category="user"), True),
        (RequestFailedError("x", category="server"), False),
        (RequestFailedError("x", category="unknown"), False),
        (NotFoundError("x", status=404), True),
        (BillingError("x", status=402), True),
        (APITimeoutError("x", status=408), False),
        (InternalServerError("x", status=500), False),
        (caused_by(SessionLostError("x"), NotFoundError("x", status=404)), True),
        (APIConnectionError("x"), False),
        (InvalidInputError("x"), True),
        (ValueError("x"), False),
    ],
)
def test_which_errors_are_the_users_fault(error: Exception, users: bool) -> None:
    assert is_user_error(error) is users


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (RequestFailedError("x", category="server"), "application_error"),
        (NoProgressError("x"), "timeout"),
        (ResponseDecodeError("x"), "validation_error"),
        (APIConnectionError("x"), "connection_error"),
        (InternalServerError("x", status=500), "api_status_error"),
        (RequestFailedError("x", status=400, category="user"), "api_status_error"),
        (ValueError("x"), None),
    ],
)
def test_the_event_of_accepted_work_that_fails(error: Exception, name: Optional[str]) -> None:
    found = failed_request(error, request_id="r", request_type="sample", iteration=4, elapsed_s=1.5)
    if name is None:
        assert found is None
        return
    assert found is not None
    assert found[0] == f"APIFuture.result_async.{name}"
    common = {"request_id": "r", "request_type": "sample", "iteration": 4, "elapsed_time": 1.5}
    assert common.items() <= found[1].items()
    json.dumps(found[1])


def test_an_endless_chain_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_user_error(first)
    assert unhandled(first)["error_type"] == "ValueError"


# Nothing waits for it


def test_events_are_sent_in_batches_of_a_hundred(
    server: ScriptedServer, routes: TinkerRoutes, reporting: ServiceClient
) -> None:
    release = threading.Event()
    routes.serve("telemetry", Answer(hold=release), ACCEPTED)
    reporter(reporting).trigger_flush()
    server.wait_for(ROUTE)
    for number in range(249):
        assert reporter(reporting).log("tick", {"n": number})
    release.set()
    server.wait_for(ROUTE, 4)  # without waiting for close
    reporting.close()
    assert [len(r.json()["events"]) for r in server.requests(ROUTE)] == [1, 100, 100, 49, 1]
    assert [e["event_session_index"] for e in events(server)] == list(range(251))


def test_events_are_sent_after_a_while_or_when_triggered(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ServiceClient(base_url=server.url, telemetry=True) as client:
        reporter(client).trigger_flush()
        server.wait_for(ROUTE)
        monkeypatch.setattr(telemetry, "FLUSH_S", 0.01)
        reporter(client).log("later")
        server.wait_for(ROUTE, 2)
    assert telemetry.FLUSH_S == 0.01
    assert [e["event"] for e in events(server)] == ["SESSION_START", "GENERIC_EVENT", "SESSION_END"]


def test_surplus_events_are_dropped_and_counted(
    server: ScriptedServer, routes: TinkerRoutes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "MAX_WAITING", 5)
    release = threading.Event()
    routes.serve("telemetry", Answer(body={}, hold=release), ACCEPTED)
    with ServiceClient(base_url=server.url, telemetry=True) as client:
        found = reporter(client)
        found.trigger_flush()
        server.wait_for(ROUTE)  # now its thread is busy
        assert [found.log("tick", {"n": n}) for n in range(8)] == [True] * 5 + [False] * 3
        assert found.dropped == 3
        release.set()
        wait_until(lambda: found.log("after"), "there is room again")
    kept = [e["event_data"] for e in events(server) if e["event"] == "GENERIC_EVENT"]
    assert kept[:5] == [{"n": n} for n in range(5)]  # new events are dropped, not old ones


def test_a_hanging_server_delays_neither_errors_nor_close(
    server: ScriptedServer, routes: TinkerRoutes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinkex._sessions.runtime.TELEMETRY_S", 0.2)
    monkeypatch.setattr("tinkex._api.sessions.TELEMETRY_TIMEOUT_S", PATIENCE_S)
    routes.serve("telemetry", Answer(hold=threading.Event()))
    routes.serve("retrieve_future", Answer(body={"error": "no"}))
    client = ServiceClient(base_url=server.url, telemetry=True)
    reporter(client).trigger_flush()
    server.wait_for(ROUTE)
    with pytest.raises(RequestFailedError):
        client.create_sampling_client(base_model="base").sample(PROMPT).result(PATIENCE_S)
    with promptly():  # close does not wait for the report
        client.close(timeout_s=PATIENCE_S)
    assert reporter(client).dropped == 4  # the start, two for the failure, the end


def test_a_server_without_the_route_gets_no_more_telemetry(
    server: ScriptedServer, routes: TinkerRoutes, sessions: SessionManager
) -> None:
    routes.serve("telemetry", Answer(405))
    with ServiceClient(base_url=server.url, telemetry=True) as first:
        reporter(first).trigger_flush()
        server.wait_for(ROUTE)
        wait_until(
            lambda: all(t.name != "tinkex-telemetry" for t in threading.enumerate()), "it has ended"
        )
        assert not reporter(first).log("more")
        with ServiceClient(base_url=server.url, telemetry=True, manager=sessions) as second:
            assert second.get_telemetry() is None
    assert len(server.requests(ROUTE)) == 1


@pytest.mark.parametrize(
    "trouble", [Answer(503), Answer(401), Answer(drop=True), Answer(body=b"?")]
)
def test_trouble_loses_one_batch_only(
    server: ScriptedServer, routes: TinkerRoutes, trouble: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    routes.serve("telemetry", trouble, ACCEPTED)
    with caplog.at_level(logging.INFO):
        with ServiceClient(base_url=server.url, telemetry=True) as client:
            reporter(client).trigger_flush()
            server.wait_for(ROUTE)
            reporter(client).log("second")
    later = [e["event"] for r in server.requests(ROUTE)[1:] for e in r.json()["events"]]
    assert later == ["GENERIC_EVENT", "SESSION_END"]
    assert caplog.records == []


def test_many_threads_report_concurrently(server: ScriptedServer, reporting: ServiceClient) -> None:
    found = reporter(reporting)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: found.log("tick", {"n": n}), range(400)))
    reporting.close()
    indices = [e["event_session_index"] for e in events(server)]
    assert indices == list(range(402))


def test_without_a_thread_events_are_dropped(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = telemetry.Reporter(Config.resolve(environ={}, base_url=server.url), "s")

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append((record.getMessage(), found._lock.locked()))

    logged: List[Tuple[str, bool]] = []
    monkeypatch.setattr(telemetry.logger, "handlers", [Handler()])
    monkeypatch.setattr(telemetry.logger, "level", logging.DEBUG)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert not found.log("x")
    assert found.dropped == 1
    (message, locked), *_ = logged
    assert message.startswith("no telemetry: cannot start its thread: can't start new thread")
    assert not locked  # a handler may be slow
    assert found.log("y")
    found.close(PATIENCE_S)
    assert [e.get("event_name") for e in events(server)] == ["y", None]
    assert not found.log("too late")
    found.close(PATIENCE_S)  # a second time without effect
    assert len(server.requests(ROUTE)) == 1


def test_the_telemetry_thread_of_a_dropped_client_ends(server: ScriptedServer) -> None:
    clients = [ServiceClient(base_url=server.url, telemetry=True)]
    assert any(t.name == "tinkex-telemetry" for t in threading.enumerate())

    def drop() -> None:
        clients.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match="unclosed ServiceClient"):
        drop()
    wait_until(
        lambda: all(t.name != "tinkex-telemetry" for t in threading.enumerate()), "it has ended"
    )


def test_a_bug_in_reporting_does_not_affect_the_client(
    reporting: ServiceClient, routes: TinkerRoutes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: BaseException) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(telemetry, "is_user_error", fail)
    routes.serve("retrieve_future", Answer(body={"error": "no"}))
    with pytest.raises(RequestFailedError):
        reporting.create_sampling_client(base_model="base").sample(PROMPT).result(PATIENCE_S)


# Processes


def test_a_program_that_ends_without_close_reports_its_end(
    server: ScriptedServer, tmp_path: Path
) -> None:
    body = """
service = connect(telemetry=True)
service.get_telemetry().log("hello")
"""
    ended = Script(tmp_path, body, server.url).wait()
    ended.assert_silent()
    assert ended.code == 0
    assert [e["event"] for e in events(server)] == ["SESSION_START", "GENERIC_EVENT", "SESSION_END"]


def test_a_hanging_server_does_not_delay_the_exit(
    server: ScriptedServer, routes: TinkerRoutes, tmp_path: Path
) -> None:
    routes.serve("telemetry", Answer(hold=threading.Event()))
    body = """
service = connect(telemetry=True)
service.get_telemetry().trigger_flush()
service.get_server_capabilities()
"""
    server.on("GET /api/v1/get_server_capabilities", Answer(body={"supported_models": []}))
    ended = Script(tmp_path, body, server.url).wait()
    ended.assert_silent()
    assert ended.code == 0
    server.wait_for("POST /api/v1/sessions/session-1/finish")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
def test_the_child_of_a_fork_reports_as_its_own_process_or_not_at_all(
    server: ScriptedServer, tmp_path: Path
) -> None:
    body = """
from tinkex._sessions.telemetry import process_uuid
service = connect(telemetry=True)
reporter = service.get_telemetry()
parents = process_uuid()
pid = os.fork()
if not pid:
    reporter._lock.acquire()  # as if another thread had held it
    told = reporter.log("from the child")
    reporter.trigger_flush()
    reporter.close(5)
    os._exit(0 if not told and process_uuid() != parents else 1)
assert os.waitpid(pid, 0)[1] == 0, "the child failed"
assert process_uuid() == parents
service.close()
"""
    ended = Script(tmp_path, body, server.url).wait()
    ended.assert_silent()
    assert ended.code == 0
    assert [e["event"] for e in events(server)] == ["SESSION_START", "SESSION_END"]
