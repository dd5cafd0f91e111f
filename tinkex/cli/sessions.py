"""``tinkex session``: sessions, active or not, and their traces."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import click

from tinkex._downloads.downloads import Downloader, fetch_file
from tinkex._downloads.part_file import Source
from tinkex.cli.commands import Group
from tinkex.cli.connect import base_url_option, fetch_pages, open_rest
from tinkex.cli.output import (
    count,
    format_option,
    limit_option,
    print_facts,
    print_json,
    print_table,
    progress_bar,
    size,
    wants_json,
)
from tinkex.cli.terminal import echo


@click.group(cls=Group)
def session() -> None:
    """List and show sessions."""


@session.command("list")
@limit_option
@base_url_option
@format_option
def list_sessions(limit: int, base_url: Optional[str]) -> None:
    """List session ids, newest first."""
    with open_rest(base_url) as rest:
        found = fetch_pages(
            lambda size, offset: rest.list_sessions(limit=size, offset=offset).result().sessions,
            limit,
            100,
        )
    if wants_json():
        print_json({"sessions": found})
        return
    print_table(count(len(found), "session"), ["Session ID"], [[item] for item in found])


@session.command("info")
@click.argument("session_id")
@base_url_option
@format_option
def show_session(session_id: str, base_url: Optional[str]) -> None:
    """Show the training runs and samplers of a session."""
    with open_rest(base_url) as rest:
        found = rest.get_session(session_id).result()
    if wants_json():
        print_json({"session_id": session_id, **found.to_wire()})
        return
    rows = [["Session ID", session_id], ["Name", found.display_name or "-"]]
    rows += [["Training Run", run_id] for run_id in found.training_run_ids]
    rows += [["Sampler", sampler_id] for sampler_id in found.sampler_ids]
    rows += [[f"Metadata: {key}", str(value)] for key, value in (found.user_metadata or {}).items()]
    print_facts(f"Session {session_id}", rows)


@session.command("export-trace")
@click.argument("session_id")
@click.option("-o", "--output", metavar="FILE", help="File to write (default: SESSION_ID.pftrace).")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@click.option("--url-only", is_flag=True, help="Print the signed URL; download nothing.")
@base_url_option
@format_option
def export_trace(
    session_id: str, output: Optional[str], force: bool, url_only: bool, base_url: Optional[str]
) -> None:
    """Export the trace of a session (a Perfetto file), and download it."""
    target = Path(output or f"{session_id.replace('/', '_')}.pftrace").absolute()
    with open_rest(base_url) as rest:
        url = rest.export_session_trace(session_id).result()
        if url_only:
            if wants_json():
                print_json({"session_id": session_id, "url": url})
            else:
                echo(url)
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
    if wants_json():
        facts = {"destination": str(target), "file_size_bytes": n_bytes}
        print_json({"session_id": session_id, **facts})
    else:
        echo(f"{target} ({size(n_bytes)})")
