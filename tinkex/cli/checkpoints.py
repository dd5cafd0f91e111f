"""``tinkex checkpoint``: saved weights on the server."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import click

import tinkex
from tinkex.cli.commands import Group
from tinkex.cli.connect import check_path, existing, fetch_pages, with_rest
from tinkex.cli.deletions import delete
from tinkex.cli.output import (
    count,
    limit_option,
    print_facts,
    print_table,
    print_text,
    size,
    when,
)
from tinkex.cli.transfers import download, push_to_hub
from tinkex.errors import NotFoundError, RouteMissingError
from tinkex.types import Checkpoint


@click.group(cls=Group)
def checkpoint() -> None:
    """List, change and download checkpoints."""


@checkpoint.command("list")
@click.option("--run-id", metavar="ID", help="Only the checkpoints of this training run.")
@limit_option
@with_rest
def list_checkpoints(rest: tinkex.RestClient, run_id: Optional[str], limit: int) -> None:
    """List checkpoints, newest first."""
    if run_id:
        of_run = rest.list_checkpoints(run_id).result().checkpoints
        found = of_run[:limit] if limit else of_run
    else:
        found = fetch_pages(
            lambda size, offset: rest.list_user_checkpoints(size, offset).result().checkpoints,
            limit,
            1000,
        )
    listed = {"checkpoints": [item.to_wire() for item in found]}
    print_table(
        count(len(found), "checkpoint") + (f" of run {run_id}" if run_id else ""),
        ["Checkpoint ID", "Type", "Size", "Public", "Created", "Expires", "Path"],
        [
            [item.checkpoint_id, item.checkpoint_type, *_details(item), item.tinker_path]
            for item in found
        ],
        as_json={"run_id": run_id, **listed} if run_id else listed,
    )


@checkpoint.command("info")
@click.argument("path")
@with_rest
def show_checkpoint(rest: tinkex.RestClient, path: str) -> None:
    """Show the checkpoint at PATH (tinker://...), and what it was trained from."""
    parsed = check_path(path)
    with existing(path):
        of_run = rest.list_checkpoints(parsed.training_run_id).result().checkpoints
    found = next((item for item in of_run if item.tinker_path == path), None)
    if found is None:
        raise NotFoundError(
            f"there is no checkpoint {path}",
            hint=f"`tinkex checkpoint list --run-id {parsed.training_run_id}` lists the run's.",
        )
    weights = _weights_info(rest, path)
    print_facts(
        f"Checkpoint {path}",
        [
            ["Checkpoint ID", found.checkpoint_id],
            ["Type", found.checkpoint_type],
            ["Base Model", weights.get("base_model", "-")],
            ["LoRA", _lora(weights)],
            *zip(["Size", "Public", "Created", "Expires"], _details(found)),
        ],
        as_json={**found.to_wire(), **weights},
    )


def _details(item: Checkpoint) -> List[str]:
    """Return its size, whether it is public, and when it was created and expires, as text."""
    expires = when(item.expires_at) if item.expires_at else "never"
    return [size(item.size_bytes), "yes" if item.public else "no", when(item.time), expires]


def _weights_info(rest: tinkex.RestClient, path: str) -> Dict[str, Any]:
    """Return how a checkpoint was trained; an empty dict if the server does not report it."""
    try:
        return rest.get_weights_info_by_tinker_path(path).result().to_wire()
    except RouteMissingError:
        return {}


def _lora(weights: Dict[str, Any]) -> str:
    if not weights:
        return "-"
    if not weights["is_lora"]:
        return "no"
    rank = weights.get("lora_rank")
    return "yes" if rank is None else f"rank {rank}"


@checkpoint.command("publish")
@click.argument("path")
@with_rest
def publish(rest: tinkex.RestClient, path: str) -> None:
    """Make the checkpoint at PATH public."""
    with existing(path):
        rest.publish_checkpoint_from_tinker_path(path).result()
    print_text(f"{path} is public.")


@checkpoint.command("unpublish")
@click.argument("path")
@with_rest
def unpublish(rest: tinkex.RestClient, path: str) -> None:
    """Make the checkpoint at PATH private again."""
    with existing(path):
        rest.unpublish_checkpoint_from_tinker_path(path).result()
    print_text(f"{path} is private.")


@checkpoint.command("set-ttl")
@click.argument("path")
@click.option("--ttl", type=int, metavar="SECONDS", help="Delete it after this many seconds.")
@click.option("--remove", is_flag=True, help="Keep it until you delete it.")
@with_rest
def set_ttl(rest: tinkex.RestClient, path: str, ttl: Optional[int], remove: bool) -> None:
    """Set how long the checkpoint at PATH is kept."""
    if (ttl is None) != remove:
        raise click.UsageError("give --ttl or --remove")
    with existing(path):
        rest.set_checkpoint_ttl_from_tinker_path(path, ttl).result()
    kept = "kept until it is deleted" if remove else f"deleted in {ttl} seconds"
    print_text(f"{path} is {kept}.")


checkpoint.add_command(delete)
checkpoint.add_command(download)
checkpoint.add_command(push_to_hub)
