"""``tinkex checkpoint``: saved weights on the server."""

from __future__ import annotations

from typing import Any, Dict, Optional

import click

import tinkex
from tinkex.cli.commands import Group
from tinkex.cli.connect import base_url_option, check_path, fetch_pages, open_rest
from tinkex.cli.deletions import delete
from tinkex.cli.output import (
    count,
    format_option,
    limit_option,
    print_facts,
    print_json,
    print_table,
    size,
    wants_json,
    when,
)
from tinkex.cli.terminal import echo
from tinkex.cli.transfers import download, push_to_hub
from tinkex.errors import NotFoundError, RouteMissingError


@click.group(cls=Group)
def checkpoint() -> None:
    """List, change and download checkpoints."""


@checkpoint.command("list")
@click.option("--run-id", metavar="ID", help="Only the checkpoints of this training run.")
@limit_option
@base_url_option
@format_option
def list_checkpoints(run_id: Optional[str], limit: int, base_url: Optional[str]) -> None:
    """List checkpoints, newest first."""
    with open_rest(base_url) as rest:
        if run_id:
            of_run = rest.list_checkpoints(run_id).result().checkpoints
            found = of_run[:limit] if limit else of_run
        else:
            found = fetch_pages(
                lambda size, offset: rest.list_user_checkpoints(size, offset).result().checkpoints,
                limit,
                1000,
            )
    if wants_json():
        listed = {"checkpoints": [item.to_wire() for item in found]}
        print_json({"run_id": run_id, **listed} if run_id else listed)
        return
    print_table(
        count(len(found), "checkpoint") + (f" of run {run_id}" if run_id else ""),
        ["Checkpoint ID", "Type", "Size", "Public", "Created", "Expires", "Path"],
        [
            [
                item.checkpoint_id,
                item.checkpoint_type,
                size(item.size_bytes),
                "yes" if item.public else "no",
                when(item.time),
                when(item.expires_at) if item.expires_at else "never",
                item.tinker_path,
            ]
            for item in found
        ],
    )


@checkpoint.command("info")
@click.argument("path")
@base_url_option
@format_option
def show_checkpoint(path: str, base_url: Optional[str]) -> None:
    """Show the checkpoint at PATH (tinker://...), and what it was trained from."""
    parsed = check_path(path)
    with open_rest(base_url) as rest:
        of_run = rest.list_checkpoints(parsed.training_run_id).result().checkpoints
        found = next((item for item in of_run if item.tinker_path == path), None)
        if found is None:
            raise NotFoundError(
                f"there is no checkpoint {path}",
                hint=f"`tinkex checkpoint list --run-id {parsed.training_run_id}` lists the run's.",
            )
        weights = _weights_info(rest, path)
    if wants_json():
        print_json({**found.to_wire(), **weights})
        return
    print_facts(
        f"Checkpoint {path}",
        [
            ["Checkpoint ID", found.checkpoint_id],
            ["Type", found.checkpoint_type],
            ["Base Model", weights.get("base_model", "-")],
            ["LoRA", _lora(weights)],
            ["Size", size(found.size_bytes)],
            ["Public", "yes" if found.public else "no"],
            ["Created", when(found.time)],
            ["Expires", when(found.expires_at) if found.expires_at else "never"],
        ],
    )


def _weights_info(rest: tinkex.RestClient, path: str) -> Dict[str, Any]:
    """Return how a checkpoint was trained; empty if the server does not report it."""
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
@base_url_option
@format_option
def publish(path: str, base_url: Optional[str]) -> None:
    """Make the checkpoint at PATH public."""
    check_path(path)
    with open_rest(base_url) as rest:
        rest.publish_checkpoint_from_tinker_path(path).result()
    _echo_unless_json(f"{path} is public.")


@checkpoint.command("unpublish")
@click.argument("path")
@base_url_option
@format_option
def unpublish(path: str, base_url: Optional[str]) -> None:
    """Make the checkpoint at PATH private again."""
    check_path(path)
    with open_rest(base_url) as rest:
        rest.unpublish_checkpoint_from_tinker_path(path).result()
    _echo_unless_json(f"{path} is private.")


@checkpoint.command("set-ttl")
@click.argument("path")
@click.option("--ttl", type=int, metavar="SECONDS", help="Delete it after this long.")
@click.option("--remove", is_flag=True, help="Keep it until it is deleted by hand.")
@base_url_option
@format_option
def set_ttl(path: str, ttl: Optional[int], remove: bool, base_url: Optional[str]) -> None:
    """Set how long the checkpoint at PATH is kept."""
    if (ttl is None) != remove:
        raise click.UsageError("give --ttl or --remove")
    check_path(path)
    with open_rest(base_url) as rest:
        rest.set_checkpoint_ttl_from_tinker_path(path, ttl).result()
    _echo_unless_json(
        f"{path} is kept until it is deleted." if remove else f"{path} is deleted in {ttl} seconds."
    )


def _echo_unless_json(text: str) -> None:
    if not wants_json():
        echo(text)


checkpoint.add_command(delete)
checkpoint.add_command(download)
checkpoint.add_command(push_to_hub)
