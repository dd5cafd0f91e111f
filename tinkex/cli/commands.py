"""The base classes of all commands and groups of ``tinkex``.  No threads of their own.

A command shows what it is waiting for, and its errors name command-line options instead of the
library's settings; a group suggests corrections for misspelt commands.
"""

from __future__ import annotations

import copy
import difflib
import os
from typing import Any, Dict, List, Optional, Tuple

import click

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.cli import status_line
from tinkex.errors import TinkexError

#: Setting of the library -> the parameter of commands with another name.
_OTHER_NAMES = {"overwrite": "force"}


class Failed(click.ClickException):
    """An error of the library, in terms of the command line."""


_VERBOSE = "tinkex.cli.verbose"


def _remember_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_VERBOSE] = True


def verbose_option() -> click.Option:
    """Return the option ``--verbose``; it may come before or after the command's name."""
    return click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        callback=_remember_verbose,
        help="Show each request on stderr, without secrets.",
    )


class Command(click.Command):
    """A command with a status line, whose errors name its own options."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params.append(verbose_option())

    def invoke(self, ctx: click.Context) -> Any:
        try:
            verbose = ctx.meta.get(_VERBOSE, False)
            with status_line.shown(f"{ctx.command_path}: working", verbose=verbose) as ctx.obj:
                return super().invoke(ctx)
        except TinkexError as error:
            raise Failed(error_in_flags(error, ctx)) from error
        except UnicodeError as error:  # in an argument or in stdin
            raise Failed(f"the input is not valid text: {error}") from error


class Group(click.Group):
    """A group that suggests corrections for misspelt commands."""

    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: List[str]
    ) -> Tuple[Optional[str], Optional[click.Command], List[str]]:
        """Find the command ``args[0]``; UsageError, with suggestions, if there is none."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            raise click.UsageError(f"No such command {name!r}. {self._suggestion(ctx, name)}", ctx)
        return super().resolve_command(ctx, args)

    def _suggestion(self, ctx: click.Context, name: str) -> str:
        close = difflib.get_close_matches(name, self.list_commands(ctx))
        found = [f"{ctx.command_path} {match}" for match in close]
        found = found or self._elsewhere(ctx.find_root(), name)
        if found:
            return f"Did you mean {' or '.join(f'`{command}`' for command in found)}?"
        return f"Commands: {', '.join(self.list_commands(ctx))}."

    def _elsewhere(self, root: click.Context, name: str) -> List[str]:
        """Return the commands with that name or a similar one, in all groups."""
        top = root.command
        assert isinstance(top, click.Group)
        groups = [(path, top.get_command(root, path)) for path in top.list_commands(root)]
        names: Dict[str, List[str]] = {}
        for path, group in groups:
            names.setdefault(path, []).append(f"{root.command_path} {path}")
            for inner in getattr(group, "commands", ()):
                names.setdefault(inner, []).append(f"{root.command_path} {path} {inner}")
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
        return [command for match in close for command in names[match]]


def in_flags(text: str, ctx: click.Context) -> str:
    """Return *text*, part of an error, with settings replaced by command-line options.

    For example, ``overwrite=True`` becomes ``--force``, and ``max_tokens`` ``--max-tokens``.
    """
    if not isinstance(text, ErrorText):
        return text
    flags = _flags(ctx)

    def option(setting: Setting) -> Optional[str]:
        flag = flags.get(setting.name)
        is_given = not any(setting.value is value for value in (None, ..., True))
        return f"{flag} {setting.value}" if flag is not None and is_given else flag

    return text.naming(option)


def error_in_flags(error: TinkexError, ctx: click.Context) -> str:
    """Return the message and the hint of *error*, converted by `in_flags`."""
    shown = copy.copy(error)
    shown.message = in_flags(error.message, ctx)
    shown.hint = None if error.hint is None else in_flags(error.hint, ctx)
    return str(shown)


def _flags(ctx: click.Context) -> Dict[str, str]:
    """Map each setting to the command's option for it, or to the variable that it came from."""
    flags = {
        option.name: max(option.opts, key=len)
        for option in ctx.command.params
        if isinstance(option, click.Option) and option.name
    }
    flags = {**{ours: flags[name] for ours, name in _OTHER_NAMES.items() if name in flags}, **flags}
    if ctx.params.get("base_url") is None and os.environ.get("TINKER_BASE_URL"):
        flags["base_url"] = "TINKER_BASE_URL"
    return flags
