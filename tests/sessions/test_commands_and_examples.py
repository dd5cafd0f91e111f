"""Commands and examples end their session, in whichever way they end.

tests/examples tests their work, and that they leave no live session on the embedded server.
"""

from __future__ import annotations

import ast
import signal
import threading
from pathlib import Path
from typing import Any, Dict

import pytest
from sessions.processes import Script
from support.scripted_server import Answer
from support.session_server import CREATE, SessionServer

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))

#: Command line -> the route that it requests, and a valid answer.
RUN: Dict[str, Any] = {"training_run_id": "r", "base_model": "m", "model_owner": "me"}
RUN.update(is_lora=True, last_request_time="2026-01-01T00:00:00Z")
COMMANDS = {
    "run list": ("GET /api/v1/training_runs", {"training_runs": []}),
    "run info r": ("GET /api/v1/training_runs/r", RUN),
    "checkpoint list": ("GET /api/v1/checkpoints", {"checkpoints": []}),
    "checkpoint delete --yes tinker://r/weights/a": (
        "DELETE /api/v1/training_runs/r/checkpoints/weights/a",
        {},
    ),
    "sample hello": ("GET /api/v1/get_server_capabilities", None),
}


#: The commands that use a session; the others only read, and open none.
IN_A_SESSION = {"sample hello"}


def assert_session(line: str, server: SessionServer, reason: str) -> None:
    """Check that a command's session has ended once, for *reason*, or that it opened none."""
    expected = [reason] if line in IN_A_SESSION else []
    assert server.created == len(expected)
    if expected:
        assert server.reasons() == expected
        server.assert_ended_once()


def command(line: str, server: SessionServer, folder: Path) -> Script:
    arguments = ["tinkex", *line.split(), "--base-url", server.url]
    body = f"sys.argv = {arguments!r}\nfrom tinkex.cli.main import main\nmain()\n"
    return Script(folder, body, "")


@pytest.mark.parametrize("line", [line for line, (_, body) in COMMANDS.items() if body is not None])
def test_a_command_that_succeeds_is_silent(
    line: str, server: SessionServer, tmp_path: Path
) -> None:
    route, body = COMMANDS[line]
    server.on(route, Answer(body=body))
    ended = command(line, server, tmp_path).wait()
    assert (ended.code, ended.err) == (0, "")
    assert_session(line, server, "success")


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_that_fails_ends_its_session(
    line: str, server: SessionServer, tmp_path: Path
) -> None:
    server.on(COMMANDS[line][0], Answer(400, {"detail": "not like this"}))
    ended = command(line, server, tmp_path).wait()
    assert ended.code == 1
    assert "not like this" in ended.err + ended.out
    assert "Traceback" not in ended.err
    assert "Warning" not in ended.err
    assert_session(line, server, "errored")


@pytest.mark.parametrize("line", COMMANDS)
def test_ctrl_c_ends_the_session_of_a_command(
    line: str, server: SessionServer, tmp_path: Path
) -> None:
    never = threading.Event()
    route = COMMANDS[line][0]
    server.on(route, Answer(hold=never))
    script = command(line, server, tmp_path)
    server.wait_for(route)
    script.send(signal.SIGINT)
    ended = script.wait()
    never.set()
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert_session(line, server, "interrupted")
    assert ended.seconds < 30


#: The calls that open a client in an example; `connect` is the example's own function.
OPENERS = {"connect", "tinkex.ServiceClient", "tinkex.ServiceClient.local"}
#: The clients in the examples about several servers.
SEVERAL = {"move_run.py": 2, "two_services.py": 2}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_opens_its_service_in_a_with_statement(example: Path) -> None:
    tree = ast.parse(example.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "connect":
            node.body = []
    calls = {
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in OPENERS
    }
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
    in_with = {item.context_expr for node in statements for item in node.items}
    assert calls <= in_with
    assert len(calls) == SEVERAL.get(example.name, 1)


def run_probe(server_url: str, folder: Path) -> Any:
    probe = next(path for path in EXAMPLES if path.name == "heartbeat_probe.py")
    environment = {"TINKER_BASE_URL": server_url} if server_url else {}
    body = f"import runpy\nrunpy.run_path({str(probe)!r}, run_name='__main__')\n"
    return Script(folder, body, "", **environment).wait()


def test_the_heartbeat_probe_shows_the_right_path_and_the_wrong_ones(tmp_path: Path) -> None:
    pytest.importorskip("flask")
    ended = run_probe("", tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert [line.split()[1:] for line in ended.out.splitlines()] == [
        ["/api/v1/session_heartbeat", "200"],
        ["/api/v1/heartbeat", "404"],
        ["/api/v1/session/heartbeat", "404"],
    ]


def test_the_heartbeat_probe_of_a_given_server_ends_its_session(
    server: SessionServer, tmp_path: Path
) -> None:
    ended = run_probe(server.url, tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert len(server.requests(CREATE)) == 1
    assert server.reasons() == ["success"]


def test_the_heartbeat_probe_fails_if_the_path_is_wrong(
    server: SessionServer, tmp_path: Path
) -> None:
    server.on("POST /api/v1/session_heartbeat", Answer(404))
    server.on("POST /api/v1/heartbeat", Answer())
    ended = run_probe(server.url, tmp_path)
    assert ended.code == 1
    assert "/api/v1/session_heartbeat responded with 404, not 200" in ended.err
    assert server.reasons() == ["interrupted"]


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md"])
def test_the_documentation_describes_heartbeats_and_teardown(document: str) -> None:
    text = (EXAMPLES[0].parents[1] / document).read_text(encoding="utf-8").lower()
    assert "heartbeat" in text
    assert "session" in text
