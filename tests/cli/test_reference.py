"""docs/cli.md names every command and option, and completion works as described there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import click
from support.programs import PATIENCE_S, REPOSITORY, environment

SCRIPT = REPOSITORY / "docs" / "make_cli.py"
spec = importlib.util.spec_from_file_location("make_cli", SCRIPT)
assert spec is not None
assert spec.loader is not None
make_cli = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_cli)


def test_the_reference_is_up_to_date():
    written = make_cli.PAGE.read_text(encoding="utf-8")
    assert written == make_cli.page(), "run `python docs/make_cli.py`"


def test_every_command_and_option_is_explained():
    written = make_cli.PAGE.read_text(encoding="utf-8")
    for context, command in make_cli.commands():
        assert f"### `{context.command_path}" in written
        assert command.help, context.command_path
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{context.command_path} {option.opts}"
                assert all(name in written for name in option.opts)


def complete(words: str) -> str:
    """Return the completions that bash would get for the last of *words*."""
    count = len(words.split(" ")) - 1
    return subprocess.run(
        [sys.executable, "-c", "from tinkex.cli.main import cli; cli(prog_name='tinkex')"],
        env={
            **environment(None),
            "_TINKEX_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(count),
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    ).stdout


def test_commands_and_options_are_completed():
    assert "plain,doctor" in complete("tinkex do").splitlines()
    assert "plain,download" in complete("tinkex checkpoint dow").splitlines()
    assert "plain,--base-url" in complete("tinkex doctor --ba").splitlines()
