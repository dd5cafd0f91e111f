"""How the command line writes sizes, times and tables."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from tinkex.cli.output import print_table, size, when

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (5 * 1024**4, "5.0 TiB"),
    ],
)
def test_sizes(n_bytes, text):
    assert size(n_bytes) == text


@pytest.mark.parametrize(
    ("ago", "text"),
    [
        (timedelta(seconds=59), "just now"),
        (timedelta(seconds=60), "1 minute ago"),
        (timedelta(hours=2, minutes=59), "2 hours ago"),
        (timedelta(days=29, hours=23), "29 days ago"),
        (timedelta(days=30), "2026-04-01 12:00"),
        (timedelta(days=-1), "2026-05-02 12:00"),
    ],
)
def test_times(ago, text):
    assert when(NOW - ago, NOW) == text


def test_a_time_that_is_unknown():
    assert when(None) == "-"


def test_a_piped_table_cuts_nothing_and_reads_nothing_into_ids(capsys):
    run_id = "aeb458af-cbb7-4917-a48d-ea900a637073:train:0" * 3
    print_table("title", ["Run ID", "Value"], [[run_id, "[bold]"]])
    printed = capsys.readouterr().out
    assert run_id in printed
    assert "[bold]" in printed
