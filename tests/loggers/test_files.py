"""metrics.jsonl and metrics.csv: each step once, through crashes and repeated steps."""

from __future__ import annotations

import csv
import errno
import json
import logging
import math
import subprocess
import sys

import numpy as np
import pytest

from tinkex.errors import ClientClosedError, InvalidInputError, RunFolderError
from tinkex.loggers import open_loggers, read_metrics


def lines(folder):
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def table(folder):
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_each_step_is_a_line_as_soon_as_it_is_logged(tmp_path):
    with open_loggers(tmp_path / "new" / "run") as loggers:
        loggers.log(0, {"loss": 2.5, "tokens": 17})
        assert lines(tmp_path / "new" / "run") == [{"step": 0, "loss": 2.5, "tokens": 17}]
        loggers.log(1, {"loss": 1.5, "tokens": 19})
    assert lines(tmp_path / "new" / "run")[1:] == [{"step": 1, "loss": 1.5, "tokens": 19}]


def test_metrics_logged_later_for_the_same_step_join_its_line(tmp_path):
    with open_loggers(tmp_path, ["csv"]) as loggers:
        loggers.log(0, {"loss": 2.0})
        loggers.log(1, {"loss": 1.23456789})
        loggers.log(1, {"heldout_loss": 3.0, "loss": 1.0})
        loggers.log(2, {"loss": 0.5})
    assert lines(tmp_path) == [
        {"step": 0, "loss": 2.0},
        {"step": 1, "loss": 1.0, "heldout_loss": 3.0},
        {"step": 2, "loss": 0.5},
    ]
    assert table(tmp_path) == [
        {"step": "0", "loss": "2.0", "heldout_loss": ""},
        {"step": "1", "loss": "1.0", "heldout_loss": "3.0"},
        {"step": "2", "loss": "0.5", "heldout_loss": ""},
    ]


def test_a_continued_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    with open_loggers(tmp_path, ["csv"]) as loggers:
        for step in range(6):
            loggers.log(step, {"loss": 10.0 - step, "first": 1})
    with open_loggers(tmp_path, ["csv"]) as loggers:
        loggers.log(3, {"loss": 70.0})
        loggers.log(4, {"loss": 60.0})
    expected = [(0, 10.0), (1, 9.0), (2, 8.0), (3, 70.0), (4, 60.0)]
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == expected
    assert [(int(row["step"]), float(row["loss"])) for row in table(tmp_path)] == expected
    assert [row["first"] for row in table(tmp_path)] == ["1", "1", "1", "", ""]


def test_a_run_that_goes_back_without_a_restart_replaces_its_steps(tmp_path):
    with open_loggers(tmp_path, ["csv"]) as loggers:
        for step in [0, 1, 2, 3, 1, 2]:
            loggers.log(step, {"loss": float(step)})
    assert [row["step"] for row in lines(tmp_path)] == [0, 1, 2]
    assert [row["step"] for row in table(tmp_path)] == ["0", "1", "2"]


def test_opening_without_logging_changes_nothing(tmp_path):
    with open_loggers(tmp_path) as loggers:
        loggers.log(0, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    open_loggers(tmp_path, ["csv"]).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_torn_last_line_is_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    assert read_metrics(tmp_path) == [{"step": 0, "loss": 1.0}]
    with open_loggers(tmp_path) as loggers:
        loggers.log(1, {"loss": 2})
    assert lines(tmp_path) == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 2}]


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"loss": 1}', b'{"step": "a"}', b""])
def test_a_damaged_line_is_reported_with_its_number(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(RunFolderError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        open_loggers(tmp_path)
    with pytest.raises(RunFolderError, match="line 2"):
        read_metrics(tmp_path)


def test_values_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path):
    with open_loggers(tmp_path, ["csv"]) as loggers:
        loggers.log(0, {"loss": math.nan, "gradient_norm": math.inf})
    assert lines(tmp_path) == [{"step": 0, "loss": None, "gradient_norm": None}]
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"])
    assert math.isnan(row["gradient_norm"])
    assert table(tmp_path)[0]["loss"] == "nan"


def test_numpy_numbers_are_accepted(tmp_path):
    with open_loggers(tmp_path) as loggers:
        loggers.log(np.int64(0), {"loss": np.float32(0.5), "tokens": np.int64(3)})
    assert lines(tmp_path) == [{"step": 0, "loss": 0.5, "tokens": 3}]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": "low"}, "the metric 'loss' must be a number, not a str"),
        ({"loss": None}, "the metric 'loss' must be a number, not None"),
        ({"step": 1.0}, "a metric cannot be named 'step'"),
    ],
)
def test_a_value_that_is_not_a_number_is_refused_and_nothing_is_written(tmp_path, metrics, message):
    with open_loggers(tmp_path) as loggers:
        with pytest.raises(InvalidInputError, match=message):
            loggers.log(0, metrics)
    assert lines(tmp_path) == []


@pytest.mark.parametrize("step", [-1, 0.5, "1", True, None])
def test_steps_count_from_0(tmp_path, step):
    with open_loggers(tmp_path) as loggers:
        with pytest.raises(InvalidInputError, match="step must be an int"):
            loggers.log(step, {"loss": 1.0})


def test_a_full_disk_is_an_error_and_leaves_the_lines_before(tmp_path):
    """/dev/full stands for the full disk, or else the child limits the size of its files."""
    script = (
        "import resource, signal, sys\n"
        "from tinkex.errors import RunFolderError\n"
        "from tinkex.loggers import open_loggers\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "loggers = open_loggers(sys.argv[1])\n"
        "loggers.log(0, {'loss': 1.0})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))\n"
        "try:\n"
        "    loggers.log(1, {'loss': 1.0})\n"
        "except RunFolderError as error:\n"
        "    print(error)\n"
    )
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert "cannot write the metrics" in done.stdout, done.stderr
    assert "it continues from the last checkpoint" in done.stdout
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 0, "loss": 1.0}\n'


def test_a_failing_output_is_dropped_with_a_warning(tmp_path, monkeypatch, caplog):
    from tinkex.loggers import files

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_loggers(tmp_path, ["csv"]) as loggers:
        monkeypatch.setattr(files, "replace_file", full)
        with caplog.at_level(logging.WARNING, "tinkex"):
            loggers.log(0, {"loss": 1.0})
            loggers.log(1, {"loss": 1.0})
    (record,) = caplog.records
    assert "the logger 'csv' failed; the run goes on without it" in record.getMessage()
    assert [row["step"] for row in lines(tmp_path)] == [0, 1]


def test_closed_loggers_refuse_metrics(tmp_path):
    loggers = open_loggers(tmp_path)
    loggers.close()
    loggers.close()
    with pytest.raises(ClientClosedError):
        loggers.log(0, {})


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot write the metrics to"):
        open_loggers(tmp_path / "file" / "run")


@pytest.mark.parametrize("names", [["cvs"], "csv"])
def test_an_unknown_logger_is_refused_with_the_known_ones(tmp_path, names):
    with pytest.raises(InvalidInputError, match="csv, png, tensorboard, wandb, trackio"):
        open_loggers(tmp_path, names)
