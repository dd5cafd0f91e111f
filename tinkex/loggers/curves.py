"""A plot of the losses and rewards of a run, as ``metrics.png`` in its folder."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from typing import Any, List, Mapping, Sequence, Tuple

from tinkex._runtime.late_import import import_extra
from tinkex.loggers.files import Row, read_metrics, replace_file

PNG_NAME = "metrics.png"

#: Each word has its own panel, with the metrics that have it in their name.
PANELS = ("loss", "reward")

#: Plotting takes at most this share of the run's time.
_SHARE = 0.01

#: The lines of a run, as `read_metrics` returns them.
Rows = Sequence[Mapping[str, Any]]


class Plot:
    """Draws ``metrics.png`` in *folder* with matplotlib, at most every *every_s* seconds.

    `log` draws it when it is due, and `close` once more if needed.  Not thread-safe.

    Raises:
        ConfigError: matplotlib is not installed.
    """

    def __init__(self, folder: Path, every_s: float) -> None:
        self._figures = import_figures()
        self._folder = folder
        self._every_s = every_s
        self._due = time.monotonic() + every_s
        self._drawn = True

    def rewind(self, step: int) -> None:
        """Do nothing: the plot shows what ``metrics.jsonl`` has."""

    def log(self, step: int, metrics: Row, row: Row) -> None:
        """Draw the plot, if it is due."""
        self._drawn = False
        started = time.monotonic()
        if started >= self._due:
            self._draw()
            finished = time.monotonic()
            self._due = finished + max(self._every_s, (finished - started) / _SHARE)

    def close(self) -> None:
        """Draw once more if anything was logged since the last time."""
        if not self._drawn:
            self._draw()

    def _draw(self) -> None:
        self._drawn = True
        rows = read_metrics(self._folder)
        figure = draw(self._figures, {"": rows}, panels_of(rows))
        replace_file(self._folder / PNG_NAME, png_of(figure))


def import_figures(user: str = 'the logger "png"') -> Any:
    """Return ``matplotlib.figure``, which *user* needs; ConfigError if it is not installed.

    pyplot is not used, since it keeps figures in memory and chooses a window system.
    """
    return import_extra("matplotlib.figure", "Figure", user=user, extra="plots")


def panels_of(rows: Rows) -> List[List[str]]:
    """Return the metric names of each panel: one per word of `PANELS`, or else all in one panel."""
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name != "step"]
    panels = [[name for name in names if word in name.lower()] for word in PANELS]
    return [panel for panel in panels if panel] or [names]


def draw(
    figures: Any,
    runs: Mapping[str, Rows],
    panels: Sequence[Sequence[str]],
    *,
    smoothing: float = 0.0,
    log_scale: bool = False,
) -> Any:
    """Return a new ``matplotlib.figure.Figure`` with the curves of *runs*, labelled by their keys.

    Args:
        figures: the module that `import_figures` returns.
        runs: the rows of each run, by label.
        panels: the names of the metrics in each panel.
        smoothing: weight of earlier values in the moving average, from 0 to below 1; if it is not
            0, the unsmoothed curves are drawn behind.
        log_scale: whether vertical axes are logarithmic.
    """
    figure = figures.Figure(figsize=(8, 4 * len(panels)), layout="constrained")
    for axes, names in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels):
        for label, rows in runs.items():
            for name in names:
                points = [(row["step"], row[name]) for row in rows if name in row]
                if points:
                    title = label if label and len(names) == 1 else f"{label} {name}".strip()
                    sparse = len(points) < len(rows) / 2
                    _draw_curve(axes, points, title, "o" if sparse else None, smoothing)
        axes.set_xlabel("step")
        if len(runs) > 1 and len(names) == 1:
            axes.set_ylabel(names[0])
        if log_scale:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def png_of(figure: Any) -> bytes:
    """Return *figure* as a PNG."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def smoothed(values: Sequence[float], weight: float) -> List[float]:
    """Return the bias-corrected exponential moving average of *values*; nan is skipped.

    The embedded server's page draws the same average.
    """
    found: List[float] = []
    total = norm = 0.0
    for value in values:
        if not math.isnan(value):
            total = total * weight + value * (1 - weight)
            norm = norm * weight + (1 - weight)
        found.append(total / norm if norm else math.nan)
    return found


def _draw_curve(
    axes: Any, points: List[Tuple[int, float]], title: str, marker: Any, smoothing: float
) -> None:
    if not smoothing:
        axes.plot(*zip(*points), label=title, marker=marker)
        return
    steps, values = zip(*points)
    (line,) = axes.plot(steps, smoothed(values, smoothing), label=title, marker=marker)
    axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=1, zorder=1)
