"""``tinkex export``: write a trained model to a folder that other programs can load."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Iterator, Optional

import click

import tinkex
from tinkex.cli import status_line
from tinkex.cli.commands import Command
from tinkex.cli.connect import advice, base_url_option, check_path, existing, open_rest
from tinkex.cli.output import format_option, print_facts, progress_bar, size
from tinkex.errors import APIConnectionError, APIError
from tinkex.export import export_model
from tinkex.runs.journal import JOURNAL_NAME
from tinkex.types.checkpoint_path import SCHEME


@click.command(cls=Command)
@click.argument("source")
@click.option("--to", "dest", required=True, metavar="FOLDER", help="Folder to create.")
@click.option("--merge", is_flag=True, help="Merge the adapter into its base model.")
@click.option(
    "--base-model",
    metavar="NAME",
    help="Base model: a folder or a Hugging Face name (default: what the checkpoint names).",
)
@base_url_option
@format_option
def export(
    source: str, dest: str, merge: bool, base_model: Optional[str], base_url: Optional[str]
) -> None:
    """Write the trained weights of SOURCE to a folder that transformers can load.

    SOURCE is a run folder, a checkpoint (tinker://...), or the folder of an adapter.  Without
    --merge, the adapter is written, for PEFT's AutoPeftModelForCausalLM; with --merge, the whole
    model, for AutoModelForCausalLM.
    """
    status_line.waiting_for(f"exporting {source}")
    with progress_bar("Downloading") as report, _client(source, base_url) as rest:
        folder = export_model(
            source, dest, merge=merge, base_model=base_model, rest=rest, progress=report
        )
    n_bytes = sum(file.stat().st_size for file in folder.iterdir())
    kind = "model" if merge else "adapter"
    steps = _steps_of(source)
    print_facts(
        "Exported",
        [
            ["Source", source],
            *([["Steps", steps]] if steps else []),
            ["Written", kind],
            ["Destination", str(folder)],
            ["Size", size(n_bytes)],
        ],
        as_json={"source": source, "kind": kind, "destination": str(folder), "size_bytes": n_bytes},
    )


def _steps_of(source: str) -> Optional[str]:
    """Return the steps of a run folder's newest weights as text; None for other sources."""
    if not (Path(source).expanduser() / JOURNAL_NAME).is_file():
        return None
    record = tinkex.read_run(Path(source).expanduser())
    steps = record.newest_weights().steps
    return str(steps) if record.sampler else f"{steps}, of a run that is not finished"


@contextlib.contextmanager
def _client(source: str, base_url: Optional[str]) -> Iterator[Optional[tinkex.RestClient]]:
    """Yield a client for a ``tinker://`` path; None for a run folder or an adapter.

    A run folder names its server, and an adapter needs none.
    """
    if source.startswith(SCHEME):
        check_path(source)
        with open_rest(base_url) as rest, existing(source):
            yield rest
        return
    if base_url is not None:
        raise click.UsageError("--base-url is for a tinker:// path")
    try:
        yield None
    except APIConnectionError as error:
        error.hint = "The run was trained on this server. Is it running?"
        raise
    except APIError as error:
        error.hint = advice(error)
        raise
