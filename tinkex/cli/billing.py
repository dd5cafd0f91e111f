"""``tinkex billing``: usage, and the cost of stored checkpoints."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Dict, Optional

import click

import tinkex
from tinkex.cli.commands import Group
from tinkex.cli.connect import with_admin
from tinkex.cli.output import count, print_csv, print_table, size
from tinkex.types import BillingUsageEvent, CheckpointStorageUsage


@click.group(cls=Group)
def billing() -> None:
    """Show usage, and the cost of stored checkpoints."""


@billing.command("usage")
@click.argument("start")
@click.argument("end")
@click.option("--csv", "csv_path", metavar="PATH", help='Write the usage as CSV; "-" is stdout.')
@click.option("--sessions-csv", metavar="PATH", help="Write the sessions' metadata as CSV.")
@with_admin
def usage(
    admin: tinkex.AdminClient,
    start: str,
    end: str,
    csv_path: Optional[str],
    sessions_csv: Optional[str],
) -> None:
    """Show usage from START to END (exclusive): whole hours of UTC, at most 14 days apart.

    Examples: 2026-01-31, 2026-01-31T15:00:00Z.
    """
    found = admin.get_billing_usage(start, end).result()
    if csv_path is not None:
        rows = [_facts(event) for event in found.data]
        columns = list(dict.fromkeys(name for row in [_NO_USAGE, *rows] for name in row))
        print_csv(csv_path, columns, [[row.get(name) for name in columns] for row in rows])
    if sessions_csv is not None:
        sessions = [
            [name, json.dumps(item.user_metadata or {})] for name, item in found.sessions.items()
        ]
        print_csv(sessions_csv, ["session_id", "user_metadata"], sessions)
    if "-" in (csv_path, sessions_csv):
        return  # stdout holds the CSV
    through = found.cost_data_through
    known = f"; costs are known until {through:%Y-%m-%d %H:%M}" if through else ""
    print_table(
        count(len(found.data), "entry", "entries") + known,
        ["From", "Kind", "Amount", "Model", "Session", "Cost (USD)"],
        [
            [
                f"{event.bucket_start:%Y-%m-%d %H:%M}",
                str(event.event_info.type),
                _amount(event),
                event.base_model or "-",
                event.session_id or "-",
                _usd(event.estimated_cost_usd),
            ]
            for event in found.data
        ],
        as_json={"data": [], "sessions": {}, "cost_data_through": None, **found.to_wire()},
    )


@billing.command("checkpoint-storage")
@click.option("--project-id", metavar="ID", help="Only checkpoints of this project.")
@click.option("--csv", "csv_path", metavar="PATH", help='Write the table as CSV; "-" is stdout.')
@with_admin
def checkpoint_storage(
    admin: tinkex.AdminClient, project_id: Optional[str], csv_path: Optional[str]
) -> None:
    """Show the size and cost of the checkpoints stored now."""
    found = admin.get_current_checkpoint_storage_usage(project_id).result()
    rate = found.effective_rate_usd_per_gigabyte_month
    if csv_path is not None:
        columns = [field.name for field in dataclasses.fields(CheckpointStorageUsage)]
        print_csv(csv_path, columns, [[getattr(row, n) for n in columns] for row in found.data])
        if csv_path == "-":
            return
    rows = [row.to_wire() for row in found.data]
    per = "" if rate is None else f" at {_usd(rate)} USD per gigabyte and month"
    print_table(
        f"Checkpoints{per}",
        ["Project", "User", "Checkpoints", "Size", "Per Month (USD)"],
        [
            [
                row.project_id or "-",
                row.user_email or row.user_name or row.org_user_urn or "-",
                str(row.checkpoint_count),
                size(row.size_bytes),
                _usd(row.estimated_monthly_cost_usd),
            ]
            for row in found.data
        ],
        as_json={"effective_rate_usd_per_gigabyte_month": rate, "data": rows},
    )


def _facts(event: BillingUsageEvent) -> Dict[str, Any]:
    """Return an entry as one flat row."""
    facts = event.to_wire()
    info = facts.pop("event_info")
    return {**_NO_USAGE, **facts, **info}


#: The columns common to all kinds of entries.
_NO_USAGE: Dict[str, Any] = {
    **{f.name: None for f in dataclasses.fields(BillingUsageEvent) if f.name != "event_info"},
    "type": None,
}


def _amount(event: BillingUsageEvent) -> str:
    info = event.event_info.to_wire()
    amounts = (
        ("token_count", "tokens"),
        ("count", "checkpoints"),
        ("gigabyte_hours", "GB-hours"),
    )
    parts = [f"{info[name]} {unit}" for name, unit in amounts if info.get(name) is not None]
    parts += [name for name in ("cached", "free") if info.get(name)]
    return ", ".join(parts) or "-"


def _usd(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.4f}"
