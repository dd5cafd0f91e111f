"""Terminals, pipes and files that commands read from and write to."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Iterator, List

import click
import pytest
from support.programs import PATIENCE_S, STRICT, Server, environment, run, tinkex
from support.scripted_server import Answer, Received, ScriptedServer

import tinkex as library
from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.cli import status_line
from tinkex.cli.commands import error_in_flags, in_flags
from tinkex.cli.deletions import delete
from tinkex.cli.main import run_command
from tinkex.cli.sample import sample
from tinkex.cli.serve import serve
from tinkex.cli.terminal import visible
from tinkex.cli.training_progress import TrainingProgress
from tinkex.cli.transfers import download
from tinkex.errors import InvalidInputError
from tinkex.testing import FakeServer, faults

CAPABILITIES = "GET /api/v1/get_server_capabilities"
#: No Windows code page has all of these characters.
FOREIGN = "🙂 Ѧ 漢 \u202f"


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        running.on(CAPABILITIES, Answer(body={"supported_models": [{"model_name": FOREIGN}]}))
        yield running


# Encodings


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "gbk", "latin-1", "ascii", "utf-8"])
def test_output_does_not_fail_because_of_the_terminals_encoding(scripted, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    monkeypatch.delenv("PYTHONUTF8", raising=False)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")  # so that the test can read it
    command = [sys.executable, *STRICT, "-m", "tinkex", "model", "list"]
    env = environment(scripted.url)
    table = subprocess.run(command, env=env, capture_output=True, timeout=PATIENCE_S)
    assert (table.returncode, table.stderr) == (0, b"")
    assert FOREIGN.encode(encoding, "backslashreplace") in table.stdout
    command += ["-f", "json"]
    listed = subprocess.run(command, env=env, capture_output=True, timeout=PATIENCE_S)
    assert (listed.returncode, listed.stderr) == (0, b"")
    (model,) = json.loads(listed.stdout.decode(encoding))["models"]
    assert model["model_name"] == FOREIGN


def test_errors_do_not_fail_because_of_the_terminals_encoding(scripted, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    done = run(["-m", "tinkex", "model", "list", "llama"], scripted.url)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: the server offers no model whose name contains 'llama'")
    assert "\\U0001f642" in done.stderr


@pytest.mark.parametrize("arguments", [["sample", b"\xff\xfe"], ["sample", "-"]], ids=str)
def test_a_prompt_that_is_not_text_is_one_clear_error(scripted, arguments):
    done = subprocess.run(
        [sys.executable, *STRICT, "-m", "tinkex", *arguments],
        env=environment(scripted.url),
        input=b"\xff\xfe",
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(b"Error: the input is not valid text: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_server_cannot_send_control_sequences_to_the_terminal(scripted):
    name = "model\x1b]0;title\x07\nname\x9b31m"
    scripted.on(CAPABILITIES, Answer(body={"supported_models": [{"model_name": name}]}))
    table = tinkex("model", "list", base_url=scripted.url)
    assert r"model\x1b]0;title\x07\nname\x9b31m  -" in table.stdout
    scripted.on(CAPABILITIES, Answer(400, {"detail": "bad\x1b[31m"}))
    assert r"bad\x1b[31m" in tinkex("model", "list", base_url=scripted.url).stderr
    assert visible("a\tb\nc\rd") == "a\tb\nc\\rd"


# Output that cannot be written


def test_wrong_usage_is_not_reported_on_stdout_if_stderr_is_closed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command(["model", "lst"]) == 2
    assert capsys.readouterr().out == ""


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """The writing end of a pipe without a reader."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.fixture
def full_disk() -> Iterator[int]:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


COMMANDS = [["--help"], ["run", "list", "--help"], ["--version"], ["version"], ["model", "list"]]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    ("target", "reason"),
    [("closed_pipe", "Broken pipe"), ("full_disk", "No space left on device")],
)
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_output_that_cannot_be_written_is_one_line(
    scripted, request, arguments, target, reason, unbuffered
):
    done = subprocess.run(
        [sys.executable, *STRICT, "-m", "tinkex", *arguments],
        env={**environment(scripted.url), "PYTHONUNBUFFERED": unbuffered},
        stdout=request.getfixturevalue(target),
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    assert done.stderr == f"Error: cannot write the output: {reason}\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["frobnicate"], 2), (["model", "list", "llama"], 1), (["model", "list"], 0)],
    ids=str,
)
def test_the_exit_code_is_right_although_stderr_cannot_be_written(
    scripted, full_disk, arguments, code
):
    done = subprocess.run(
        [sys.executable, *STRICT, "-m", "tinkex", *arguments],
        env=environment(scripted.url),
        stdout=subprocess.PIPE,
        stderr=full_disk,
        timeout=PATIENCE_S,
    )
    assert done.returncode == code


def test_a_file_that_cannot_be_written_is_named(scripted, tmp_path):
    scripted.on("GET /api/v1/billing/usage/checkpoints/current", Answer(body={"data": []}))
    path = tmp_path / "missing" / "x.csv"
    done = tinkex("billing", "checkpoint-storage", "--csv", str(path), base_url=scripted.url)
    assert done.returncode == 1
    assert done.stderr == f"Error: {path}: No such file or directory\n"


# Questions


def test_a_key_is_read_from_a_pipe_without_a_warning(scripted, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run(["-m", "tinkex", "auth", "login"], scripted.url, stdin="tml-secret-1\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert scripted.requests(CAPABILITIES)[0].headers["x-api-key"] == "tml-secret-1"
    assert "tml-secret-1" in (tmp_path / ".tinker" / "credentials.json").read_text()


def test_the_end_of_input_at_a_prompt_is_an_error_and_not_an_interrupt(
    server: Server, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    login = run(["-m", "tinkex", "auth", "login"], server.url)
    assert login.returncode == 1
    assert login.stderr == "Error: no API key was given: type it, or pipe it to stdin\n"
    path = "tinker://run/weights/a"
    deletion = run(["-m", "tinkex", "checkpoint", "delete", path], server.url)
    assert deletion.returncode == 1
    assert deletion.stderr.splitlines()[-1] == (
        "Error: the input ended before a reply; nothing was deleted (-y deletes without asking)"
    )


def test_the_question_is_repeated_after_an_answer_that_is_neither_yes_nor_no(scripted):
    path = "tinker://run/weights/a"
    done = tinkex("checkpoint", "delete", path, base_url=scripted.url, stdin="maybe\n\n")
    assert done.returncode == 1
    assert done.stderr.count("[y/N]") == 2
    assert scripted.requests() == []


# What is waited for


class Stderr(io.StringIO):
    """Sets `written` once *text* has been written to it."""

    def __init__(self, text: str, *, terminal: bool) -> None:
        super().__init__()
        self._text = text
        self._terminal = terminal
        self.written = threading.Event()

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        count = super().write(text)
        if self._text in self.getvalue():
            self.written.set()
        return count


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.delenv("TINKEX_NO_STATUS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(status_line, "FIRST_S", 0.01)


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_a_command_shows_what_it_waits_for(scripted, soon, monkeypatch, capsys, terminal):
    where = scripted.url.partition("//")[2]
    stderr = Stderr(f"waiting for {where} (", terminal=terminal)

    def late(received: Received) -> Answer:
        assert stderr.written.wait(PATIENCE_S)
        return Answer(body={"supported_models": []})

    scripted.on(CAPABILITIES, late)
    monkeypatch.setattr("sys.stderr", stderr)
    assert run_command(["model", "list", "--base-url", scripted.url]) == 0
    assert capsys.readouterr().out.startswith("0 models")
    said = stderr.getvalue()
    if terminal:
        assert said.endswith(" \r"), "erased before the table is printed"
        assert "\n" not in said
    else:
        assert re.fullmatch(rf"waiting for {where} \(\d s\)", said.splitlines()[0])
        assert "\r" not in said


def test_a_command_shows_why_it_retries(soon, monkeypatch):
    stderr = Stderr("Connection refused; attempt 1", terminal=False)
    monkeypatch.setattr("sys.stderr", stderr)
    with status_line.shown("working"):
        log = logging.getLogger("tinkex._transport.attempts")
        log.debug("cannot reach h:1: Connection refused; attempt %d, next in %.1f s", 1, 2.0)
        assert stderr.written.wait(PATIENCE_S)


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_training_shows_that_its_server_is_gone_until_a_step_succeeds(soon, monkeypatch, terminal):
    server = FakeServer()
    server.start()
    stderr = Stderr(f"waiting for the server at {server.url[7:]}; start it", terminal=terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    with (
        click.Context(click.Command("train")) as ctx,
        status_line.shown("train: working") as line,
        library.ServiceClient(base_url=server.url, api_key="tml-1") as service,
    ):
        ctx.obj = line
        trainer = service.create_lora_training_client("deterministic")
        held = server.inject("retrieve_future", faults.Hold(), times=None)
        with TrainingProgress(4, 0) as progress:
            progress.log(0, {"loss": 3.0, "heldout_loss": 2.0})
            future = trainer.optim_step(library.AdamParams())
            held.wait()
            server.close()
            assert stderr.written.wait(PATIENCE_S)
            shown = stderr.getvalue().rpartition("waiting for the server")
            assert "step 1/4" in shown[0] or terminal
            progress.log(1, {"loss": 2.0, "heldout_loss": 1.0})
            assert line.doing == ""
        future.cancel()


def test_warnings_are_printed_above_the_status_line(soon, monkeypatch):
    stderr = Stderr("working (", terminal=True)
    monkeypatch.setattr("sys.stderr", stderr)
    with status_line.shown("working"):
        assert stderr.written.wait(PATIENCE_S)
        logging.getLogger("tinkex.sessions").warning("the server is slow")
        with status_line.hidden():
            pass
    assert re.search(r"working \(\d s\)\r {13}\rthe server is slow\n", stderr.getvalue())


def test_warnings_are_printed_if_no_status_is_shown(monkeypatch):
    monkeypatch.setenv("TINKEX_NO_STATUS", "1")
    stderr = Stderr("", terminal=True)
    monkeypatch.setattr("sys.stderr", stderr)
    with status_line.shown("working"):
        logging.getLogger("tinkex.sessions").warning("the server is slow")
    assert stderr.getvalue() == "the server is slow\n"


# The library's settings, as options


def context(command: click.Command, arguments: List[str]) -> click.Context:
    return command.make_context(command.name, arguments)


PATH = "tinker://run/weights/a"


OVERWRITE = Setting("overwrite", True)
BASE_URL = Setting("base_url")
API_KEY = Setting("api_key", ..., aside=" (or {})")


@pytest.mark.parametrize(
    ("command", "arguments", "parts", "said"),
    [
        (download, [PATH], ("another folder, or ", OVERWRITE, "."), "another folder, or --force."),
        (sample, ["hi"], (Setting("max_tokens"), " is 0"), "--max-tokens is 0"),
        (sample, ["hi"], (Setting("top_p", 2.0), " and stop words"), "--top-p 2.0 and stop words"),
        (sample, ["hi"], ("Is ", BASE_URL, " right?"), "Is --base-url right?"),
        (sample, ["hi"], ("set X", API_KEY, " or log in"), "set X or log in"),
        (serve, [], ("set X", API_KEY, " or log in"), "set X (or --api-key) or log in"),
        (serve, [], ("with ", Setting("data_dir", ...)), "with --data-dir"),
        (serve, [], ("Use ", Setting("device", "cpu"), "."), "Use --device cpu."),
        (delete, [PATH], (OVERWRITE, " or ", Setting("seed")), "overwrite=True or seed"),
        (sample, ["hi"], ("runs/seed=1, ", "max_tokens=2"), "runs/seed=1, max_tokens=2"),
    ],
)  # fmt: skip
def test_errors_in_a_command_name_options(command, arguments, parts, said, monkeypatch):
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    shown = context(command, arguments)
    assert in_flags(ErrorText(*parts), shown) == said
    extended = ErrorText("seed=1: ", ErrorText(*parts))
    assert in_flags(extended, shown) == f"seed=1: {said}"
    error = InvalidInputError("seed=1", hint=ErrorText(*parts), request_id="r1")
    assert (
        error_in_flags(pickle.loads(pickle.dumps(error)), shown) == f"seed=1 (request r1)\n  {said}"
    )


def test_errors_name_arguments_in_a_program():
    assert ErrorText("give ", Setting("port", ...)) == "give port=..."
    assert ErrorText(Setting("name", "x"), " or ", OVERWRITE) == "name='x' or overwrite=True"
    assert ErrorText("set X", API_KEY, " or log in") == "set X (or api_key=...) or log in"


def test_errors_name_the_variable_that_named_the_server(monkeypatch):
    monkeypatch.setenv("TINKER_BASE_URL", "nonsense")
    text = ErrorText(BASE_URL, " 'x'")
    assert in_flags(text, context(sample, ["hi"])) == "TINKER_BASE_URL 'x'"
    assert in_flags(text, context(sample, ["hi", "--base-url", "x"])) == "--base-url 'x'"


def test_wrong_numbers_are_wrong_usage(scripted):
    for option in ("--max-tokens", "--num-samples"):
        done = tinkex("sample", "hi", option, "0", base_url=scripted.url)
        assert done.returncode == 2
        assert option in done.stderr
    assert tinkex("run", "list", "--limit", "-3", base_url=scripted.url).returncode == 2
    assert scripted.requests() == []


def test_a_wrong_path_says_where_paths_are_found(scripted, tmp_path: Path):
    for command in (["info"], ["publish"], ["set-ttl", "--remove"], ["download"], ["delete"]):
        done = tinkex("checkpoint", *command, "nonsense", base_url=scripted.url)
        assert done.returncode == 1
        assert "tinkex checkpoint list" in done.stderr
        assert "save_state" not in done.stderr
    assert scripted.requests() == []


def test_a_command_leaves_the_settings_of_the_library_unchanged(scripted):
    level = logging.getLogger("tinkex._transport.attempts").level
    tinkex("model", "list", base_url=scripted.url)
    assert logging.getLogger("tinkex._transport.attempts").level == level
    assert logging.getLogger("tinkex").handlers == []
    assert library.__version__


LOSE_ONE = """
from tinkex.cli.signals import raise_lost_interrupts

class Loser:
    def __del__(self):
        raise KeyboardInterrupt

raise_lost_interrupts()
try:
    Loser()
    while True:
        pass
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_that_python_ignores_is_raised_again():
    done = run(["-c", LOSE_ONE])
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
