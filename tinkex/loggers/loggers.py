"""Loggers: sends the metrics of a run to its ``metrics.jsonl``, and to further outputs."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Protocol, Sequence, Type, Union

from tinkex._runtime.numeric import to_float, to_int
from tinkex.errors import ClientClosedError, InvalidInputError, a_type
from tinkex.loggers.curves import Plot, import_figures
from tinkex.loggers.files import CsvFile, MetricsFile, Row
from tinkex.loggers.trackers import (
    TensorBoard,
    import_tensorboard,
    import_trackio,
    import_wandb,
    open_trackio,
    open_wandb,
)

logger = logging.getLogger(__name__)

#: The outputs besides ``metrics.jsonl``.
NAMES = ("csv", "png", "tensorboard", "wandb", "trackio")


class Logger(Protocol):
    """What recipes log to: `Loggers`, or an object of your own."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of *step*, counted from 0 over the whole run."""

    def close(self) -> None:
        """Write what is still buffered."""


class Output(Protocol):
    """One of the places that `Loggers` writes to."""

    def rewind(self, step: int) -> None:
        """Prepare for *step*, which is the first one logged, or precedes the last one logged."""

    def log(self, step: int, metrics: Row, row: Row) -> None:
        """Take *metrics*, which are new, and *row*, all metrics of *step* so far."""

    def close(self) -> None:
        """Write what is still buffered."""


class Loggers:
    """Sends metrics to several outputs, until it is closed.  Not thread-safe.

    Made by `open_loggers`.  Leaving its ``with`` block closes it.  An output that fails is dropped
    with a warning, since the run is worth more than its plot.  If ``metrics.jsonl`` cannot be
    written, `log` raises.
    """

    def __init__(self, file: MetricsFile, others: Mapping[str, Output]) -> None:
        self._file = file
        self._others = dict(others)
        self._step = -1
        self._row: Optional[Row] = None
        self._closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log *metrics* of *step*; further calls may add metrics to the same step.

        The first call, and any call for a step before the last one, means that the run was
        continued at that step: lines of that step and of later ones are dropped from the files.

        Args:
            step: from 0, over the whole run.
            metrics: numbers by name; ``"step"`` is not a name.

        Raises:
            InvalidInputError: a metric is not a number, or is named ``"step"``.
            RunFolderError: ``metrics.jsonl`` cannot be written, e.g. because the disk is full.
            ClientClosedError: these loggers were closed.
        """
        if self._closed:
            raise ClientClosedError("these loggers were closed")
        step = to_int(step, text=False)
        if type(step) is not int or step < 0:
            raise InvalidInputError(f"step must be an int from 0, not {step!r}")
        new = _numbers(metrics)
        rewound = self._row is None or step < self._step
        earlier = {} if rewound or step > self._step else self._row
        row = {**(earlier or {}), **new}
        # Write the file first, which may raise: other outputs must not have what the file lacks.
        if rewound:
            self._file.rewind(step)
        self._file.log(step, row)
        self._step, self._row = step, row
        for name, output in list(self._others.items()):  # a copy, since one that fails is removed
            with self._left_out_if_it_fails(name):
                if rewound:
                    output.rewind(step)
                output.log(step, new, row)

    def close(self) -> None:
        """Write remaining metrics, and wait until trackers have sent theirs.  Idempotent."""
        if self._closed:
            return
        self._closed = True
        for name, output in list(self._others.items()):
            with self._left_out_if_it_fails(name):
                output.close()

    @contextlib.contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            del self._others[name]
            logger.warning(
                "the logger %r failed; the run goes on without it: %s", name, error, exc_info=True
            )

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()


def check_loggers(names: Sequence[str]) -> None:
    """Import the packages that the outputs *names* need, before the run spends time and money.

    Raises:
        InvalidInputError: a name is unknown.
        ConfigError: a package is not installed.
    """
    unknown = [name for name in names if name not in NAMES]
    if isinstance(names, str) or unknown:
        hint = f"The loggers are {', '.join(NAMES)}."
        raise InvalidInputError(f"unknown logger {unknown[0] if unknown else names!r}", hint=hint)
    packages: Dict[str, Callable[[], Any]] = {
        "png": import_figures,
        "tensorboard": import_tensorboard,
        "wandb": import_wandb,
        "trackio": import_trackio,
    }
    for name in names:
        if name in packages:
            packages[name]()


def open_loggers(
    folder: Union[str, Path],
    names: Sequence[str] = (),
    *,
    config: Optional[Mapping[str, Any]] = None,
    plot_every_s: float = 60.0,
) -> Loggers:
    """Open the loggers of a run folder, which is created if it is missing.

    ``metrics.jsonl`` is always written.  All files are in *folder*, and continue when it is opened
    again.  What trackers have sent to their servers stays there.

    Args:
        folder: the run folder.
        names: further outputs, out of `NAMES`: ``"csv"``, ``"png"`` (needs ``tinkex[plots]``),
            ``"tensorboard"``, ``"wandb"`` and ``"trackio"`` (the extras of these names).
        config: settings of the run, which wandb and trackio record.
        plot_every_s: minimum seconds between two plots; one more is drawn at the end.

    Raises:
        InvalidInputError: a name is unknown.
        ConfigError: a package is not installed, or cannot start.
        RunFolderError: ``metrics.jsonl`` cannot be written, or is damaged.
    """
    check_loggers(names)
    path = Path(folder).absolute()
    file = MetricsFile(path)
    makers: Dict[str, Callable[[], Output]] = {
        "csv": lambda: CsvFile(path),
        "png": lambda: Plot(path, plot_every_s),
        "tensorboard": lambda: TensorBoard(path),
        "wandb": lambda: open_wandb(path, config or {}, file),
        "trackio": lambda: open_trackio(path, config or {}, file),
    }
    opened: Dict[str, Output] = {}
    try:
        for name in dict.fromkeys(names):
            opened[name] = makers[name]()
    except BaseException:
        Loggers(file, opened).close()
        raise
    return Loggers(file, opened)


def _numbers(metrics: Mapping[str, float]) -> Row:
    """Return *metrics* as Python ints and floats."""
    row: Row = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or name == "step":
            raise InvalidInputError(f"a metric cannot be named {name!r}")
        row[name] = to_float(value, text=False)
        if type(row[name]) not in (int, float):
            raise InvalidInputError(f"the metric {name!r} must be a number, not {a_type(value)}")
    return row
