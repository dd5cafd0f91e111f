"""Every table, on narrow terminals and in a pipe: no id and no path is wrapped or decorated."""

from __future__ import annotations

import contextlib
import io
import json
import os
from typing import Dict, Iterator, List
from unittest import mock

import pytest
from support.programs import Server, environment, tinkex
from support.scripted_server import Answer, ScriptedServer
from support.threads import wait_until

from tinkex import ServiceClient
from tinkex.cli.main import run_command

LONG = "meta-llama/Llama-3.3-70B-Instruct-with-a-name-that-is-longer-than-a-terminal"
SESSION = "0a1b2c3d-4e5f-6789-abcd-ef0123456789"
EVENT = {
    "bucket_start": "2026-01-31T15:00:00Z",
    "bucket_end": "2026-01-31T16:00:00Z",
    "event_info": {"type": "sampling_prefill", "token_count": 12},
    "base_model": LONG,
    "session_id": SESSION,
    "estimated_cost_usd": 1.5,
}
STORED = {
    "project_id": f"project-{SESSION}",
    "user_email": f"{'somebody' * 9}@example.org",
    "checkpoint_count": 3,
    "size_bytes": 2**31,
    "size_gigabytes": 2.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def billed() -> Iterator[ScriptedServer]:
    """A server with accounts, which the embedded server lacks."""
    with ScriptedServer() as server:
        usage = {"data": [EVENT], "sessions": {}}
        server.on("GET /api/v1/billing/usage/events", Answer(body=usage))
        route = "GET /api/v1/billing/usage/checkpoints/current"
        server.on(route, Answer(body={"data": [STORED]}))
        models = {"supported_models": [{"model_name": LONG}, {"model_name": "b"}]}
        server.on("GET /api/v1/get_server_capabilities", Answer(body=models))
        yield server


def on_terminal(arguments: List[str], base_url: str, columns: int) -> str:
    """Return what a command prints on a terminal with that many columns."""
    terminal = Terminal()
    variables = {**environment(base_url), "COLUMNS": str(columns), "TERM": "xterm-256color"}
    with (
        mock.patch.dict(os.environ, variables, clear=True),
        contextlib.redirect_stdout(terminal),
    ):
        assert run_command(arguments) == 0
    return terminal.getvalue()


def assert_whole(arguments: List[str], base_url: str, *names: str) -> None:
    """Check that each of *names*, which users may want to copy, is a whole word of the output."""
    piped = tinkex(*arguments, base_url=base_url)
    assert (piped.returncode, piped.stderr) == (0, "")
    outputs: Dict[str, str] = {"pipe": piped.stdout}
    outputs.update({str(n): on_terminal(arguments, base_url, n) for n in (20, 80, 300)})
    for where, text in outputs.items():
        words = {word for line in text.splitlines() for word in line.split()}
        assert set(names) <= words, f"{arguments} {where}: {text}"
        assert "\x1b" not in text
        assert "\u2026" not in text
    json.loads(tinkex(*arguments, "-f", "json", base_url=base_url).stdout)


def run_of(path: str) -> str:
    return path.partition("//")[2].partition("/")[0]


def session_of(path: str) -> str:
    return run_of(path).partition(":")[0]


def test_the_lists(server: Server, saved: str):
    assert_whole(["run", "list"], server.url, run_of(saved))
    assert_whole(["checkpoint", "list"], server.url, saved)
    assert_whole(["checkpoint", "list", "--run-id", run_of(saved)], server.url, saved)
    assert_whole(["session", "list"], server.url, session_of(saved))
    columns = "id,model,owner,lora,updated,status,checkpoint,checkpoint_time"
    assert_whole(["run", "list", "-c", columns], server.url, run_of(saved))


def test_facts_about_one_thing(server: Server, saved: str):
    assert_whole(["run", "info", run_of(saved)], server.url, run_of(saved), saved)
    assert_whole(["session", "info", session_of(saved)], server.url, session_of(saved))
    assert_whole(["checkpoint", "info", saved], server.url, saved)


def test_a_download(server: Server, saved: str, tmp_path):
    command = ["checkpoint", "download", saved, "--force", "-o", str(tmp_path)]
    assert_whole(command, server.url, saved)


def test_the_models(billed: ScriptedServer):
    assert_whole(["model", "list"], billed.url, LONG)


def test_the_bills(billed: ScriptedServer):
    assert_whole(["billing", "usage", "2026-01-31", "2026-02-01"], billed.url, LONG, SESSION)
    names = str(STORED["project_id"]), str(STORED["user_email"])
    assert_whole(["billing", "checkpoint-storage"], billed.url, *names)


def test_the_work_in_flight(server: Server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with ServiceClient(base_url=server.url) as service:
        wait_until(lambda: list((tmp_path / "tinkex").glob("*.json")) != [], "it is written")
        assert_whole(["status"], server.url, service.session_id)
