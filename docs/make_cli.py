"""Writes the reference of the command line into cli.md: ``python docs/make_cli.py``.

tests/cli/test_reference.py fails if it is out of date.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Iterator, Tuple

import click

from tinkex.cli.main import cli

PAGE = Path(__file__).with_name("cli.md")
BEGIN = "<!-- Written by docs/make_cli.py from here on. -->\n"

#: Options that the page explains once.
COMMON = ("--base-url", "--format", "--verbose", "--help")


def commands() -> Iterator[Tuple[click.Context, click.Command]]:
    """Yield every command, but not the groups, in alphabetical order."""
    yield from _leaves(click.Context(cli, info_name="tinkex"), cli)


def _leaves(
    context: click.Context, command: click.Command
) -> Iterator[Tuple[click.Context, click.Command]]:
    if not isinstance(command, click.Group):
        yield context, command
        return
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        assert inner is not None
        yield from _leaves(click.Context(inner, parent=context, info_name=name), inner)


def reference() -> str:
    """Return the reference of all commands, in Markdown."""
    return "\n".join(_section(context, command) for context, command in commands())


def _section(context: click.Context, command: click.Command) -> str:
    arguments = [_argument(p) for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join([context.command_path, *arguments])
    lines = [f"### `{usage}`", "", _markdown(inspect.cleandoc(command.help or "")), ""]
    own, common = [], []
    for option in command.params:
        if not isinstance(option, click.Option) or option.hidden:
            continue
        if any(name in COMMON for name in option.opts):
            common.append(f"`{max(option.opts, key=len)}`")
        else:
            own.append(f"| `{_cell(_names(option))}` | {_cell(_markdown(_help(option)))} |")
    if own:
        lines += ["| option | |", "| --- | --- |", *own, ""]
    if common:
        lines += [f"And {', '.join(common)}.", ""]
    return "\n".join(lines)


# We don't use click's own texts, because they differ from release to release.


def _argument(argument: click.Argument) -> str:
    if argument.metavar is not None:
        return argument.metavar
    name = str(argument.name).upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _names(option: click.Option) -> str:
    names = ", ".join(sorted([*option.opts, *option.secondary_opts], key=len))
    if option.is_flag:
        return names
    if option.metavar is not None:
        return f"{names} {option.metavar}"
    if isinstance(option.type, click.Choice):
        return f"{names} [{'|'.join(map(str, option.type.choices))}]"
    return f"{names} {option.type.name.split()[0].upper()}"


def _help(option: click.Option) -> str:
    has_default = option.show_default and option.default is not None and not option.is_flag
    return f"{option.help} Default: {option.default}." if has_default else str(option.help)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _markdown(text: str) -> str:
    """Return *text* with characters escaped that Markdown would take for HTML."""
    return text.replace("<", "&lt;")


def page() -> str:
    """Return the page with an up-to-date reference."""
    written, mark, _ = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    assert mark, f"{PAGE} has lost its mark"
    return f"{written}{BEGIN}\n{reference()}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
