"""TensorBoard, Weights & Biases and trackio, each through the public interface of its package."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any, Callable, Mapping

from tinkex._runtime.late_import import import_extra, import_late
from tinkex.errors import ConfigError
from tinkex.loggers.files import MetricsFile, Row

#: File with the id by which a tracker recognizes the run when it is continued.
ID_NAME = "tracker-id"


class TensorBoard:
    """Writes event files to ``tensorboard/`` in *folder*.  Not thread-safe.

    Uses tensorboardX, which needs no torch, or else torch.

    Raises:
        ConfigError: neither package is installed.
    """

    def __init__(self, folder: Path) -> None:
        self._module = import_tensorboard()
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def rewind(self, step: int) -> None:
        """Have TensorBoard ignore what was written earlier for *step* and later steps."""
        self.close()
        # File names have a resolution of one second, and a file of the same name would be
        # overwritten.
        suffix = f".{uuid.uuid4().hex[:8]}"
        self._writer = self._module.SummaryWriter(
            str(self._folder), purge_step=step, filename_suffix=suffix
        )

    def log(self, step: int, metrics: Row, row: Row) -> None:
        """Add *metrics* of *step*."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the event file, which flushes it."""
        if self._writer is not None:
            self._writer.close()


def import_tensorboard() -> Any:
    """Return a module with a ``SummaryWriter``; ConfigError if there is none."""
    user = 'the logger "tensorboard"'
    try:
        return import_extra("tensorboardX", "SummaryWriter", user=user, extra="tensorboard")
    except ConfigError:
        with contextlib.suppress(ImportError):
            return import_late("torch.utils.tensorboard")
        raise


class Tracker:
    """Sends metrics to a run of wandb or trackio, neither of which can replace what it has.

    So steps that are repeated after a crash are not sent again.  The exception is new metrics of
    the last step sent: continuing a finished run trains that step, whose row so far has only the
    final held-out loss.  Not thread-safe.

    Args:
        run: the run that the package's ``init`` returned.
        file: the run's metrics file, which has what was logged before.
        send: sends the metrics of a step.
    """

    def __init__(self, run: Any, file: MetricsFile, send: Callable[[int, Row], object]) -> None:
        self._run = run
        self._send = send
        self._sent = file.last_step
        self._sent_names = set(file.last_names)  # of that step
        self._skip_to = self._sent

    def rewind(self, step: int) -> None:
        """From now on, skip the steps that were sent before."""
        self._skip_to = self._sent

    def log(self, step: int, metrics: Row, row: Row) -> None:
        """Send *metrics* of *step*, except those sent before the last `rewind`."""
        if step == self._skip_to:
            metrics = {n: value for n, value in metrics.items() if n not in self._sent_names}
        if step < self._skip_to or not metrics:
            return
        self._send(step, dict(metrics))
        if step > self._sent:
            self._sent, self._sent_names = step, set()
        self._sent_names |= metrics.keys()

    def close(self) -> None:
        """Wait until the package has sent everything."""
        self._run.finish()


def import_wandb() -> Any:
    """Return wandb; ConfigError if it is not installed."""
    return import_extra("wandb", "init", user='the logger "wandb"', extra="wandb")


def import_trackio() -> Any:
    """Return trackio; ConfigError if it is not installed."""
    return import_extra("trackio", "init", user='the logger "trackio"', extra="trackio")


def open_wandb(folder: Path, config: Mapping[str, Any], file: MetricsFile) -> Tracker:
    """Open the wandb run of *folder*, named after it; settings are read from ``WANDB_...``.

    Raises:
        ConfigError: wandb is not installed, or cannot start, e.g. without a login.
    """
    module = import_wandb()
    try:
        run = module.init(
            project=os.environ.get("WANDB_PROJECT") or "tinkex",
            dir=str(folder),
            id=tracker_id(folder),
            name=folder.name,
            config=dict(config),
            resume="allow",
        )
        # wandb's own step counter accepts nothing for a step that it has already seen.
        run.define_metric("*", step_metric="step")
    except Exception as error:
        hint = "Run `wandb login`, or set WANDB_MODE=offline to write to the run folder only."
        raise ConfigError(f"wandb could not start: {error}", hint=hint) from error
    return Tracker(run, file, lambda step, metrics: run.log({"step": step, **metrics}))


def open_trackio(folder: Path, config: Mapping[str, Any], file: MetricsFile) -> Tracker:
    """Open the trackio run of *folder*, named after it; settings are read from ``TRACKIO_...``.

    Raises:
        ConfigError: trackio is not installed, or cannot start.
    """
    module = import_trackio()
    try:
        run = module.init(
            project=os.environ.get("TRACKIO_PROJECT") or "tinkex",
            name=f"{folder.name}-{tracker_id(folder)[:8]}",  # its name is its id
            config=dict(config),
            resume="allow",
        )
    except Exception as error:
        raise ConfigError(f"trackio could not start: {error}") from error
    return Tracker(run, file, lambda step, metrics: run.log(metrics, step=step))


def tracker_id(folder: Path) -> str:
    """Return the tracker id of the run in *folder*, generated the first time."""
    path = folder / ID_NAME
    if not path.exists():
        path.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
