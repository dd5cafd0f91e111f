"""SessionManager: on a fake network, stepped by hand, or for real."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import sys
import threading
from typing import Any, Callable, List, Optional

import pytest
from sessions.fakes import HandTurned, Oversleeping, answering, hand_turned, managed, raising
from support.clocks import ManualClock
from support.scripted_server import PATIENCE_S, Answer
from support.session_server import BEAT, CREATE, SessionServer, finish_route
from support.threads import promptly, race, wait_until

from tinkex import errors
from tinkex._sessions import manager as session_manager
from tinkex._sessions.heartbeat import LATE_S, HeartbeatThread
from tinkex._sessions.manager import SessionManager
from tinkex._sessions.session_record import MAX_WORKERS, HTTPLink
from tinkex._transport.request import Request
from tinkex._transport.transport import Transport
from tinkex._version import PROTOCOL_VERSION
from tinkex.config import Config
from tinkex.errors import APIConnectionError, APITimeoutError, ClientClosedError, InvalidInputError
from tinkex.types import CreateSessionResponse

A = Config("http://a.test", heartbeat_interval_s=0.02)
B = Config("http://b.test", heartbeat_interval_s=0.02)


def heartbeat_threads() -> List[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "tinkex-heartbeat"]


def messages(caplog: pytest.LogCaptureFixture, at_least: int = logging.INFO) -> List[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= at_least]


# 1: start and stop


def test_start_returns_the_id_and_stop_ends_it_once(server: SessionServer, config: Config) -> None:
    with SessionManager() as manager:
        session_id = manager.start_session(config)
        assert session_id == "s0"
        server.wait_for(BEAT, 2)
        assert manager.stop_session(session_id, "errored", "why") is None
        manager.stop_session(session_id)
        manager.stop_session("never heard of")
    assert server.reasons() == ["errored"]
    assert server.details() == ["why"]
    server.assert_ended_once()


def test_a_session_whose_creation_got_no_response_is_requested_again(
    server: SessionServer, config: Config
) -> None:
    server.on(CREATE, Answer(hold=threading.Event()), Answer(body={"session_id": "s1"}))
    impatient = dataclasses.replace(config, read_timeout_s=0.1, startup_timeout_s=PATIENCE_S)
    with SessionManager() as manager:
        assert manager.start_session(impatient) == "s1"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(401), errors.AuthenticationError),
        (Answer(403), errors.PermissionDeniedError),
        (Answer(404), errors.NotFoundError),
        (Answer(reset=True), errors.APIConnectionError),
        (Answer(hold=threading.Event()), errors.APITimeoutError),
        (Answer(body=b"hello", content_type="text/html"), errors.ResponseDecodeError),
    ],
)
def test_failing_to_start_raises_a_typed_error(
    server: SessionServer, answer: Answer, error: Any
) -> None:
    server.on(CREATE, answer)
    with SessionManager() as manager:
        with pytest.raises(error):
            manager.start_session(Config(server.url, startup_timeout_s=0.2))
        assert manager.snapshot() == []
    assert not heartbeat_threads()


def test_a_link_that_cannot_be_opened_is_reported_immediately() -> None:
    def no_link(config: Config) -> Any:
        raise ValueError("no such proxy")

    with SessionManager(open_link=no_link) as manager, pytest.raises(ValueError, match="proxy"):
        manager.start_session(A)


@pytest.mark.parametrize("trouble", [RuntimeError("bug"), APIConnectionError("refused")])
def test_stop_never_raises(trouble: Exception) -> None:
    with managed() as (manager, network):
        network.on_finish = raising(trouble)
        session_id = manager.start_session(A)
        manager.stop_session(session_id)
        assert manager.snapshot() == []
    assert network.links[0].aborted.is_set()


def test_stop_is_bounded_when_the_server_hangs(server: SessionServer, config: Config) -> None:
    with SessionManager() as manager:
        session_id = manager.start_session(config)
        server.finish_answer = Answer(hold=threading.Event())
        with promptly():
            manager.stop_session(session_id, timeout_s=0.2)


def test_many_threads_start_and_stop_sessions_of_different_servers() -> None:
    with managed() as (manager, network):

        def live_and_die(config: Config) -> None:
            for _ in range(5):
                session_id = manager.start_session(config)
                wait_until(lambda: network.beats(session_id) > 0, f"a beat of {session_id}")
                manager.stop_session(session_id)

        outcomes = race(*[lambda c=c: live_and_die(c) for c in (A, B) * 6])
        assert outcomes == [None] * 12
        assert manager.snapshot() == []
    assert len(network.finished) == len({session for session, _, _ in network.finished}) == 60


def test_an_id_in_use_is_refused_and_the_first_session_continues() -> None:
    with managed() as (manager, network):
        network.on_create = lambda _: CreateSessionResponse("same")
        manager.start_session(A)
        with pytest.raises(InvalidInputError, match="already"):
            manager.start_session(A)
        assert [s.session_id for s in manager.snapshot()] == ["same"]
        assert network.finished == []


# 2: creation


def test_creation_sends_the_labels(server: SessionServer) -> None:
    config = Config(
        server.url,
        tags=("nightly", "ci"),
        user_metadata={"who": "me"},
        project_id="p1",
        display_name="run 7",
    )
    with SessionManager() as manager:
        manager.start_session(config)
        manager.start_session(Config(server.url))
    first, second = [json.loads(r.body) for r in server.requests(CREATE)]
    assert first == {
        "tags": ["nightly", "ci"],
        "user_metadata": {"who": "me"},
        "sdk_version": PROTOCOL_VERSION,
        "project_id": "p1",
        "display_name": "run 7",
        "type": "create_session",
    }
    assert second == {
        "tags": [],
        "user_metadata": {},
        "sdk_version": PROTOCOL_VERSION,
        "type": "create_session",
    }


def test_messages_of_the_server_are_logged_at_their_level(
    server: SessionServer, caplog: pytest.LogCaptureFixture
) -> None:
    said = {"info_message": "hello", "warning_message": "old client", "error_message": "no credit"}
    server.on(CREATE, Answer(body={"session_id": "s0", **said}))
    with caplog.at_level(logging.INFO), SessionManager() as manager:
        manager.start_session(Config(server.url))
    levels = {r.getMessage().rpartition(": ")[2]: r.levelname for r in caplog.records}
    assert levels == {"hello": "INFO", "old client": "WARNING", "no credit": "ERROR"}


@pytest.mark.parametrize("body", [{}, {"session_id": None}, {"session_id": 7}, {"session_id": ""}])
def test_a_session_without_a_valid_id_is_an_error(server: SessionServer, body: Any) -> None:
    server.on(CREATE, Answer(body=body))
    with SessionManager() as manager, pytest.raises(errors.ResponseDecodeError, match="session_id"):
        manager.start_session(Config(server.url))


# 3: creation blocks nothing else, and leaves no orphan


def test_a_slow_creation_holds_up_neither_lock_nor_heartbeats() -> None:
    with managed() as (manager, network):
        release = threading.Event()

        def create(session_id: str) -> CreateSessionResponse:
            if session_id != "s0":
                assert release.wait(PATIENCE_S)
            return CreateSessionResponse(session_id)

        network.on_create = create
        manager.start_session(A)
        slow = threading.Thread(target=lambda: manager.start_session(B))
        slow.start()
        wait_until(lambda: network.created == 2, "the second creation has begun")
        before = network.beats("s0")
        wait_until(lambda: network.beats("s0") >= before + 3, "beats go on meanwhile")
        assert [s.session_id for s in manager.snapshot()] == ["s0"]
        release.set()
        slow.join(PATIENCE_S)
        assert {s.session_id for s in manager.snapshot()} == {"s0", "s1"}
    assert all(name.startswith("tinkex-session-") for name in network.threads)


def test_a_session_that_arrives_after_its_caller_gave_up_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_manager, "_GRACE_S", 0.0)
    with managed() as (manager, network):
        release = threading.Event()

        def create(session_id: str) -> CreateSessionResponse:
            assert release.wait(PATIENCE_S)
            return CreateSessionResponse(session_id)

        network.on_create = create
        with pytest.raises(APITimeoutError, match=r"a\.test:80 did not create a session"):
            manager.start_session(Config("http://a.test", startup_timeout_s=0.05))
        assert network.finished == []
        release.set()
        wait_until(lambda: bool(network.finished), "the late session is ended")
        assert network.finished == [("s0", "interrupted", None)]
        assert manager.snapshot() == []
        assert network.sent == []


def test_a_session_is_ended_if_its_caller_is_interrupted_as_it_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupts = [KeyboardInterrupt()]
    real = session_manager.SessionRecord

    def record(*args: Any, **how: Any) -> Any:
        if interrupts:
            raise interrupts.pop()
        return real(*args, **how)

    with managed() as (manager, network):
        monkeypatch.setattr(session_manager, "SessionRecord", record)
        with pytest.raises(KeyboardInterrupt):
            manager.start_session(A)
        assert network.finished == [("s0", "interrupted", None)]


def test_a_session_that_arrives_at_a_closed_manager_is_ended() -> None:
    with managed() as (manager, network):

        def create(session_id: str) -> CreateSessionResponse:
            manager.close(timeout_s=0.1)
            return CreateSessionResponse(session_id)

        network.on_create = create
        with pytest.raises(ClientClosedError, match="manager was closed"):
            manager.start_session(A)
        assert [session_id for session_id, _, _ in network.finished] == ["s0"]
        with pytest.raises(ClientClosedError, match="manager was closed"):
            manager.start_session(A)


def test_a_queued_creation_whose_caller_gave_up_is_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_manager, "_GRACE_S", 0.0)
    with managed() as (manager, network):
        queued: List[Callable[[], None]] = []
        monkeypatch.setattr(manager._session_workers, "submit", queued.append)  # all are busy
        with pytest.raises(APITimeoutError):
            manager.start_session(Config("http://a.test", startup_timeout_s=0.01))
        queued[0]()
        assert network.created == 0


def test_nothing_is_retried_for_a_caller_that_gave_up(server: SessionServer) -> None:
    server.on(CREATE, Answer(503, headers={"Retry-After": "5"}))
    link = HTTPLink(Config(server.url))
    errors: List[BaseException] = []

    def create() -> None:
        try:
            link.create()
        except ClientClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=create)
    thread.start()
    wait_until(lambda: bool(server.requests(CREATE)), "the first attempt is made")
    link.give_up()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert len(server.requests(CREATE)) == 1
    link.abort()


# 4: one thread; the form of a heartbeat


def test_one_daemon_thread_lives_from_the_first_session_to_the_last() -> None:
    with managed() as (manager, _):
        assert not heartbeat_threads()
        first, second = manager.start_session(A), manager.start_session(B)
        (thread,) = heartbeat_threads()
        assert thread.daemon
        manager.stop_session(first)
        assert thread.is_alive()
        manager.stop_session(second)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        manager.start_session(A)
        (again,) = heartbeat_threads()
        manager.close()
        again.join(PATIENCE_S)
        assert not heartbeat_threads()


def test_a_thread_whose_start_was_interrupted_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Unstartable(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    def unstartable(heartbeat: HeartbeatThread) -> threading.Thread:
        return Unstartable(name="tinkex-heartbeat")

    with managed() as (manager, network):
        real = HeartbeatThread._new_thread
        monkeypatch.setattr(HeartbeatThread, "_new_thread", unstartable)
        with pytest.raises(ClientClosedError, match="can't start new thread"):
            manager.start_session(A)
        assert manager.snapshot() == []
        assert network.finished == [("s0", "interrupted", None)]
        monkeypatch.setattr(HeartbeatThread, "_new_thread", real)
        manager.start_session(A)
        assert network.wait_for_beat() == "s1"


def test_a_heartbeat_is_one_request_of_the_exact_form(
    server: SessionServer, config: Config
) -> None:
    server.on(BEAT, Answer(503))  # the transport would retry this
    with SessionManager() as manager:
        session_id = manager.start_session(config)
        wait_until(
            lambda: manager.snapshot()[0].consecutive_failures >= 3, "three beats have failed"
        )
        failures = manager.snapshot()[0].consecutive_failures
        assert len(server.beats()) - failures in (0, 1)  # one may be in flight
        manager.stop_session(session_id)
    request = server.beats()[0]
    assert (request.method, request.path) == ("POST", "/api/v1/session_heartbeat")
    assert json.loads(request.body) == {"session_id": "s0", "type": "session_heartbeat"}


@pytest.mark.parametrize(("interval_s", "timeout_s"), [(10, 10), (60, 10), (2, 2)])
def test_a_heartbeat_may_take_ten_seconds_but_no_longer_than_the_interval(
    monkeypatch: pytest.MonkeyPatch, interval_s: float, timeout_s: float
) -> None:
    seen: List[Optional[float]] = []

    def send_once(self: Transport, request: Request, **how: Any) -> Any:
        seen.append(request.read_timeout_s)
        raise APITimeoutError("slow")

    monkeypatch.setattr(Transport, "send_once", send_once)
    link = HTTPLink(Config("http://a.test", heartbeat_interval_s=interval_s))
    with pytest.raises(APITimeoutError):
        link.beat("s0")
    assert seen == [timeout_s]


def test_heartbeats_have_their_own_connections(
    server: SessionServer, connect: Callable[..., Any]
) -> None:
    service = connect()
    server.on("GET /api/v1/get_server_capabilities", Answer(body={"supported_models": []}))
    service.get_server_capabilities()
    server.wait_for(BEAT, 2)
    mine = {r.connection for r in server.requests("GET /api/v1/get_server_capabilities")}
    assert mine.isdisjoint({r.connection for r in server.beats()})


# 5: when each session sends heartbeats


def test_each_session_has_its_own_interval(bench: HandTurned) -> None:
    bench.start(heartbeat_interval_s=10)
    assert bench.registry._table.next_due() == bench.clock.monotonic()  # rand() is 0 here
    sent = []
    for _ in range(30):
        bench.iterate(1)
        sent.append(len(bench.network.sent))
    assert sent[0] == 1
    assert sent[-1] == 4


def test_a_hung_host_delays_no_other_host() -> None:
    with managed() as (manager, network):
        stuck = threading.Event()

        def beat(session_id: str) -> int:
            if session_id == "s0":
                stuck.set()
                return network.links[0].hang()
            return 200

        network.on_beat = beat
        manager.start_session(A)
        assert stuck.wait(PATIENCE_S)  # the only session: the heartbeat thread hangs
        manager.start_session(B)
        manager.start_session(B)
        for session_id in ("s1", "s2"):
            wait_until(lambda s=session_id: network.beats(s) >= 5, f"five beats of {session_id}")
        assert network.beats("s0") == 1


def test_if_no_thread_can_take_over_the_old_one_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    with managed() as (manager, network):
        stuck, release = threading.Event(), threading.Event()

        def beat(session_id: str) -> int:
            stuck.set()
            assert release.wait(PATIENCE_S)
            return 200

        def start(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        def create(session_id: str) -> CreateSessionResponse:
            monkeypatch.setattr(threading.Thread, "start", start)
            return CreateSessionResponse(session_id)

        network.on_beat = beat
        manager.start_session(A)
        assert stuck.wait(PATIENCE_S)
        network.on_create = create
        with pytest.raises(ClientClosedError, match="can't start new thread"):
            manager.start_session(B)
        monkeypatch.undo()
        before = network.beats("s0")
        release.set()
        wait_until(lambda: network.beats("s0") >= before + 2, "further beats of the first")


def test_a_replaced_thread_takes_no_message_meant_for_its_successor() -> None:
    with managed() as (manager, network):
        stuck, release = threading.Event(), threading.Event()

        def beat(session_id: str) -> int:
            if session_id == "s0":
                stuck.set()
                assert release.wait(PATIENCE_S)
            return 200

        network.on_beat = beat
        manager.start_session(A)
        assert stuck.wait(PATIENCE_S)
        (first,) = heartbeat_threads()
        manager.start_session(Config("http://b.test", heartbeat_interval_s=3600))
        assert len(heartbeat_threads()) == 2
        release.set()
        first.join(PATIENCE_S)
        assert not first.is_alive()
        (second,) = heartbeat_threads()
        assert manager._heartbeat._thread is second


def test_an_id_that_moves_to_another_host_leaves_no_heartbeat_in_flight(bench: HandTurned) -> None:
    """Its heartbeat was queued for the first host when the session was stopped."""
    bench.start("http://a.test", heartbeat_interval_s=10)
    registry = bench.registry
    for _ in range(2 * MAX_WORKERS):
        bench.manager.adopt_session(Config("http://a.test"), "moves")
        assert registry.queue_due_beats(bench.clock.monotonic(), all_sessions=True)[0]
        bench.manager.stop_session("moves")
        bench.manager.adopt_session(Config("http://b.test"), "moves")
        bench.heartbeat._send_queued()
        bench.manager.stop_session("moves")
    assert bench.network.beats("moves") == 2 * MAX_WORKERS
    bench.network.sent.clear()
    bench.iterate(10)
    assert bench.network.sent == ["s0"]


def test_many_hung_hosts_leave_at_most_eight_workers_busy() -> None:
    with managed() as (manager, network):
        network.on_beat = lambda session_id: next(
            link for link in network.links if link.config.display_name == session_id
        ).hang()
        for number in range(12):
            config = Config(
                f"http://h{number}.test", heartbeat_interval_s=0.02, display_name=f"s{number}"
            )
            manager.start_session(config)
        wait_until(lambda: len(network.sent) >= 8, "all workers are busy")
        workers = [t for t in threading.enumerate() if "tinkex-heartbeat-worker" in t.name]
        assert 1 <= len(workers) <= 8
        assert all(t.daemon for t in workers)


def test_without_workers_the_heartbeat_thread_sends_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with managed() as (manager, network):

        def refuse(task: Any) -> None:
            raise ClientClosedError("can't start new thread")

        monkeypatch.setattr(manager._heartbeat.workers, "submit", refuse)
        for config in (A, B):
            manager.start_session(config)
        for session_id in ("s0", "s1"):
            wait_until(lambda s=session_id: network.beats(s) >= 2, f"beats of {session_id}")


# 6, 7, 8: the meaning of answers


@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize(("quiet", "level"), [(False, "INFO"), (True, "DEBUG")])
def test_an_ended_session_is_forgotten_without_a_warning(
    bench: HandTurned, caplog: pytest.LogCaptureFixture, status: int, quiet: bool, level: str
) -> None:
    caplog.set_level(logging.DEBUG)
    session_id = bench.start(quiet=quiet)
    bench.iterate()
    bench.network.on_beat = answering({session_id: status})
    caplog.clear()
    bench.iterate(10)
    (record,) = caplog.records
    assert record.levelname == level
    assert record.getMessage() == (
        f"session {session_id} is gone: the server ended it or let it expire"
    )
    assert bench.manager.snapshot() == []
    assert bench.iterate(10) is False  # the last session: the thread ends
    assert len(bench.network.sent) == 2
    assert bench.network.links[0].aborted.is_set()


def test_not_found_on_the_very_first_heartbeat_gives_one_hint(
    bench: HandTurned, caplog: pytest.LogCaptureFixture
) -> None:
    bench.network.on_beat = answering({"s0": 404})
    bench.start()
    bench.iterate()
    (text,) = messages(caplog)
    assert "the very first heartbeat of session s0 got 'not found' from a.test:80" in text
    assert "is base_url right" in text


def test_no_hint_if_the_path_is_right(bench: HandTurned, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench.network.on_beat = answering({"s0": 410, "elsewhere": 404})
    bench.start()
    bench.iterate()  # 410: the server knows the session
    bench.take_over()
    bench.manager.adopt_session(Config("http://a.test"), "elsewhere")
    bench.iterate()  # 404: the process that opened the session has ended it
    assert len(messages(caplog)) == 2
    assert messages(caplog, logging.WARNING) == []


@pytest.mark.parametrize("status", [400, 401, 403, 422])
def test_a_refused_session_is_removed_with_one_warning(
    bench: HandTurned, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    caplog.set_level(logging.INFO)
    bench.network.on_beat = answering({"s0": status})
    bench.start()
    bench.iterate()
    assert messages(caplog) == []
    bench.iterate(2)
    bench.iterate(10)
    key = "check the API key and " if status in (401, 403) else ""
    assert messages(caplog) == [
        f"session s0 is given up: the server refused its heartbeat (status {status}). "
        f"Work that needs it will fail; {key}create a new client"
    ]
    assert len(bench.network.sent) == 2


@pytest.mark.parametrize(
    "trouble",
    [
        answering({"s0": 408}),
        answering({"s0": 429}),
        answering({"s0": 500}),
        answering({"s0": 503}),
        raising(APITimeoutError("slow")),
        raising(APIConnectionError("refused")),
        raising(ValueError("a bug")),
    ],
)
def test_transient_trouble_is_logged_at_debug_and_the_next_beat_is_sent(
    bench: HandTurned, caplog: pytest.LogCaptureFixture, trouble: Callable[[str], int]
) -> None:
    caplog.set_level(logging.DEBUG)
    bench.network.on_beat = trouble
    bench.start()
    for _ in range(5):
        assert bench.iterate(10)
    assert len(bench.network.sent) == 5
    assert bench.snapshot().consecutive_failures == 5
    assert messages(caplog) == []
    assert any("heartbeat of session s0" in m for m in messages(caplog, logging.DEBUG))


def test_the_heartbeat_thread_survives_every_error(caplog: pytest.LogCaptureFixture) -> None:
    def on_removed(session_id: str, reason: str) -> None:
        raise SystemExit("a callback that wants out")

    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("a filter with a bug")

    with managed(on_removed=on_removed) as (manager, network):
        network.on_beat = answering({"s0": 410, "s1": 401, "s3": 500})
        for _ in range(4):
            manager.start_session(A)
        wait_until(lambda: len(manager.snapshot()) == 2, "two sessions are lost")
        broken = Broken()
        logging.getLogger("tinkex._sessions.heartbeat").addFilter(broken)
        try:
            network.on_beat = answering({"s3": 410})
            wait_until(lambda: len(manager.snapshot()) == 1, "and a third")
        finally:
            logging.getLogger("tinkex._sessions.heartbeat").removeFilter(broken)
        before = network.beats("s2")
        wait_until(lambda: network.beats("s2") >= before + 3, "the last one lives on")
        assert heartbeat_threads()


def test_a_failing_log_handler_costs_a_session_no_heartbeat(
    bench: HandTurned, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("a filter with a bug")

    caplog.set_level(logging.INFO)
    bench.start(heartbeat_interval_s=10)
    bench.iterate()
    bench.clock._wall += 3600  # the jump of the clock is logged
    log, broken = logging.getLogger("tinkex._sessions.heartbeat"), Broken()
    log.addFilter(broken)
    try:
        with pytest.raises(RuntimeError):
            bench.iterate(10)
    finally:
        log.removeFilter(broken)
    bench.iterate(10)
    assert len(bench.network.sent) == 2


def test_a_failing_iteration_does_not_end_the_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with managed() as (manager, network):
        manager.start_session(A)
        network.wait_for_beat()
        real = manager._registry._table.take_due

        def once(now: float) -> List[str]:
            monkeypatch.setattr(manager._registry._table, "take_due", real)
            raise RuntimeError("a bug")

        monkeypatch.setattr(manager._registry._table, "take_due", once)
        wait_until(
            lambda: "an iteration of the heartbeat thread failed" in caplog.text, "it is logged"
        )
        before = len(network.sent)
        wait_until(lambda: len(network.sent) > before, "it beats again")


# 9, 10: silence


def test_a_long_silence_is_reported_once_a_minute_and_its_end_once(
    bench: HandTurned, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bench.start()
    bench.iterate()
    bench.network.on_beat = raising(APIConnectionError("connection refused"))
    for _ in range(19):  # 190 seconds
        bench.iterate(10)
    assert messages(caplog) == [
        f"no heartbeat of session s0 has succeeded at a.test:80 for {seconds} s "
        "(connection refused); still trying"
        for seconds in (120, 180)
    ]
    assert all(r.levelname == "WARNING" for r in caplog.records)
    caplog.clear()
    bench.network.on_beat = answering({})
    bench.iterate(10)
    bench.iterate(10)
    assert messages(caplog) == ["heartbeats of session s0 succeed again, after 200 s"]
    assert caplog.records[0].levelname == "INFO"


@pytest.mark.parametrize(
    "limit", [{"max_heartbeat_failures": 3}, {"max_heartbeat_failure_s": 25.0}]
)
def test_reaching_a_limit_removes_the_session_with_a_warning(
    bench: HandTurned, caplog: pytest.LogCaptureFixture, limit: Any
) -> None:
    caplog.set_level(logging.INFO)
    bench.start(**limit)
    bench.iterate()
    bench.network.on_beat = answering({"s0": 503})
    for _ in range(3):
        bench.iterate(10)
    assert messages(caplog) == [
        "session s0 is given up: no heartbeat succeeded for 30 s (status 503). "
        "Work that needs it will fail; create a new client"
    ]
    assert bench.manager.snapshot() == []


def test_without_limits_heartbeats_are_sent_forever(bench: HandTurned) -> None:
    bench.network.on_beat = answering({"s0": 503})
    bench.start()
    for _ in range(500):
        bench.iterate(10)
    assert bench.snapshot().consecutive_failures == 500


# 11: the end


def test_a_stopped_session_is_removed_before_its_finish_is_sent(bench: HandTurned) -> None:
    def finish(session_id: str) -> int:
        assert bench.manager.snapshot() == []
        return 200

    bench.network.on_finish = finish
    bench.manager.stop_session(bench.start(), "interrupted", "Ctrl-C")
    assert bench.network.finished == [("s0", "interrupted", "Ctrl-C")]


@pytest.mark.parametrize("late", [200, 401, 404, 500])
def test_a_heartbeat_in_flight_neither_revives_a_stopped_session_nor_logs(
    bench: HandTurned, caplog: pytest.LogCaptureFixture, late: int
) -> None:
    caplog.set_level(logging.DEBUG)
    lost: List[str] = []
    bench.heartbeat.on_removed = lambda session_id, reason: lost.append(session_id)

    def beat(session_id: str) -> int:
        bench.manager.stop_session(session_id)
        return late

    bench.network.on_beat = beat
    bench.start()
    caplog.clear()
    bench.iterate()
    assert bench.manager.snapshot() == []
    assert bench.manager.lost_reason("s0") is None
    assert messages(caplog, logging.DEBUG) == []
    assert lost == []


def test_a_heartbeat_in_flight_does_not_affect_the_next_session_with_that_id(
    bench: HandTurned,
) -> None:
    def beat(session_id: str) -> int:
        bench.manager.stop_session(session_id)
        bench.manager.adopt_session(Config("http://a.test"), session_id)
        return 404

    bench.network.on_beat = beat
    bench.manager.adopt_session(Config("http://a.test"), "theirs")
    bench.take_over()
    bench.iterate()
    assert bench.snapshot().session_id == "theirs"


@pytest.mark.parametrize("status", [404, 405, 501])
def test_servers_without_the_finish_route_are_asked_once(
    bench: HandTurned, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    caplog.set_level(logging.DEBUG)
    bench.network.on_finish = lambda session_id: status
    for _ in range(3):
        bench.manager.stop_session(bench.start("http://old.test"))
    bench.manager.stop_session(bench.start("http://new.test"))
    assert [session_id for session_id, _, _ in bench.network.finished] == ["s0", "s3"]
    assert messages(caplog, logging.DEBUG) == []


def test_not_found_on_an_existing_finish_route_is_about_that_session_only(
    bench: HandTurned,
) -> None:
    bench.network.on_finish = answering({"s1": 404})
    for _ in range(3):
        bench.manager.stop_session(bench.start())
    assert [session_id for session_id, _, _ in bench.network.finished] == ["s0", "s1", "s2"]


def test_another_error_is_not_remembered(bench: HandTurned) -> None:
    bench.network.on_finish = lambda session_id: 500
    for _ in range(2):
        bench.manager.stop_session(bench.start())
    assert len(bench.network.finished) == 2


# 12: clocks


def test_after_a_suspend_heartbeats_go_out_immediately_on_fresh_connections(
    bench: HandTurned, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bench.start(heartbeat_interval_s=10)
    bench.iterate()
    bench.iterate(1)
    assert len(bench.network.sent) == 1
    bench.clock._wall += 3600  # asleep: the monotonic clock stood still
    bench.iterate(1)
    assert len(bench.network.sent) == 2
    assert bench.network.links[0].dropped == 1
    assert messages(caplog) == [
        "the clock jumped by 3600 s (the machine slept?): sending heartbeats now"
    ]
    bench.iterate(1)
    assert len(bench.network.sent) == 2  # each only once


def test_a_suspend_between_two_sessions_is_not_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    clock = ManualClock()
    with managed(clock=clock, rand=lambda: 0.0) as (manager, network):
        manager.stop_session(manager.start_session(A))
        for thread in heartbeat_threads():
            thread.join(PATIENCE_S)
        clock._wall += 3600  # asleep: the monotonic clock stood still
        manager.start_session(A)
        network.wait_for_beat()
        manager.close()
        assert messages(caplog) == []
        assert network.links[1].dropped == 0


def test_a_very_long_interval_is_waited_for_in_short_sleeps(
    bench: HandTurned, caplog: pytest.LogCaptureFixture
) -> None:
    bench.start(heartbeat_interval_s=1e15)
    bench.iterate()
    bench.heartbeat.inbox = Oversleeping(bench, 0.0)  # type: ignore[assignment] # a fake
    began = bench.clock.monotonic()
    assert bench.heartbeat.run_once()
    assert bench.clock.monotonic() - began == 60
    assert len(bench.network.sent) == 1
    assert messages(caplog) == []


def test_a_thread_that_is_woken_much_too_late_warns_once(
    bench: HandTurned, caplog: pytest.LogCaptureFixture
) -> None:
    bench.start(heartbeat_interval_s=10)
    bench.iterate()
    bench.heartbeat.inbox = Oversleeping(bench, 7.5)  # type: ignore[assignment] # a fake
    for _ in range(3):
        bench.heartbeat.run_once()
    assert messages(caplog) == [
        "heartbeats ran 7.5 s late: something kept this process from running (a long computation "
        "that holds the GIL?). If that lasts, the server will end the session"
    ]
    assert caplog.records[0].levelname == "WARNING"
    assert len(bench.network.sent) == 4
    assert bench.network.links[0].dropped == 3  # the process may have been suspended all that time


def test_a_small_delay_is_not_reported(bench: HandTurned, caplog: pytest.LogCaptureFixture) -> None:
    bench.start()
    bench.heartbeat.inbox = Oversleeping(bench, LATE_S / 2)  # type: ignore[assignment] # a fake
    for _ in range(3):
        bench.heartbeat.run_once()
    assert messages(caplog) == []


# 13: observation


def test_the_snapshot_has_every_fact_and_no_secret() -> None:
    with hand_turned() as bench:
        bench.start(api_key="tml-secret", extra_headers={"x-token": "hush"})
        bench.iterate()
        bench.network.on_beat = raising(APIConnectionError("refused"))
        began = bench.clock.monotonic()
        bench.iterate(10)
        snapshot = bench.snapshot()
        assert snapshot.session_id == "s0"
        assert snapshot.created == snapshot.last_success == began
        assert snapshot.consecutive_failures == 1
        assert (snapshot.last_error, snapshot.state) == ("refused", "failing")
        assert "secret" not in repr(snapshot)
        assert "hush" not in repr(snapshot)


def test_the_callback_is_called_with_the_reason_outside_every_lock() -> None:
    lost: List[Any] = []

    def on_removed(session_id: str, reason: str) -> None:
        lost.append((session_id, reason, bench.manager.snapshot()))  # needs the lock
        bench.manager.stop_session(session_id)

    with hand_turned(on_removed=on_removed) as bench:
        bench.network.on_beat = answering({"s0": 401})
        bench.start()
        bench.iterate()
        bench.iterate(2)
        bench.manager.stop_session(bench.start())
        assert lost == [("s0", "the server refused its heartbeat (status 401)", [])]


def test_lost_sessions_are_not_remembered_forever(
    bench: HandTurned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinkex._sessions.registry.MAX_LOST", 2)
    bench.network.on_beat = lambda session_id: 410
    lost = []
    for _ in range(4):
        bench.take_over()
        lost.append(bench.start())
        bench.iterate()
    known = [bench.manager.lost_reason(session_id) is not None for session_id in lost]
    assert known == [False, False, True, True]


def test_the_manager_runs_on_an_injected_clock_and_sender(bench: HandTurned) -> None:
    bench.start()
    assert bench.iterate()
    assert bench.network.sent == ["s0"]
    assert bench.snapshot().last_success == bench.clock.monotonic()


# Beyond the list: the end of the manager, and adopted sessions


def test_closing_ends_all_sessions_in_parallel_and_a_hung_host_costs_one_wait() -> None:
    with managed() as (manager, network):
        configs = [
            Config(f"http://h{number}.test", heartbeat_interval_s=0.02) for number in range(10)
        ]
        for config in configs * 3:
            manager.start_session(config)
        wait_until(lambda: len(set(network.sent)) == 30, "every session was beaten")
        hung = {f"s{number}" for number in (0, 10, 20)}

        def finish(session_id: str) -> int:
            if session_id in hung:
                raise APITimeoutError("hung")
            return 200

        network.on_finish = finish
        manager.close()
        ended = {session_id for session_id, _, _ in network.finished}
        assert len(ended - hung) == 27
        assert 1 <= len(ended & hung) <= 2  # the finishes in flight when the hang was noticed
        assert all(link.aborted.is_set() for link in network.links)
        manager.close()
        assert len(network.finished) == len(ended)


def test_a_session_ends_with_its_owner_and_the_finish_is_not_cut_off_at_close() -> None:
    class Owner:
        pass

    with managed() as (manager, network):
        ending, release = threading.Event(), threading.Event()

        def finish(session_id: str) -> int:
            ending.set()
            assert release.wait(PATIENCE_S)
            return 200

        network.on_finish = finish
        owner = Owner()
        manager.start_session(A, owner=owner)
        del owner
        gc.collect()
        assert ending.wait(PATIENCE_S)
        assert manager.snapshot() == []
        threading.Timer(0.05, release.set).start()
        manager.close()
        assert network.finished == [("s0", "success", "the client was dropped")]


def test_close_does_not_cut_off_a_finish_that_waits_for_a_thread() -> None:
    with managed() as (manager, network):
        owner = threading.Event()  # any object that can be collected
        manager.start_session(A, owner=owner)
        busy, release = threading.Event(), threading.Event()

        def occupy() -> None:
            busy.set()
            assert release.wait(PATIENCE_S)

        workers = manager._session_workers
        workers.resize(1)
        workers.submit(occupy)
        assert busy.wait(PATIENCE_S)
        del owner
        wait_until(lambda: workers._state.backlog == 1, "the end of the session is queued")
        threading.Timer(0.05, release.set).start()
        manager.close()
        assert network.finished == [("s0", "success", "the client was dropped")]


def test_ending_a_dropped_clients_session_may_take_longer_than_an_awaited_end() -> None:
    with managed() as (manager, network):
        owners = [threading.Event(), threading.Event()]
        for owner in owners:
            manager.start_session(A, owner=owner)
        del owner, owners[0]
        wait_until(lambda: len(network.finished) == 1, "the session of the dropped one is finished")
        manager.close()
        assert network.finish_timeouts[0] >= 10.0 > 2.0 >= network.finish_timeouts[1]


def test_close_ends_the_thread_that_reports_the_end_of_a_dropped_client() -> None:
    with managed() as (manager, network):
        asked = threading.Event()

        def hang(session_id: str) -> int:
            asked.set()
            assert network.links[0].aborted.wait(PATIENCE_S)
            return 200

        network.on_finish = hang
        owner = threading.Event()  # any object that can be collected
        manager.start_session(A, owner=owner)
        del owner
        assert asked.wait(PATIENCE_S)
        threads = list(manager._session_workers._state.threads)
        manager.close()
        for thread in threads:
            thread.join(PATIENCE_S / 2)  # by then `hang` has failed, unless it was aborted
        assert network.links[0].aborted.is_set()
        assert manager._registry.ending() == []


def test_a_client_dropped_while_the_manager_closes_is_reported() -> None:
    with managed() as (manager, network):
        owner = threading.Event()  # any object that can be collected
        manager.start_session(A, owner=owner)
        manager._session_workers.close()  # as close does just before the owner is collected
        del owner
        wait_until(lambda: network.finished != [], "the session is finished")
        assert network.finished == [("s0", "success", "the client was dropped")]


def test_close_waits_for_the_finish_that_a_worker_is_posting() -> None:
    """A process that exits in the middle of the request would truncate it."""
    with managed() as (manager, network):
        for _ in range(2):
            manager.start_session(Config("http://a.test", heartbeat_interval_s=3600))
        manager._heartbeat.workers.submit(int)
        wait_until(lambda: manager._heartbeat.workers._state.idle == 1, "an idle worker")
        posting, ours_done, done = threading.Event(), threading.Event(), threading.Event()

        def finish(session_id: str) -> int:
            if threading.current_thread() is threading.main_thread():
                assert posting.wait(PATIENCE_S)
                ours_done.set()
            else:
                posting.set()
                assert ours_done.wait(PATIENCE_S)
                wait_until(round_is_waiting, "close to wait")
                done.set()
            return 200

        def round_is_waiting() -> bool:
            frame: Any = sys._current_frames()[threading.main_thread().ident or 0]
            while frame is not None and frame.f_code.co_name != "wait_for_others":
                frame = frame.f_back
            return frame is not None

        network.on_finish = finish
        manager.close()
        assert done.is_set()


def test_close_waits_for_the_heartbeat_thread_on_its_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with managed() as (manager, _):
        leaving, closing = threading.Event(), threading.Event()

        def drain() -> None:
            leaving.set()
            assert closing.wait(PATIENCE_S)
            threading.Event().wait(0.1)  # as on a busy machine

        monkeypatch.setattr(manager._heartbeat.workers, "drain", drain)
        monkeypatch.setattr(manager._session_workers, "drain", closing.set)
        session_id = manager.start_session(A)
        (thread,) = heartbeat_threads()
        manager.stop_session(session_id)
        assert leaving.wait(PATIENCE_S)
        manager.close()
        assert not thread.is_alive()


def test_a_forgotten_manager_ends_its_sessions_and_its_thread() -> None:
    from sessions.fakes import FakeNetwork

    network = FakeNetwork()
    manager = SessionManager(open_link=network.open)
    manager.start_session(A)
    (thread,) = heartbeat_threads()
    del manager
    gc.collect()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert network.finished == [("s0", "success", "the session manager was dropped")]


def test_an_adopted_session_gets_heartbeats_for_its_last_owner_and_is_never_finished() -> None:
    class Owner:
        pass

    with managed() as (manager, network):
        first, second = Owner(), Owner()
        manager.adopt_session(A, "theirs", owner=first)
        manager.adopt_session(A, "theirs", owner=second)
        assert network.wait_for_beat() == "theirs"
        del first
        gc.collect()
        before = network.beats("theirs")
        wait_until(lambda: network.beats("theirs") >= before + 3, "the second one needs it")
        del second
        gc.collect()
        wait_until(lambda: manager.snapshot() == [], "nothing needs it")
        third = Owner()
        manager.adopt_session(A, "theirs", owner=third)  # adopted again
        manager.stop_session("theirs")
        assert network.finished == []


def test_a_session_that_the_server_does_not_know_does_not_stop_the_finish_of_others(
    server: SessionServer, config: Config
) -> None:
    lost = Answer(404, {"detail": "session s0 is unknown; create one, or check the base URL"})
    with SessionManager() as manager:
        first, second = manager.start_session(config), manager.start_session(config)
        server.finish_answer, good = lost, server.finish_answer
        manager.stop_session(first)
        server.finish_answer = good
        manager.stop_session(second)
    assert server.reasons(second) == ["success"]


def test_finish_is_sent_to_the_path_of_the_session(server: SessionServer, config: Config) -> None:
    with SessionManager() as manager:
        manager.stop_session(manager.start_session(config), "errored", "disk full")
    (request,) = server.requests(finish_route("s0"))
    assert json.loads(request.body) == {"reason": {"type": "errored"}, "detail": "disk full"}
