"""Every `tinkex ...` line in the documentation is a command with options that exist."""

from __future__ import annotations

import re
import shlex
from typing import Iterator, List, Tuple

import click
import pytest
from support.pages import read_pages

from tinkex.cli.main import cli


def command_lines() -> Iterator[Tuple[str, str]]:
    """Yield the place and the text of each command, without its prompt and from any pipe on."""
    for page in read_pages():
        for block in page.of("sh", "console", "bash"):
            text = block.code.replace("\\\n", "  ")
            for line in re.findall(r"^(?:\$ )?(?:.* [|&] )?(tinkex .*)$", text, re.M):
                yield f"{page.name}:{block.line}", line
        for span in re.findall(r"`(tinkex [a-z][^`]*)`", page.path.read_text(encoding="utf-8")):
            if not span.endswith("...") and page.name != "docs/cli.md":
                yield page.name, " ".join(span.split())


def words(line: str) -> List[str]:
    shell = shlex.shlex(line, posix=True, punctuation_chars="|&>;")
    shell.whitespace_split = True
    parsed = list(shell)
    ends = [index for index, word in enumerate(parsed) if set(word) <= set("|&>;")]
    return parsed[: min(ends, default=len(parsed))]


def check(arguments: List[str]) -> None:
    """Raise UsageError if the command or one of its options does not exist."""
    command: click.Command = cli
    context = click.Context(cli, info_name="tinkex")
    while True:
        values, rest, _ = command.make_parser(context).parse_args(list(arguments))
        for parameter in command.params:
            value = values.get(parameter.name)
            kinds = (click.Choice, click.types.IntParamType, click.types.FloatParamType)
            if isinstance(value, str) and isinstance(parameter.type, kinds):
                parameter.type.convert(value, parameter, context)
        if not isinstance(command, click.Group):
            if rest:
                raise click.UsageError(f"too many arguments: {rest}")
            return
        if not rest:
            return
        name, *arguments = rest
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"no such command: {name}")
        command, context = found, click.Context(found, parent=context, info_name=name)


@pytest.mark.parametrize(("where", "line"), sorted(set(command_lines())))
def test_a_command_in_the_documentation_exists(where: str, line: str) -> None:
    check(words(line)[1:])


@pytest.mark.parametrize(
    "line", ["tinkex trian", "tinkex train --modle x", "tinkex train x y", "tinkex serve --port a"]
)
def test_a_command_that_does_not_exist_is_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        check(words(line)[1:])
