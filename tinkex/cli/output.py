"""What commands print: tables for people, JSON for programs, both on stdout."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, Callable, Iterable, Iterator, Optional, Sequence, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_FORMAT = "tinkex.cli.format"


def _remember(ctx: click.Context, _: click.Parameter, value: Optional[str]) -> None:
    if value is not None:
        ctx.meta[_FORMAT] = value


def format_option(command: F) -> F:
    """Give a command ``-f table|json``; it may stand before or after the command's name."""
    decorate = click.option(
        "-f",
        "--format",
        type=click.Choice(["table", "json"]),
        callback=_remember,
        expose_value=False,
        help="How to print results (default: table).",
    )
    return decorate(command)


def wants_json() -> bool:
    """Tell whether JSON was asked for."""
    return bool(click.get_current_context().meta.get(_FORMAT) == "json")


def print_json(value: Any) -> None:
    """Print *value* as indented JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; nothing is shortened when stdout is not a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Plain: an id such as "...:train:0" would become an emoji, and brackets markup.
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 1000
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        # Ids and paths are there to be copied: they wrap, and are never cut.
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


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
    """Show bytes as they arrive, on stderr, if a person looks on; yield what is to be told."""
    if wants_json() or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def size(n_bytes: Optional[int]) -> str:
    """Return a number of bytes for people, in steps of 1024."""
    if n_bytes is None:
        return "-"
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def when(instant: Optional[datetime], now: Optional[datetime] = None) -> str:
    """Return an instant for people: how long ago, or its date if that is over 30 days."""
    if instant is None:
        return "-"
    seconds = ((now or datetime.now(timezone.utc)) - instant).total_seconds()
    if not 0 <= seconds < 30 * 86400:
        return instant.strftime("%Y-%m-%d %H:%M")
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count != 1 else ''} ago"
    return "just now"
