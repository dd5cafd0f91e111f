"""A plot of the losses and rewards of a run, as ``metrics.png`` in its folder."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any, Dict, List

from tinkex._runtime.late_import import import_extra
from tinkex.loggers.files import Row, read_metrics, replace_file

PNG_NAME = "metrics.png"

#: Each has a panel of its own, with the metrics that have the word in their name.
PANELS = ("loss", "reward")

#: A plot costs at most this part of the run's time.
_SHARE = 0.01


class Plot:
    """Draws ``metrics.png`` in *folder* with matplotlib, at most every *every_s* seconds.

    It is drawn by a call of `log` when it is due, and by `close`.  For one thread.

    Raises:
        ConfigError: matplotlib is not installed.
    """

    def __init__(self, folder: Path, every_s: float) -> None:
        # Without pyplot, which keeps figures and chooses a window system.
        self._figures = import_extra(
            "matplotlib.figure", "Figure", user='the logger "png"', extra="plots"
        )
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
        """Draw what was logged since the last time."""
        if not self._drawn:
            self._draw()

    def _draw(self) -> None:
        self._drawn = True
        rows = read_metrics(self._folder)
        panels = panels_of(rows)
        figure = self._figures.Figure(figsize=(8, 4 * len(panels)), layout="constrained")
        for axes, names in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels):
            for name in names:
                points = [(row["step"], row[name]) for row in rows if name in row]
                sparse = len(points) < len(rows) / 2
                axes.plot(*zip(*points), label=name, marker="o" if sparse else None)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            axes.legend()
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        replace_file(self._folder / PNG_NAME, image.getvalue())


def panels_of(rows: List[Dict[str, Any]]) -> List[List[str]]:
    """Return the names of the metrics in each panel: those in `PANELS`, or else all in one."""
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name != "step"]
    panels = [[name for name in names if word in name.lower()] for word in PANELS]
    return [panel for panel in panels if panel] or [names]
