"""The progress of ``tinkex train`` on stderr: a bar on a terminal, otherwise lines.

Used by one thread, and has none of its own; `rich` redraws its bar in one.
"""

from __future__ import annotations

import contextlib
import os
import time
from types import TracebackType
from typing import Any, Mapping, Optional, Type

from tinkex.cli import status_line
from tinkex.cli.terminal import echo_error

#: Minimum seconds between two lines; a line with a held-out loss is always written.
_GAP_S = 5.0


class TrainingProgress:
    """Shows the progress that is reported to `log`, within a ``with`` block.

    Args:
        steps: the number of steps in the whole run.
        done: how many of them are done already.
    """

    def __init__(self, steps: int, done: int) -> None:
        self._steps = steps
        self._first = done
        self._heldout: Optional[float] = None
        self._tokens = 0.0
        self._began = self._written = time.monotonic()
        self._line: Optional[status_line.StatusLine] = None
        self._bar: Any = None
        self._shown = contextlib.ExitStack()

    def __enter__(self) -> TrainingProgress:
        line = self._line = status_line.current()
        if line is not None:
            line.doing = ""  # until a log record reports a wait, e.g. for an unreachable server
            if line.live:  # the bar redraws its own line, and shows such a wait in it
                self._shown.enter_context(status_line.hidden())
                self._bar = self._shown.enter_context(_bar(self._steps, self._first, line))
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._shown.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of *step*; a step after the last one stands for the final weights."""
        if self._line is not None:
            self._line.doing = ""  # a step is done, so any wait is over
        measured = "heldout_loss" in metrics
        self._heldout = metrics.get("heldout_loss", self._heldout)
        self._tokens += metrics.get("tokens", 0.0)
        elapsed_s = max(time.monotonic() - self._began, 1e-9)
        # The bar keeps showing the last held-out loss; a line shows it only if it is new.
        shown = self._heldout is not None and (measured or self._bar is not None)
        parts = [
            *([f"loss {metrics['loss']:.3f}"] if "loss" in metrics else []),
            *([f"held-out {self._heldout:.3f}"] if shown else []),
            *([f"{self._tokens / elapsed_s:.0f} tokens/s"] if "tokens" in metrics else []),
        ]
        if self._bar is not None:
            task = self._bar.task_ids[0]
            done = min(step + 1, self._steps)
            self._bar.update(task, completed=done, shown="  ".join(parts))
            return
        if os.environ.get("TINKEX_NO_STATUS"):
            return
        now, ends = time.monotonic(), step >= self._steps - 1
        if measured or ends or now - self._written >= _GAP_S:
            self._written = now
            where = f"step {step + 1}/{self._steps}" if step < self._steps else "after training"
            echo_error(f"{where}: {', '.join(parts)}")


def _bar(steps: int, done: int, line: status_line.StatusLine) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class MetricsColumn(TextColumn):
        def render(self, task: Any) -> Any:
            return Text(line.doing) if line.doing else super().render(task)

    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        MetricsColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task("train", total=steps, completed=done, shown="")
    return bar
