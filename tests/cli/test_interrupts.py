"""Ctrl-C ends every command that waits for a server: exit code 130, one line, no traceback."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Iterator, Set

import click
import pytest
from support.programs import STRICT, environment, interrupt, run, started
from support.scripted_server import Answer, Received, ScriptedServer

from tinkex.cli.main import cli, run_command
from tinkex.cli.signals import is_interrupt

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
