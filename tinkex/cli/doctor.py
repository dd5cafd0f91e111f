"""``tinkex doctor``: what does not work on the way to the server, and whose fault that is."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import List, Optional

import click

from tinkex.cli import status_line
from tinkex.cli.checks import FAILED, Check, Examination
from tinkex.cli.commands import Command, in_flags
from tinkex.cli.connect import base_url_option
from tinkex.cli.output import format_option, print_json, wants_json
from tinkex.cli.terminal import echo, visible


@click.command(cls=Command)
@base_url_option
@format_option
@click.pass_context
def doctor(ctx: click.Context, base_url: Optional[str]) -> None:
    """Check the settings, the network and the server, one after the other.

    Each check is one line: ok, failed or skipped, what was found, and for a failure whose fault it
    is and what to do.  The exit code is 1 if a check has failed.  A session is opened for this, and
    ended; nothing is trained or sampled.
    """
    made: List[Check] = []
    checks = Examination(base_url).run(lambda name: status_line.waiting_for(f"checking: {name}"))
    with contextlib.closing(checks):
        for check in checks:
            made.append(_in_flags(check, ctx))
            if not wants_json():
                echo(_line(made[-1]))
    well = all(check.status != FAILED for check in made)
    if wants_json():
        print_json({"ok": well, "checks": [dataclasses.asdict(check) for check in made]})
    ctx.exit(0 if well else 1)


def _in_flags(check: Check, ctx: click.Context) -> Check:
    advice = None if check.advice is None else in_flags(check.advice, ctx)
    return dataclasses.replace(check, detail=in_flags(check.detail, ctx), advice=advice)


def _line(check: Check) -> str:
    text = f"{check.status:<8} {check.name:<11} {check.detail}"
    if check.fault is not None:
        text = f"{text.rstrip('.')}.  Fault: {check.fault}.  {check.advice}"
    return visible(text, one_line=True)
