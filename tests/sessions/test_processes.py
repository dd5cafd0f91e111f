"""How processes end: the server's view, exit code, stderr, duration."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from pathlib import Path
from typing import List, Optional

import pytest
from sessions.processes import Ended, Script, last_line, line_of
from support.scripted_server import Answer
from support.session_server import (
    CAPABILITIES,
    CREATE,
    POLL,
    SessionServer,
    finish_route,
)

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals and forks are POSIX's")
pytestmark = POSIX

UNCLOSED = "the process ended without closing the client"


@dataclasses.dataclass(frozen=True)
class Case:
    """A script, a signal for it, and the expected outcome.

    Attributes:
        body: the script; ``connect()`` opens a client.
        code: exit code.
        reasons: the reasons that the server got for the session's end, one per request.
        detail: of the first of them.
        error: the last line on stderr; None if stderr must be empty.
        signal, at: the signal is sent when the server gets a request for the route *at*.
        hold: a route that is not answered while the script runs.
        within_s: the limit from the signal (or the start) to the end.
    """

    name: str
    body: str
    code: int = 0
    reasons: List[str] = dataclasses.field(default_factory=lambda: ["success"])
    detail: Optional[str] = None
    error: Optional[str] = None
    signal: int = 0
    at: str = CAPABILITIES
    hold: Optional[str] = None
    within_s: float = 30.0


CASES = [
    Case("normal end", "with connect(): pass"),
    Case(
        "exception",
        "with connect(): raise ValueError('oh')",
        code=1,
        reasons=["errored"],
        detail="ValueError",
        error="ValueError: oh",
    ),
    Case(
        "sys.exit",
        "with connect(): sys.exit(3)",
        code=3,
        reasons=["interrupted"],
        detail="SystemExit",
    ),
    Case("without close", "service = connect()", detail=UNCLOSED),
    Case(
        "exception without close",
        "service = connect()\nraise ValueError('oh')",
        code=1,
        reasons=["errored"],
        detail=UNCLOSED,
        error="ValueError: oh",
    ),
    Case("sys.exit without close", "service = connect()\nsys.exit(3)", code=3, detail=UNCLOSED),
    Case(
        "Ctrl-C without close",
        "service = connect()\nwait_for_ever(service)",
        code=-signal.SIGINT,
        reasons=["interrupted"],
        detail=UNCLOSED,
        error="KeyboardInterrupt",
        signal=signal.SIGINT,
    ),
    Case(
        "work outstanding, with a callback, without close",
        """
        service = connect()
        sampler = service.create_sampling_client(base_model="m")
        future = sampler.sample(PROMPT)
        future.add_done_callback(lambda f: print(type(f.exception()).__name__))
        """,
        detail=UNCLOSED,
        hold=POLL,
    ),
    Case(
        "dropped at the very end",
        """
        import warnings; warnings.simplefilter("ignore")
        service = connect()
        del service
        gc.collect()
        """,
    ),
    Case(
        "Ctrl-C while waiting",
        """
        with connect() as service:
            sample(service.create_sampling_client(base_model="m"))
        """,
        code=-signal.SIGINT,
        reasons=["interrupted"],
        detail="KeyboardInterrupt",
        error="KeyboardInterrupt",
        signal=signal.SIGINT,
        at=POLL,
        hold=POLL,
    ),
    Case(
        "Ctrl-C while creating",
        """
        with connect() as service:
            service.create_lora_training_client("m")
        """,
        code=-signal.SIGINT,
        reasons=["interrupted"],
        detail="KeyboardInterrupt",
        error="KeyboardInterrupt",
        signal=signal.SIGINT,
        at="POST /api/v1/create_model",
        hold="POST /api/v1/create_model",
    ),
    Case(
        "Ctrl-C while constructing, of a server that never answers",
        "connect()",
        code=-signal.SIGINT,
        reasons=[],
        error="KeyboardInterrupt",
        signal=signal.SIGINT,
        at=CREATE,
        hold=CREATE,
    ),
    Case(
        "Ctrl-C while closing",
        "connect().close()",
        code=-signal.SIGINT,
        reasons=["success"],
        error="KeyboardInterrupt",
        signal=signal.SIGINT,
        at=finish_route("s0"),
        hold=finish_route("s0"),
    ),
    Case(
        "Ctrl-C that is caught leaves the client usable",
        """
        with connect() as service:
            future = service.create_lora_training_client_future("m")
            try:
                future.result()
            except KeyboardInterrupt:
                assert not future.done()
                assert service.inflight()
                print(service)
        """,
        signal=signal.SIGINT,
        at=POLL,
        hold=POLL,
    ),
    # Python does nothing at all on SIGTERM: the server's TTL ends the session.
    Case(
        "SIGTERM",
        "with connect() as service: wait_for_ever(service)",
        code=-signal.SIGTERM,
        reasons=[],
        signal=signal.SIGTERM,
    ),
    Case(
        "SIGTERM turned into sys.exit",
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        with connect() as service: wait_for_ever(service)
        """,
        code=143,
        reasons=["interrupted"],
        detail="SystemExit",
        signal=signal.SIGTERM,
    ),
    Case(
        "a server that hangs at exit costs about two seconds, however many clients",
        "services = [connect() for _ in range(30)]",
        hold=finish_route("s0"),
        detail=UNCLOSED,
    ),
]


def run(case: Case, server: SessionServer, folder: Path) -> Ended:
    server.serve_work()
    never = threading.Event()
    if case.hold == finish_route("s0"):
        server.finish_answer = Answer(hold=never)
    elif case.hold is not None:
        server.on(case.hold, Answer(hold=never))
    script = Script(folder, case.body, server.url)
    if case.signal:
        server.wait_for(case.at)
        script.send(case.signal)
    try:
        return script.wait()
    finally:
        never.set()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_a_process_ends_its_session_in_whichever_way_it_ends(
    case: Case, server: SessionServer, tmp_path: Path
) -> None:
    ended = run(case, server, tmp_path)
    ended.assert_silent()
    assert ended.code == case.code
    if case.error is None:
        assert ended.err == ""
    else:
        assert last_line(ended.err) == case.error
    assert server.reasons() == case.reasons
    if case.detail is not None:
        assert server.details() == [case.detail]
    if case.reasons:
        server.assert_ended_once()
    assert ended.seconds < case.within_s


def test_the_session_of_every_client_left_open_ends(server: SessionServer, tmp_path: Path) -> None:
    ended = Script(tmp_path, "services = [connect() for _ in range(30)]", server.url).wait()
    assert (ended.code, ended.err) == (0, "")
    for number in range(30):
        assert server.reasons(f"s{number}") == ["success"]
        server.assert_ended_once(f"s{number}")


def test_the_warning_about_a_dropped_client_names_the_line_that_created_it(
    server: SessionServer, tmp_path: Path
) -> None:
    body = """
        service = connect()
        kept = service.create_sampling_client(base_model="m")
        del service
        gc.collect()
        print("still", sample(kept))
        del kept
        # Collected more than once: the thread that set the result may still hold the client.
        while not select.select([sys.stdin], [], [], 0.02)[0]:
            gc.collect()
    """
    server.serve_work()
    script = Script(tmp_path, body, server.url)
    server.wait_for(finish_route("s0"))  # while the process is still running: wait() closes stdin
    ended = script.wait()
    assert ended.out == "still [7]\n"  # a child keeps its session
    assert "ResourceWarning: unclosed ServiceClient of session s0" in ended.err
    line = line_of(script, r"return ServiceClient\(")
    assert f"opened at {script.path}:{line}; use `with ServiceClient(...)` or close()" in ended.err
    assert server.details() == ["the client was dropped"]
    server.assert_ended_once()


def test_the_embedded_server_of_a_client_left_open_stops_too(tmp_path: Path) -> None:
    pytest.importorskip("flask")
    body = """
        service = ServiceClient.local("deterministic")
        print(service._server.data_dir)
    """
    ended = Script(tmp_path, body, "").wait()
    assert (ended.code, ended.err) == (0, "")
    assert not Path(ended.out.strip()).exists()


def test_a_session_that_arrives_after_ctrl_c_is_ended(
    server: SessionServer, tmp_path: Path
) -> None:
    server.create_hold = threading.Event()
    script = Script(tmp_path, "print('constructing', flush=True)\nconnect()", server.url)
    server.wait_for(CREATE)
    script.send(signal.SIGINT)
    threading.Timer(0.3, server.create_hold.set).start()
    ended = script.wait()
    assert ended.code == -signal.SIGINT
    assert server.reasons() == ["interrupted"]
    assert server.beats() == []


def test_ctrl_c_returns_immediately_and_the_client_stays_usable(
    server: SessionServer, tmp_path: Path
) -> None:
    hold = threading.Event()
    server.serve_work(hold)
    body = """
        with connect() as service:
            sampler = service.create_sampling_client(base_model="m")
            future = sampler.sample(PROMPT)
            try:
                future.result()
            except KeyboardInterrupt:
                print("interrupted", flush=True)
            assert sample(sampler) == [7]
            print(future.result(50).sequences[0].tokens)  # it was not cancelled
    """
    script = Script(tmp_path, body, server.url)
    server.wait_for(POLL)
    script.send(signal.SIGINT)
    server.wait_for(
        POLL, 2
    )  # the second sample: result() has returned although no poll was answered
    hold.set()
    ended = script.wait()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "interrupted\n[7]\n"
    assert server.reasons() == ["success"]
