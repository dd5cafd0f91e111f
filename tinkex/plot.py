"""Plots runs in a notebook: `plot` draws the metrics that their loggers have written.

Needs matplotlib (``pip install "tinkex[plots]"``).  The curves are the same as in ``metrics.png``
and on the embedded server's page.
"""

from __future__ import annotations

import math
import numbers
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Union

from tinkex.errors import InvalidInputError, a_type
from tinkex.loggers.curves import Rows, draw, import_figures, panels_of, png_of
from tinkex.loggers.files import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot"]

#: A run folder, or metrics as `tinkex.loggers.read_metrics` returns them.
Source = Union[str, "os.PathLike[str]", Sequence[Mapping[str, Any]]]


def plot(
    *runs: Source,
    metrics: Optional[Sequence[str]] = None,
    smoothing: float = 0.6,
    log_scale: bool = False,
) -> Figure:
    """Draw the metrics of runs by step; to compare several runs, each metric gets its own panel.

    ::

        from tinkex.plot import plot

        plot("runs/poems")
        plot("runs/a", "runs/b", metrics=["loss"], log_scale=True)

    A notebook shows the figure that is the last value of a cell; ``savefig`` writes it to a file.
    Runs may be in progress.  Each call reads the files again; safe from any thread.

    Args:
        runs: run folders, or their metrics: lists of dicts with ``"step"``.
        metrics: names of the metrics, each in its own panel; by default losses and rewards, or all
            metrics if there are neither.
        smoothing: weight of earlier values in the moving average that is drawn over each curve,
            from 0 (none) to below 1.
        log_scale: whether vertical axes are logarithmic.

    Raises:
        InvalidInputError: there is nothing to draw, or an argument is out of range.
        RunFolderError: a folder has no ``metrics.jsonl`` that can be read.
        ConfigError: matplotlib is not installed.
    """
    if not runs:
        raise InvalidInputError("there is nothing to plot", hint="Give run folders, or metrics.")
    weight: Any = smoothing
    if not isinstance(weight, numbers.Real) or not 0 <= float(weight) < 1:
        raise InvalidInputError(f"smoothing is {smoothing!r}; it must be from 0 to below 1")
    if isinstance(metrics, str) or (metrics is not None and not metrics):
        raise InvalidInputError(f"metrics is {metrics!r}; it must be a list of names")
    figures = import_figures("tinkex.plot")
    rows_of = _labelled(runs)
    every_row = [row for rows in rows_of.values() for row in rows]
    panels = panels_of(every_row) if metrics is None else [[name] for name in metrics]
    known = {name for row in every_row for name in row} - {"step"}
    unknown = [name for names in panels for name in names if name not in known]
    if not known:
        raise InvalidInputError(
            "the runs have no metrics yet", hint="They appear once a step has been logged."
        )
    if unknown:
        raise InvalidInputError(
            f"the runs have no metric {unknown[0]!r}; they have {', '.join(sorted(known))}"
        )
    if len(rows_of) > 1:  # curves of several runs are compared one metric at a time
        panels = [[name] for names in panels for name in names]
    figure = draw(figures, rows_of, panels, smoothing=smoothing, log_scale=log_scale)
    # Notebooks call this method; matplotlib defines its own only once pyplot is imported.
    figure._repr_png_ = lambda: png_of(figure)
    return figure


def _labelled(runs: Sequence[Source]) -> Dict[str, Rows]:
    """Return the rows of each run by label: the name of its folder, or its number."""
    found: Dict[str, Rows] = {}
    for place, run in enumerate(runs, 1):
        if isinstance(run, (str, os.PathLike)):
            name = Path(run).absolute().name
            found[os.fspath(run) if name in found else name] = read_metrics(Path(run))
        else:
            found[f"run {place}"] = _checked(run)
    return found if len(runs) > 1 else {"": next(iter(found.values()))}


def _checked(run: object) -> List[Mapping[str, Any]]:
    rows: List[Any] = list(run) if isinstance(run, Sequence) else [run]
    for row in rows:
        if not isinstance(row, Mapping) or "step" not in row:
            lacks = ' without "step"' if isinstance(row, Mapping) else ""
            raise InvalidInputError(
                f"{a_type(row)}{lacks} is not a row of metrics",
                hint='Give a run folder, or dicts with "step", as read_metrics(folder) returns.',
            )
    return [{name: _number(name, value) for name, value in row.items()} for row in rows]


def _number(name: str, value: object) -> object:
    if value is None:  # stands for nan in the lines of metrics.jsonl
        return math.nan
    if not isinstance(value, numbers.Real):
        raise InvalidInputError(f"the metric {name!r} has {value!r:.40}, which is not a number")
    return value
