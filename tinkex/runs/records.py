"""The contents of a run's journal: its configuration, each step once, and its checkpoints."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Union

from tinkex.errors import RunFolderError
from tinkex.loggers.files import RUN_FOLDER_HINT, require_folder
from tinkex.runs.journal import JOURNAL_NAME, Entry, read_entries


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """A step that was done.

    Attributes:
        index: from 0, over the whole run.
        at: when the line was written, in seconds since the epoch.
        metrics: the metrics that were logged for the step.
    """

    index: int
    at: float
    metrics: Dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CheckpointRecord:
    """A checkpoint that the run can continue from.

    Attributes:
        path: its ``tinker://`` path.
        steps: how many steps it includes.
        loop, batch: where a run that loads it continues: the number of the loop over batches, and
            of the batch in that loop; both from 0.
        state: the contents of ``run.state``.
        at: when the line was written, in seconds since the epoch.
        ttl_seconds: how long the server keeps it from then on; None is for ever.
    """

    path: str
    steps: int
    loop: int
    batch: int
    state: Dict[str, Any]
    at: float
    ttl_seconds: Optional[int] = None


@dataclasses.dataclass(frozen=True)
class SamplerRecord:
    """Weights that were saved for sampling.

    Attributes:
        path: their ``tinker://`` path.
        steps: how many steps they include.
        at: when the line was written, in seconds since the epoch.
    """

    path: str
    steps: int
    at: float


#: Stands for an embedded server where a base URL is expected.
EMBEDDED = "embedded"


@dataclasses.dataclass(frozen=True)
class ServerRecord:
    """The server of a run: a server at a URL, or an embedded one (`ServiceClient.local`).

    Attributes:
        base_url: None for an embedded server, whose URL changes with each start.
        model: the model that an embedded server was started with; if that is a folder, its absolute
            path.
        data_dir: the absolute path of the folder in which an embedded server keeps the run; None if
            the server was started without one, so that its data were removed when it stopped.
    """

    base_url: Optional[str] = None
    model: Optional[str] = None
    data_dir: Optional[str] = None


@dataclasses.dataclass
class RunRecord:
    """The contents of a run's journal.

    Attributes:
        spec: what the run was made from: ``base_model``, ``start_from`` and the other arguments.
        config: the caller's own settings.
        model_ids: the ids of its training runs on the server: one for each time that the run was
            started or continued.
        steps: the steps, in order, each once: if a step was done again after a checkpoint was
            loaded, the later one replaces the earlier one.
        checkpoints: the checkpoints that are not known to be gone, oldest first.
        sampler: what `Run.save_for_sampler` saved last.
        server: the server that has the checkpoints; None if the journal, written by an older
            version, does not name it.
    """

    spec: Dict[str, Any] = dataclasses.field(default_factory=dict)
    config: Dict[str, Any] = dataclasses.field(default_factory=dict)
    model_ids: List[str] = dataclasses.field(default_factory=list)
    steps: List[StepRecord] = dataclasses.field(default_factory=list)
    checkpoints: List[CheckpointRecord] = dataclasses.field(default_factory=list)
    sampler: Optional[SamplerRecord] = None
    server: Optional[ServerRecord] = None

    @property
    def has_begun(self) -> bool:
        """Whether a model was ever created for this run."""
        return bool(self.model_ids)

    def newest_weights(self) -> Union[SamplerRecord, CheckpointRecord]:
        """Return the weights with the most steps; at equal steps, those saved for sampling.

        Raises:
            RunFolderError: nothing was saved yet.
        """
        newest = self.checkpoints[-1] if self.checkpoints else None
        # To be sampled, a checkpoint would have to be loaded and saved again.
        if self.sampler is not None and (newest is None or self.sampler.steps >= newest.steps):
            return self.sampler
        if newest is None:
            raise RunFolderError(
                "the run has no checkpoint yet", hint="Train it for longer, or save more often."
            )
        return newest

    def add(self, entry: Entry) -> None:
        """Apply one line of the journal; ignore lines of unknown kinds, from other versions."""
        kind = entry["kind"]
        if kind == "config":
            self.spec, self.config = entry["spec"], entry["config"]
            self.sampler = None  # with new settings, the run is not finished
        elif kind == "start":
            self.model_ids.append(entry["model_id"])
            if "server" in entry:  # older versions did not write it
                self.server = ServerRecord(**_known(ServerRecord, entry["server"]))
            # Steps after this checkpoint are done again; later checkpoints could not be loaded.
            self.steps = [step for step in self.steps if step.index < entry["steps"]]
            self.checkpoints = [c for c in self.checkpoints if c.steps <= entry["steps"]]
        elif kind == "step":
            self._add_step(entry)
        elif kind == "checkpoint":
            self.checkpoints.append(CheckpointRecord(**_known(CheckpointRecord, entry)))
        elif kind == "sampler":
            self.sampler = SamplerRecord(entry["path"], entry["steps"], entry["at"])
        elif kind == "gone":
            self.checkpoints = [c for c in self.checkpoints if c.path != entry["path"]]

    def _add_step(self, entry: Entry) -> None:
        index, at, metrics = entry["step"], entry["at"], entry["metrics"]
        for place in range(len(self.steps) - 1, -1, -1):  # backwards: it is one of the last
            if self.steps[place].index == index:  # further metrics of a step
                earlier = self.steps[place]
                merged = {**earlier.metrics, **metrics}
                self.steps[place] = StepRecord(index, earlier.at, merged)
                return
            if self.steps[place].index < index:
                break
        self.steps.append(StepRecord(index, at, metrics))


def _known(record: type, entry: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the fields of *record* in *entry*; later versions may have added others."""
    names = {field.name for field in dataclasses.fields(record)}
    return {name: value for name, value in entry.items() if name in names}


def replay(entries: List[Entry], path: Path) -> RunRecord:
    """Return the record that results from *entries*, the lines of the journal at *path*.

    Raises:
        RunFolderError: a line cannot be understood.
    """
    record = RunRecord()
    for number, entry in enumerate(entries, 1):
        try:
            record.add(entry)
        except (KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(
                f"line {number} of {path} is unreadable for this version of tinkex: {error!r}",
                hint="Continue the run with the version that wrote it.",
            ) from error
    record.server = _server_of(path.parent, record)
    return record


def server_folder(folder: Union[str, os.PathLike[str]]) -> Path:
    """Return the folder in which a run's own embedded server keeps its data."""
    return Path(folder) / "server"


def _server_of(folder: Path, record: RunRecord) -> Optional[ServerRecord]:
    """Return the server that has the checkpoints of the run in *folder*.

    Each start line of the journal names the server, with the path of its data at that time.  Data
    in the run folder take precedence, because the folder may have been moved or copied.  So does
    the server in the settings of `tinkex train`: its older folders have no server in start lines.
    """
    own = server_folder(folder)
    named = record.config.get("server")
    if named == EMBEDDED or (named is None and own.is_dir()):
        return ServerRecord(model=record.spec.get("base_model"), data_dir=os.path.abspath(own))
    return record.server if named is None else ServerRecord(base_url=named)


def read_run(folder: Union[str, Path]) -> RunRecord:
    """Read the journal of a run folder, even while a process is writing to it.

    Raises:
        RunFolderError: there is no journal, it is damaged, or *folder* is a file.
    """
    path = Path(folder) / JOURNAL_NAME
    require_folder(path.parent, RUN_FOLDER_HINT)
    try:
        entries, _ = read_entries(path)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise RunFolderError(
            f"cannot read the journal {path}: {error.strerror or error}",
            hint=f"{folder} is not a run folder, or nothing has run in it yet."
            if missing
            else None,
        ) from error
    return replay(entries, path)
