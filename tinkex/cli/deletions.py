"""``tinkex checkpoint delete``: delete given checkpoints, or those of a run that match a filter."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import List, Optional, Tuple

import click

import tinkex
from tinkex.cli import status_line
from tinkex.cli.commands import Command
from tinkex.cli.connect import base_url_option, check_path, explain, open_rest
from tinkex.cli.output import count, format_option, print_json, wants_json
from tinkex.cli.terminal import confirm, echo, echo_error
from tinkex.errors import APIError
from tinkex.types.checkpoint_path import KINDS


def _instant(_: click.Context, option: click.Parameter, value: Optional[str]) -> Optional[datetime]:
    """Parse an ISO 8601 time; without a time zone, it is in UTC."""
    if value is None:
        return None
    # Python before 3.11 cannot parse "Z".
    text = f"{value[:-1]}+00:00" if value[-1:] in "Zz" else value
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise click.BadParameter(
            "give a time like 2026-01-31 or 2026-01-31T15:00:00Z", param=option
        ) from error
    return found if found.tzinfo is not None else found.replace(tzinfo=timezone.utc)


@click.command("delete", cls=Command)
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("--run-id", metavar="ID", help="Instead of PATHs: checkpoints of this training run.")
@click.option(
    "--type",
    "kind",
    type=click.Choice([*KINDS, *KINDS.values()]),
    help="With --run-id: only checkpoints of this kind.",
)
@click.option(
    "--before", metavar="TIME", callback=_instant, help="With --run-id: created before this."
)
@click.option(
    "--after", metavar="TIME", callback=_instant, help="With --run-id: created after this."
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")
@base_url_option
@format_option
@click.pass_context
def delete(
    ctx: click.Context,
    paths: Tuple[str, ...],
    run_id: Optional[str],
    kind: Optional[str],
    before: Optional[datetime],
    after: Optional[datetime],
    yes: bool,
    base_url: Optional[str],
) -> None:
    """Delete the checkpoints at PATH... (tinker://...) permanently.

    With --run-id, delete the checkpoints of a training run that match --type, --before and --after.
    """
    if bool(paths) == bool(run_id):
        raise click.UsageError("give paths, or --run-id")
    if (kind or before or after) and not run_id:
        raise click.UsageError("--type, --before and --after need --run-id")
    for path in paths:
        check_path(path)
    with open_rest(base_url) as rest:
        chosen = list(dict.fromkeys(paths))
        if run_id:
            chosen = _of_run(rest, run_id, KINDS.get(kind or "", kind), before, after)
        if chosen and not yes:
            echo_error("\n".join(chosen))
            question = f"Delete {count(len(chosen), 'checkpoint')} permanently?"
            if not confirm(question, "nothing was deleted (-y deletes without asking)"):
                ctx.exit(1)
        failed = _delete(rest, chosen)
    deleted = len(chosen) - len(failed)
    if wants_json():
        listed = [{"tinker_path": path, "error": str(error)} for path, error in failed]
        print_json({"deleted_count": deleted, "failed": listed})
    else:
        echo(f"Deleted {count(deleted, 'checkpoint')}.")
        for path, error in failed:
            echo_error(f"Error: {path}: {error}")
    if failed:
        ctx.exit(1)


def _of_run(
    rest: tinkex.RestClient,
    run_id: str,
    kind: Optional[str],
    before: Optional[datetime],
    after: Optional[datetime],
) -> List[str]:
    """Return the paths of a run's matching checkpoints."""
    return [
        item.tinker_path
        for item in rest.list_checkpoints(run_id).result().checkpoints
        if (kind is None or item.checkpoint_type == kind)
        and (before is None or item.time < before)
        and (after is None or item.time > after)
    ]


def _delete(rest: tinkex.RestClient, paths: List[str]) -> List[Tuple[str, APIError]]:
    """Delete *paths* concurrently; return the paths that failed, with their errors."""
    failed = []
    status_line.waiting_for(f"deleting {count(len(paths), 'checkpoint')}")
    # Send all requests before waiting for the first one.
    futures = [(path, rest.delete_checkpoint_from_tinker_path(path)) for path in paths]
    for path, future in futures:
        try:
            future.result()
        except APIError as error:  # go on: the others are deleted all the same
            explain(error, rest.config)
            failed.append((path, error))
    return failed
