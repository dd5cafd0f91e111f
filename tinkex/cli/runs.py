"""``tinkex run``: training runs, active or not."""

from __future__ import annotations

from typing import Callable, Dict, List, Optional, Tuple

import click

import tinkex
from tinkex.cli.commands import Group
from tinkex.cli.connect import fetch_pages, with_rest
from tinkex.cli.output import count, limit_option, print_facts, print_table, when
from tinkex.types import TrainingRun


@click.group(cls=Group)
def run() -> None:
    """List and show training runs."""


def _lora(found: TrainingRun) -> str:
    if not found.is_lora:
        return "no"
    return f"rank {found.lora_rank}" if found.lora_rank is not None else "yes"


def _checkpoint(found: TrainingRun, what: str) -> str:
    newest = found.last_checkpoint
    if newest is None:
        return "-"
    return when(newest.time) if what == "time" else newest.checkpoint_id


def _status(found: TrainingRun) -> str:
    return "corrupted" if found.corrupted else "ok"


#: Column -> title, and the value for a run.
COLUMNS: Dict[str, Tuple[str, Callable[[TrainingRun], str]]] = {
    "id": ("Run ID", lambda run: run.training_run_id),
    "model": ("Base Model", lambda run: run.base_model),
    "owner": ("Owner", lambda run: run.model_owner),
    "lora": ("LoRA", _lora),
    "updated": ("Last Update", lambda run: when(run.last_request_time)),
    "status": ("Status", _status),
    "checkpoint": ("Last Checkpoint", lambda run: _checkpoint(run, "checkpoint_id")),
    "checkpoint_time": ("Checkpoint Time", lambda run: _checkpoint(run, "time")),
}


def _columns(_: click.Context, option: click.Parameter, value: str) -> List[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    unknown = [name for name in names if name not in COLUMNS]
    if unknown or not names:
        raise click.BadParameter(f"choose from {', '.join(COLUMNS)}", param=option)
    return names


@run.command("list")
@limit_option
@click.option(
    "-c",
    "--columns",
    default="id,model,lora,updated,status",
    show_default=True,
    metavar="NAMES",
    callback=_columns,
    help=f"Columns to show, separated by commas: {', '.join(COLUMNS)}.",
)
@with_rest
def list_runs(rest: tinkex.RestClient, limit: int, columns: List[str]) -> None:
    """List training runs, most recently used first."""
    total: Optional[int] = None

    def fetch(page_size: int, offset: int) -> List[TrainingRun]:
        nonlocal total
        page = rest.list_training_runs(limit=page_size, offset=offset).result()
        total = page.cursor.total_count if page.cursor else None
        return page.training_runs

    found = fetch_pages(fetch, limit, 100)
    more = total is not None and total > len(found)
    print_table(
        f"{len(found)} of {total} training runs" if more else count(len(found), "training run"),
        [COLUMNS[name][0] for name in columns],
        [[COLUMNS[name][1](item) for name in columns] for item in found],
        as_json={"runs": [item.to_wire() for item in found]},
    )


@run.command("info")
@click.argument("run_id")
@with_rest
def show_run(rest: tinkex.RestClient, run_id: str) -> None:
    """Show one training run."""
    found = rest.get_training_run(run_id).result()
    rows = [
        ["Run ID", found.training_run_id],
        ["Base Model", found.base_model],
        ["Owner", found.model_owner],
        ["LoRA", _lora(found)],
        ["Last Update", when(found.last_request_time)],
        ["Status", _status(found)],
    ]
    for label, checkpoint in (
        ("Last Checkpoint", found.last_checkpoint),
        ("Last Sampler Checkpoint", found.last_sampler_checkpoint),
    ):
        if checkpoint is not None:
            rows.append([label, checkpoint.tinker_path])
    rows += [[f"Metadata: {key}", str(value)] for key, value in (found.user_metadata or {}).items()]
    print_facts(f"Training run {run_id}", rows, as_json=found.to_wire())
