"""tinkex.plot: the curves of runs in a notebook."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, List

import pytest

from tinkex.errors import InvalidInputError, RunFolderError
from tinkex.loggers import open_loggers, read_metrics
from tinkex.loggers.curves import smoothed
from tinkex.plot import plot

LOSSES = [4.0, 2.0, 3.0, 1.0]


def run_folder(path: Path, **changes: float) -> Path:
    with open_loggers(path) as loggers:
        for step, loss in enumerate(LOSSES):
            loggers.log(step, {"loss": loss, "tokens": 7, **changes})
    return path


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib", reason='matplotlib is in the extra "plots"')


def curves_of(axes: Any) -> List[Any]:
    return [(line.get_label(), line.get_ydata().tolist()) for line in axes.get_lines()]


def test_a_run_is_drawn_with_its_moving_average_in_front(matplotlib: Any, tmp_path: Path) -> None:
    figure = plot(run_folder(tmp_path), smoothing=0.5)
    (axes,) = figure.axes
    smooth, raw = curves_of(axes)
    assert smooth == ("loss", pytest.approx([4.0, 8 / 3, 20 / 7, 28 / 15]))
    assert raw[1] == LOSSES
    assert axes.get_xlabel() == "step"


def test_without_smoothing_there_is_one_curve(matplotlib: Any, tmp_path: Path) -> None:
    (axes,) = plot(run_folder(tmp_path), smoothing=0, log_scale=True).axes
    assert curves_of(axes) == [("loss", LOSSES)]
    assert axes.get_yscale() == "log"


def test_several_runs_are_compared_metric_by_metric(matplotlib: Any, tmp_path: Path) -> None:
    first = run_folder(tmp_path / "a", reward=1.0)
    second = run_folder(tmp_path / "b")
    losses, rewards = plot(first, str(second), smoothing=0).axes
    assert [label for label, _ in curves_of(losses)] == ["a", "b"]
    assert [label for label, _ in curves_of(rewards)] == ["a"]
    assert (losses.get_ylabel(), rewards.get_ylabel()) == ("loss", "reward")


def test_folders_with_the_same_name_have_different_labels(matplotlib: Any, tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / part / "run") for part in "ab"]
    (axes,) = plot(*folders, smoothing=0).axes
    assert [label for label, _ in curves_of(axes)] == ["run", str(folders[1])]


def test_a_list_of_metrics_is_drawn_like_a_folder(matplotlib: Any, tmp_path: Path) -> None:
    rows = read_metrics(run_folder(tmp_path))
    (axes,) = plot(rows, metrics=["tokens"], smoothing=0).axes
    assert curves_of(axes) == [("tokens", [7, 7, 7, 7])]
    (axes,) = plot(rows, rows[:2], smoothing=0).axes
    assert [label for label, _ in curves_of(axes)] == ["run 1", "run 2"]


def test_a_notebook_shows_the_figure(matplotlib: Any, tmp_path: Path) -> None:
    assert plot(run_folder(tmp_path))._repr_png_().startswith(b"\x89PNG")


def test_the_average_skips_values_that_are_not_numbers() -> None:
    assert smoothed([math.nan, 2.0, math.nan], 0.9)[1:] == [pytest.approx(2.0)] * 2
    assert math.isnan(smoothed([math.nan], 0.9)[0])
    assert smoothed([1.0, 5.0], 0.0) == [1.0, 5.0]


def test_a_missing_loss_may_be_none(matplotlib: Any) -> None:
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 3.0}]
    (axes,) = plot(rows).axes
    (average, _) = axes.get_lines()
    assert len(average.get_ydata()) == 3


def test_metrics_that_cannot_be_drawn_are_an_error(matplotlib: Any, tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    with pytest.raises(InvalidInputError, match="nothing to plot"):
        plot()
    with pytest.raises(InvalidInputError, match=r"smoothing is 1\.0"):
        plot(folder, smoothing=1.0)
    with pytest.raises(InvalidInputError, match="smoothing is 'much'"):
        plot(folder, smoothing="much")  # type: ignore[arg-type]
    for names in ("loss", []):
        with pytest.raises(InvalidInputError, match="must be a list of names"):
            plot(folder, metrics=names)
    with pytest.raises(InvalidInputError, match="no metric 'lost'; they have loss, tokens"):
        plot(folder, metrics=["lost"])
    with pytest.raises(InvalidInputError, match="the runs have no metrics yet"):
        plot([])
    with pytest.raises(InvalidInputError, match="'note' has 'x', which is not a number"):
        plot([{"step": 1, "note": "x"}])
    with pytest.raises(InvalidInputError, match='a dict without "step" is not a row of metrics'):
        plot([{"loss": 1.0}])
    with pytest.raises(InvalidInputError, match="is not a row of metrics"):
        plot({"loss": 1.0})  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(RunFolderError, match="cannot read") as error:
            plot(nothing)
        assert error.value.hint == (
            f"{nothing} is not a run folder, or nothing has been logged in it yet."
        )
    with pytest.raises(RunFolderError, match="is not a folder") as error:
        plot(folder / "metrics.jsonl")
    assert "Give a run folder" in str(error.value)
