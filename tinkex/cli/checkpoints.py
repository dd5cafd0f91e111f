"""``tinkex checkpoint``: saved weights on the server."""

from __future__ import annotations

from typing import List, Optional, Tuple

import click

import tinkex
from tinkex.cli.connect import base_url_option, open_rest
from tinkex.cli.output import format_option, print_json, print_table, size, wants_json, when
from tinkex.errors import APIStatusError, NotFoundError
from tinkex.types import Checkpoint, ParsedCheckpointTinkerPath


@click.group()
def checkpoint() -> None:
    """List, show and delete checkpoints."""


@checkpoint.command("list")
@click.option("--run-id", metavar="ID", help="Only the checkpoints of this training run.")
@click.option("--limit", default=20, show_default=True, help="At most this many; 0 lists all.")
@base_url_option
@format_option
def list_checkpoints(run_id: Optional[str], limit: int, base_url: Optional[str]) -> None:
    """List checkpoints, the newest first."""
    with open_rest(base_url) as rest:
        if run_id:
            of_run = rest.list_checkpoints(run_id).result().checkpoints
            found = of_run[:limit] if limit else of_run
        else:
            found = _of_user(rest, limit)
    if wants_json():
        listed = {"checkpoints": [item.to_wire() for item in found]}
        print_json({"run_id": run_id, **listed} if run_id else listed)
        return
    print_table(
        f"{len(found)} checkpoints" + (f" of run {run_id}" if run_id else ""),
        ["Checkpoint ID", "Type", "Size", "Created", "Expires", "Path"],
        [
            [
                item.checkpoint_id,
                item.checkpoint_type,
                size(item.size_bytes),
                when(item.time),
                when(item.expires_at) if item.expires_at else "never",
                item.tinker_path,
            ]
            for item in found
        ],
    )


def _of_user(rest: tinkex.RestClient, limit: int) -> List[Checkpoint]:
    found: List[Checkpoint] = []
    while limit == 0 or len(found) < limit:
        page_size = min(1000, limit - len(found)) if limit else 1000
        page = rest.list_user_checkpoints(limit=page_size, offset=len(found)).result().checkpoints
        found += page
        if len(page) < page_size:
            break
    return found


@checkpoint.command("info")
@click.argument("path")
@base_url_option
@format_option
def show_checkpoint(path: str, base_url: Optional[str]) -> None:
    """Show the checkpoint at PATH (tinker://...), and what it was trained from."""
    parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
    with open_rest(base_url) as rest:
        of_run = rest.list_checkpoints(parsed.training_run_id).result().checkpoints
        found = next((item for item in of_run if item.tinker_path == path), None)
        if found is None:
            raise NotFoundError(
                f"there is no checkpoint {path}",
                hint=f"`tinkex checkpoint list --run-id {parsed.training_run_id}` lists the run's.",
            )
        weights = rest.get_weights_info_by_tinker_path(path).result()
    if wants_json():
        print_json({**found.to_wire(), **weights.to_wire()})
        return
    print_table(
        f"Checkpoint {path}",
        ["Property", "Value"],
        [
            ["Checkpoint ID", found.checkpoint_id],
            ["Type", found.checkpoint_type],
            ["Base Model", weights.base_model],
            ["LoRA", f"rank {weights.lora_rank}" if weights.is_lora else "no"],
            ["Size", size(found.size_bytes)],
            ["Created", when(found.time)],
            ["Expires", when(found.expires_at) if found.expires_at else "never"],
        ],
    )


@checkpoint.command("delete")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@base_url_option
@format_option
@click.pass_context
def delete_checkpoints(
    ctx: click.Context, paths: Tuple[str, ...], yes: bool, base_url: Optional[str]
) -> None:
    """Delete the checkpoints at PATH... (tinker://...), for good."""
    for path in paths:
        ParsedCheckpointTinkerPath.from_tinker_path(path)
    if not yes:
        for path in paths:
            click.echo(path, err=True)
        if not click.confirm(f"Delete {_count(len(paths))} for good?", err=True):
            ctx.exit(1)
    failed = []
    with open_rest(base_url) as rest:
        for path in paths:
            try:
                rest.delete_checkpoint_from_tinker_path(path).result()
            except APIStatusError as error:  # the others may still be there
                failed.append({"tinker_path": path, "error": str(error)})
    deleted = len(paths) - len(failed)
    if wants_json():
        print_json({"deleted_count": deleted, "failed": failed})
    else:
        click.echo(f"Deleted {_count(deleted)}.")
        for failure in failed:
            click.echo(f"Error: {failure['tinker_path']}: {failure['error']}", err=True)
    if failed:
        ctx.exit(1)


def _count(number: int) -> str:
    return f"{number} checkpoint{'' if number == 1 else 's'}"
