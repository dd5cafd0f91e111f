"""``tinkex status``: what the clients on this machine have in flight, and run folders."""

from __future__ import annotations

import dataclasses
import time
from datetime import datetime, timezone
from typing import Any, Dict, List, Tuple

import click

from tinkex._sessions.process_status import ProcessStatus, SessionStatus, read_processes
from tinkex.cli.commands import Command
from tinkex.cli.output import count, format_option, print_table, when
from tinkex.runs import read_run

#: A process whose status is older than this, in seconds, gets a remark.
_LATE_S = 60.0


@click.command(cls=Command)
@click.argument("folders", metavar="[FOLDER]...", nargs=-1)
@format_option
def status(folders: Tuple[str, ...]) -> None:
    """Show the sessions of this user's programs on this machine, and their work in flight.

    Given run folders, show the progress of those runs instead, even if their programs have ended.

    The information is up to ten seconds old.  Programs that only list or download things have no
    session and are not shown.
    """
    if folders:
        _show_runs(folders)
    else:
        _show_processes()


def _show_processes() -> None:
    now = time.time()
    found = read_processes(now)
    sessions = [(process, session) for process in found for session in process.sessions]
    print_table(
        f"{count(len(sessions), 'session')} of {count(len(found), 'process', 'processes')}",
        ["PID", "Program", "Server", "Session ID", "In Flight", "Heartbeat", "As Of"],
        [_row(process, session, now) for process, session in sessions],
        as_json={"processes": [dataclasses.asdict(process) for process in found]},
    )


def _row(process: ProcessStatus, session: SessionStatus, now: float) -> List[str]:
    work = [f"{n} {kind}" for kind, n in sorted(session.in_flight.items())]
    work += [f"{session.queued} queued"] if session.queued else []
    beat = f"ok {_ago(session.last_success_at, now)}"
    if session.failures:
        beat = f"failing for {_ago(session.last_success_at, now)}: {session.last_error}"
    late = now - process.updated_at > _LATE_S
    return [
        str(process.pid),
        process.program,
        session.server,
        session.session_id,
        ", ".join(work) or "-",
        beat,
        _ago(process.updated_at, now) + (" (suspended or busy?)" if late else ""),
    ]


def _ago(at: float, now: float) -> str:
    seconds = max(0.0, now - at)
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _show_runs(folders: Tuple[str, ...]) -> None:
    runs: List[Dict[str, Any]] = []
    for folder in folders:
        record = read_run(folder)
        newest = record.checkpoints[-1] if record.checkpoints else None
        facts = {
            "folder": folder,
            "base_model": record.spec.get("base_model"),
            "steps": record.steps[-1].index + 1 if record.steps else 0,
            "last_step_at": record.steps[-1].at if record.steps else None,
            "checkpoint": newest.path if newest else None,
            "checkpoint_steps": newest.steps if newest else None,
        }
        runs.append(facts)
    print_table(
        count(len(runs), "run"),
        ["Folder", "Base Model", "Steps", "Last Step", "Checkpoint"],
        [
            [
                run["folder"],
                run["base_model"] or "-",
                str(run["steps"]),
                _time_of(run["last_step_at"]),
                f"{run['checkpoint']} (step {run['checkpoint_steps']})"
                if run["checkpoint"]
                else "-",
            ]
            for run in runs
        ],
        as_json={"runs": runs},
    )


def _time_of(at: Any) -> str:
    return "-" if at is None else when(datetime.fromtimestamp(at, timezone.utc))
