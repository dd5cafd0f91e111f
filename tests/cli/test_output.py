"""How the command line writes sizes, times and tables."""

from __future__ import annotations

import io
from datetime import datetime, timedelta, timezone

import pytest

from tinkex.cli.output import print_facts, print_table, size, when

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


def test_an_unknown_time():
    assert when(None) == "-"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


PATH = "tinker://aeb458af-cbb7-4917-a48d-ea900a637073:train:0/weights/a name"


@pytest.mark.parametrize("columns", [10, 40, 80, 400])
def test_a_table_on_a_terminal_breaks_no_value(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    print_table("2 things", ["Name", "Path", "Size"], [["a", PATH, "1 B"], ["b", PATH * 2, "-"]])
    printed = terminal.getvalue().splitlines()
    assert printed[0] == "2 things"
    values = [value for line in printed for value in line.split("  ")]
    assert [value.strip() for value in values if "tinker" in value] == [PATH, PATH * 2]
    assert ("Path  " + PATH in printed) == (columns < 400), "one fact a line, where it is narrow"


def test_wide_characters_keep_the_columns_of_a_table_in_line(capsys):
    print_table("", ["Name", "X"], [["漢字", "1"], ["ab", "2"], ["e\u0301", "3"]])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "Name  X",
        "----  -",
        "漢字  1",
        "ab    2",
        "e\u0301     3",
    ]


def test_facts_are_printed_one_per_line(capsys):
    print_facts("a run", [["Run ID", PATH], ["Note", "two\nlines"]])
    assert capsys.readouterr().out == f"a run\n\nRun ID  {PATH}\nNote    two\\nlines\n"


def test_a_piped_table_truncates_nothing_and_reformats_no_ids(capsys):
    run_id = "aeb458af-cbb7-4917-a48d-ea900a637073:train:0" * 300
    print_table("title", ["Run ID", "Value"], [[run_id, "[bold]"]])
    printed = capsys.readouterr().out
    assert run_id in printed
    assert "[bold]" in printed
