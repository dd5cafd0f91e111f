"""``tinkex checkpoint download`` and ``push-hf``: copy checkpoints elsewhere."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Iterator, Optional, Tuple

import click

import tinkex
from tinkex._downloads.hub import derived_repo_id
from tinkex.cli.commands import Command
from tinkex.cli.connect import check_path, existing, with_rest
from tinkex.cli.output import print_facts, print_text, progress_bar, size
from tinkex.errors import TinkexError
from tinkex.types.checkpoint_path import SCHEME


@click.command("download", cls=Command)
@click.argument("path")
@click.option("-o", "--output", default=".", metavar="DIR", help="Folder in which to create it.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace the checkpoint in an existing folder.",
)
@with_rest
def download(rest: tinkex.RestClient, path: str, output: str, force: bool) -> None:
    """Download the checkpoint at PATH into a folder named after it.

    If it is interrupted, running the same command again resumes it.
    """
    dest = Path(output) / _folder_name(path)
    with existing(path), progress_bar("Downloading") as report:
        dest = rest.download_checkpoint(path, dest, progress=report, overwrite=force)
    n_bytes = sum(file.stat().st_size for file in dest.rglob("*") if file.is_file())
    print_facts(
        "Downloaded",
        [["Checkpoint", path], ["Destination", str(dest)], ["Size", size(n_bytes)]],
        as_json={"checkpoint_path": path, "destination": str(dest), "file_size_bytes": n_bytes},
    )


def _folder_name(path: str) -> str:
    name = path[len(SCHEME) :].replace("/", "_")
    return name.replace(":", "_") if os.name == "nt" else name


@contextlib.contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Report errors of huggingface_hub and the libraries under it as one line."""
    try:
        yield
    except (TinkexError, click.ClickException):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise click.ClickException(f"cannot push to {repo_id}: {reason}") from error


@click.command("push-hf", cls=Command)
@click.argument("path")
@click.option(
    "-r",
    "--repo",
    "repo_id",
    metavar="NAME",
    help="Repository, such as me/my-model; by default named after the run and the checkpoint.",
)
@click.option("--public", is_flag=True, help="Create the repository as public.")
@click.option("--revision", metavar="NAME", help="Branch; created if it does not exist.")
@click.option("--commit-message", metavar="TEXT", help="Message of the commit.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of pushing.")
@click.option(
    "--allow-pattern",
    multiple=True,
    metavar="GLOB",
    help="Upload only matching files; may be repeated.",
)
@click.option(
    "--ignore-pattern", multiple=True, metavar="GLOB", help="Skip matching files; may be repeated."
)
@click.option("--no-model-card", is_flag=True, help="Do not write a README.md.")
@with_rest
def push_to_hub(
    rest: tinkex.RestClient,
    path: str,
    repo_id: Optional[str],
    public: bool,
    revision: Optional[str],
    commit_message: Optional[str],
    create_pr: bool,
    allow_pattern: Tuple[str, ...],
    ignore_pattern: Tuple[str, ...],
    no_model_card: bool,
) -> None:
    """Push the checkpoint at PATH to the Hugging Face hub (needs the extra "hub")."""
    check_path(path)
    if repo_id is None:
        with _hub_errors("the hub"):
            repo_id = derived_repo_id(path)
    with existing(path), progress_bar("Downloading") as report, _hub_errors(repo_id):
        url = rest.push_to_hub(
            path,
            repo_id,
            private=not public,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            allow_patterns=allow_pattern or None,
            ignore_patterns=ignore_pattern or None,
            add_model_card=not no_model_card,
            progress=report,
        )
    facts = {"repo_id": repo_id, "revision": revision, "public": public, "url": url}
    print_text(url, as_json={"checkpoint_path": path, **facts})
