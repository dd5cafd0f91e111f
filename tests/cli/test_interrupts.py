"""Ctrl-C ends every command that waits for a server: exit code 130, one line, no traceback."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import threading
from typing import Any, Callable, Dict, Iterator, List, Set

import click
import pytest
from support.programs import STRICT, environment, interrupt, run, started
from support.scripted_server import Answer, Received, ScriptedServer

from tinkex.cli.main import cli, run_command
from tinkex.cli.signals import is_interrupt
from tinkex.cli.train import _add_remedy
from tinkex.errors import SessionLostError

PATH = "tinker://run/weights/a"

#: Each command that sends requests, with arguments.
COMMANDS = {
    "auth login": "",
    "auth logout": "",
    "auth status": "",
    "auth whoami": "",
    "billing checkpoint-storage": "",
    "billing usage": "2026-01-01 2026-01-02",
    "chat": "",
    "checkpoint delete": f"{PATH} -y",
    "checkpoint download": PATH,
    "checkpoint info": PATH,
    "checkpoint list": "",
    "checkpoint publish": PATH,
    "checkpoint push-hf": f"{PATH} -r me/model",
    "checkpoint set-ttl": f"{PATH} --ttl 3600",
    "checkpoint unpublish": PATH,
    "doctor": "",
    "model list": "",
    "run info": "run",
    "run list": "",
    "sample": "hello",
    "session export-trace": "s-1",
    "session info": "s-1",
    "session list": "",
}
#: Commands with tests of their own, or that never wait.
ELSEWHERE = {"data show", "serve", "status", "version", "train", "export"}
#: Commands that send nothing here, because no key is stored or typed.
SILENT = {"auth logout", "auth login"}


class DeafServer(ScriptedServer):
    """Accepts every request, and answers none."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def respond(self, received: Received) -> Answer:
        super().respond(received)
        self.asked.set()
        return Answer(hold=threading.Event())


@pytest.fixture
def deaf(tmp_path, monkeypatch) -> Iterator[DeafServer]:
    monkeypatch.setenv("HOME", str(tmp_path))
    with DeafServer() as server:
        yield server


IMPORTING = """
import sys
from importlib.abc import MetaPathFinder

class Interrupt(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "click":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
from tinkex.__main__ import main
main()
"""


def names(group: click.Group, prefix: str = "") -> Set[str]:
    found: Set[str] = set()
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        is_group = isinstance(command, click.Group)
        found |= names(command, f"{prefix}{name} ") if is_group else {prefix + name}
    return found


def test_no_command_is_left_out():
    assert names(cli) <= COMMANDS.keys() | ELSEWHERE


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - SILENT))
def test_ctrl_c_ends_a_command_that_waits(name: str, deaf: DeafServer):
    if name == "checkpoint push-hf":
        pytest.importorskip("huggingface_hub")
    key = "from os import environ as e; e['TINKER_API_KEY'] = 'tml-1'; "
    code = f"{key}from tinkex.cli.main import main; main()"
    with started(["-c", code, *name.split(), *COMMANDS[name].split()], deaf.url) as process:
        assert deaf.asked.wait(60)
        done = interrupt(process)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_login_while_the_key_is_checked(deaf: DeafServer):
    process = subprocess.Popen(
        [sys.executable, *STRICT, "-m", "tinkex", "auth", "login"],
        env=environment(deaf.url),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin is not None
        process.stdin.write("tml-secret\n")
        process.stdin.close()
        process.stdin = None
        assert deaf.asked.wait(60)
        done = interrupt(process)
    finally:
        process.kill()
        process.wait()
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert "tml-secret" not in done.stdout + done.stderr


def test_an_error_caused_by_an_interrupt_counts_as_the_interrupt(monkeypatch, capsys):
    def fail(*args: object, **options: object) -> None:
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as error:
                raise ImportError("Could not import module 'LlamaConfig'") from error
        except ImportError as error:
            raise click.ClickException("cannot load the model") from error

    monkeypatch.setattr(cli, "main", fail)
    assert run_command([]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_an_error_with_a_cycle_of_causes_is_no_interrupt():
    error, cause = click.ClickException("no such model"), ValueError()
    error.__cause__, cause.__context__ = cause, error
    assert not is_interrupt(error)


def test_ctrl_c_ends_a_command_during_its_imports():
    done = run(["-c", IMPORTING])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


class Keyboard(io.StringIO):
    """A terminal's input; where the text ends, Ctrl-C is pressed."""

    def isatty(self) -> bool:
        return True

    def readline(self, size: Any = -1) -> str:
        line = super().readline()
        if not line:
            raise KeyboardInterrupt
        return line


class Interrupted:
    """Stands for a Generator; Ctrl-C is pressed after one piece of the first reply."""

    tokenizer = None

    def __init__(self) -> None:
        self.asked: List[List[Dict[str, str]]] = []
        self.closed = False

    def chat_tokens(self, messages: List[Dict[str, str]], advice: str) -> List[int]:
        self.asked.append(list(messages))
        return [1]

    def fitting(self, params: Any, prompt_tokens: int) -> Any:
        return params

    def pieces(self, tokens: List[int], params: Any) -> Iterator[str]:
        try:
            yield "one "
            if len(self.asked) == 1:
                raise KeyboardInterrupt
            yield "two"
        finally:
            self.closed = True


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Callable[[io.StringIO, Interrupted], int]:
    def run_with(stdin: io.StringIO, generator: Interrupted) -> int:
        monkeypatch.setattr("sys.stdin", stdin)
        opened = contextlib.nullcontext(generator)
        monkeypatch.setattr("tinkex.cli.chat.open_generator", lambda ctx: opened)
        return run_command(["chat"])

    return run_with


def test_ctrl_c_stops_a_reply_and_at_the_prompt_it_ends_the_chat(chat, capsys):
    generator = Interrupted()
    assert chat(Keyboard("a\nb\n"), generator) == 130
    read = capsys.readouterr()
    assert "one two\n" in read.out
    assert "Stopped." in read.err
    first = [{"role": "user", "content": "a"}]
    kept = {"role": "assistant", "content": "one "}
    assert generator.asked == [first, [*first, kept, {"role": "user", "content": "b"}]]
    assert generator.closed


def test_ctrl_c_ends_a_chat_whose_messages_are_piped_in(chat):
    generator = Interrupted()
    assert chat(io.StringIO("a\nb\n"), generator) == 130
    assert len(generator.asked) == 1


def test_a_command_ends_without_a_last_collection_of_all_objects():
    code = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); "
        "from tinkex.cli.main import main; main()"
    )
    assert run(["-c", code, "version"]).stdout.splitlines()[-1] == "True"


def test_a_run_whose_session_was_lost_has_one_remedy():
    error = SessionLostError("session s was lost", hint="Run the command again.")
    _add_remedy(error)
    assert error.hint == "The run continues when the command is run again."
