"""The output of commands on stdout: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
import shutil
import sys
import unicodedata
import warnings
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, Callable, Iterable, Iterator, Optional, Sequence, TypeVar

import click

from tinkex.cli import status_line
from tinkex.cli.terminal import echo, echo_error, visible

F = TypeVar("F", bound=Callable[..., Any])

_FORMAT = "tinkex.cli.format"


def _remember(ctx: click.Context, _: click.Parameter, value: Optional[str]) -> None:
    if value is not None:
        ctx.meta[_FORMAT] = value


def format_option(command: F) -> F:
    """Add ``-f table|json`` to a command; it may come before or after the command's name."""
    decorate = click.option(
        "-f",
        "--format",
        type=click.Choice(["table", "json"]),
        callback=_remember,
        expose_value=False,
        help="Output format (default: table).",
    )
    return decorate(command)


limit_option = click.option(
    "--limit",
    default=20,
    show_default=True,
    type=click.IntRange(min=0),
    help="Maximum number of results; 0 lists all.",
)


def wants_json() -> bool:
    """Return whether JSON was requested."""
    return bool(click.get_current_context().meta.get(_FORMAT) == "json")


def print_json(value: Any) -> None:
    """Print *value* as indented JSON, in ASCII if the encoding of stdout lacks a character."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(value, indent=2)
    echo(text)


def print_text(text: str, *, as_json: Any = None) -> None:
    """Print *text*.  If JSON was requested, print *as_json* instead, or nothing if it is None."""
    if not wants_json():
        echo(text)
    elif as_json is not None:
        print_json(as_json)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, as_json: Any = None
) -> None:
    """Print a table, or *as_json* if that is given and JSON was requested.

    Values are never shortened or wrapped, so that they can be copied.  On a terminal too narrow for
    the table, each row is printed as a list of names and values.
    """
    if as_json is not None and wants_json():
        print_json(as_json)
        return
    lines = [[visible(cell, one_line=True) for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(columns, *lines)]
    # The terminal would wrap the rows, so that a path could not be copied in one piece.
    if sum(widths) + 2 * len(widths) - 2 > _columns():
        blocks = [_facts(list(zip(columns, line))) for line in lines]
        echo("\n\n".join([title, *blocks]))
        return
    shown = [columns, ["-" * width for width in widths], *lines]
    echo("\n".join([title, "", *(_padded(line, widths) for line in shown)]))


def print_facts(title: str, rows: Iterable[Sequence[str]], *, as_json: Any = None) -> None:
    """Print pairs of a name and a value, one per line, without wrapping.

    Or print *as_json*, as `print_table` does.
    """
    if as_json is not None and wants_json():
        print_json(as_json)
        return
    pairs = [(name, visible(value, one_line=True)) for name, value in rows]
    echo("\n".join([title, "", _facts(pairs)]))


def _facts(pairs: Sequence[Sequence[str]]) -> str:
    names = [name for name, _ in pairs]
    widths = [max(map(_width, names), default=0), 0]
    return "\n".join(_padded(pair, widths) for pair in pairs)


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell + " " * (width - _width(cell)) for cell, width in zip(cells, widths)]
    return "  ".join(padded).rstrip()


def _width(text: str) -> int:
    """Return the width of *text* on a terminal, in columns."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) != 0 for char in text)


def _columns() -> float:
    """Return the width of the terminal; infinite if stdout is not one."""
    if sys.stdout is None or not sys.stdout.isatty():
        return math.inf
    return shutil.get_terminal_size().columns


def print_csv(where: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as CSV to the file *where*, or to stdout if that is ``-``."""
    import csv

    with click.open_file(where, "w", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow(["" if value is None else value for value in row])


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, Optional[int]], None]]:
    """Show progress in bytes on stderr; yield a function to report it with (done, total)."""
    line = status_line.current()  # looked up here, because other threads may report the progress
    if line is None or not line.live:

        def in_words(done: int, total: Optional[int]) -> None:
            if line is not None:
                of_all = "" if total is None else f" of {size(total)}"
                line.doing = f"{label}: {size(done)}{of_all}"

        yield in_words
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    )  # fmt: skip
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    with status_line.hidden(), bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def size(n_bytes: Optional[int]) -> str:
    """Return a size in bytes as text, in units of 1024."""
    if n_bytes is None:
        return "-"
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def count(n: int, noun: str, plural: Optional[str] = None) -> str:
    """Return ``"1 model"`` or ``"2 models"``; *plural* is for irregular nouns."""
    return f"{n} {noun if n == 1 else plural or f'{noun}s'}"


def when(instant: Optional[datetime], now: Optional[datetime] = None) -> str:
    """Return a time as text: how long ago it was, or its date if that is over 30 days."""
    if instant is None:
        return "-"
    seconds = ((now or datetime.now(timezone.utc)) - instant).total_seconds()
    if not 0 <= seconds < 30 * 86400:
        return instant.strftime("%Y-%m-%d %H:%M")
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= length:
            return f"{count(int(seconds // length), unit)} ago"
    return "just now"


@contextmanager
def warnings_in_words() -> Iterator[None]:
    """Print the block's warnings without the place in the code that raised them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for warning in caught:
                echo_error(f"Warning: {warning.message}")
