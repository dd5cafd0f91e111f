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

#: Holds the id by which a run folder's metrics are found again when it is continued.
ID_NAME = "tracker-id"


class TensorBoard:
    """Writes event files to ``tensorboard/`` in *folder*.  For one thread.

    By tensorboardX, which needs no torch; or else by torch.

    Raises:
        ConfigError: neither is installed.
    """

    def __init__(self, folder: Path) -> None:
        self._module = import_tensorboard()
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def rewind(self, step: int) -> None:
        """Have TensorBoard leave out what was written for *step* and later ones."""
        self.close()
        # Files are named after the second, and one of the same name would be overwritten.
        suffix = f".{uuid.uuid4().hex[:8]}"
        self._writer = self._module.SummaryWriter(
            str(self._folder), purge_step=step, filename_suffix=suffix
        )

    def log(self, step: int, metrics: Row, row: Row) -> None:
        """Add *metrics* of *step*."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the event file, which writes what is left."""
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
    """Sends metrics to a run of wandb or trackio, neither of which replaces what it has.

    So steps that are done again after a crash are not sent again.  Of the last step that was sent,
    metrics that are new are: a run that was finished and goes on trains the step whose row held the
    held-out loss at its end.  For one thread.

    Args:
        run: what the package's ``init`` has returned.
        file: what was logged before.
        send: sends metrics of a step.
    """

    def __init__(self, run: Any, file: MetricsFile, send: Callable[[int, Row], object]) -> None:
        self._run = run
        self._send = send
        self._sent = file.last_step
        self._sent_names = set(file.last_names)  # of that step
        self._skip_to = self._sent

    def rewind(self, step: int) -> None:
        """Leave out the steps that were sent."""
        self._skip_to = self._sent

    def log(self, step: int, metrics: Row, row: Row) -> None:
        """Send *metrics* of *step*, but not what was sent in an earlier part of the run."""
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
        ConfigError: wandb is not installed, or cannot start, as without a login.
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
        # wandb's own count of steps takes nothing for a step that it has seen.
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
    """Return the id of the run in *folder*, which is generated the first time."""
    path = folder / ID_NAME
    if not path.exists():
        path.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
