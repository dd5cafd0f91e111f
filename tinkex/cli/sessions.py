"""``tinkex session``: sessions, active or not, and their traces."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import click

import tinkex
from tinkex._downloads.downloads import Downloader, fetch_file
from tinkex._downloads.part_file import Source
from tinkex.cli.commands import Group
from tinkex.cli.connect import fetch_pages, with_rest
from tinkex.cli.output import (
    count,
    limit_option,
    print_facts,
    print_table,
    print_text,
    progress_bar,
    size,
)


@click.group(cls=Group)
def session() -> None:
    """List and show sessions."""


@session.command("list")
@limit_option
@with_rest
def list_sessions(rest: tinkex.RestClient, limit: int) -> None:
    """List session ids, newest first."""
    found = fetch_pages(
        lambda size, offset: rest.list_sessions(limit=size, offset=offset).result().sessions,
        limit,
        100,
    )
    title, rows = count(len(found), "session"), [[item] for item in found]
    print_table(title, ["Session ID"], rows, as_json={"sessions": found})


@session.command("info")
@click.argument("session_id")
@with_rest
def show_session(rest: tinkex.RestClient, session_id: str) -> None:
    """Show the training runs and samplers of a session."""
    found = rest.get_session(session_id).result()
    rows = [["Session ID", session_id], ["Name", found.display_name or "-"]]
    rows += [["Training Run", run_id] for run_id in found.training_run_ids]
    rows += [["Sampler", sampler_id] for sampler_id in found.sampler_ids]
    rows += [[f"Metadata: {key}", str(value)] for key, value in (found.user_metadata or {}).items()]
    facts = {"session_id": session_id, **found.to_wire()}
    print_facts(f"Session {session_id}", rows, as_json=facts)


@session.command("export-trace")
@click.argument("session_id")
@click.option("-o", "--output", metavar="FILE", help="File to write (default: SESSION_ID.pftrace).")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@click.option("--url-only", is_flag=True, help="Print the signed URL; download nothing.")
@with_rest
def export_trace(
    rest: tinkex.RestClient, session_id: str, output: Optional[str], force: bool, url_only: bool
) -> None:
    """Export the trace of a session (a Perfetto file), and download it."""
    target = Path(output or f"{session_id.replace('/', '_')}.pftrace").absolute()
    url = rest.export_session_trace(session_id).result()
    if url_only:
        print_text(url, as_json={"session_id": session_id, "url": url})
        return

    def sign(again: bool) -> Source:
        return Source(rest.export_session_trace(session_id).result() if again else url)

    with (
        progress_bar("Downloading") as report,
        Downloader(rest.config, closing=rest.transport.closing) as downloader,
    ):
        n_bytes = fetch_file(
            downloader, f"the trace of {session_id}", target, sign, report, overwrite=force
        )
    facts = {"session_id": session_id, "destination": str(target), "file_size_bytes": n_bytes}
    print_text(f"{target} ({size(n_bytes)})", as_json=facts)
