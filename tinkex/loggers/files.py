"""The files of metrics in a run folder: ``metrics.jsonl``, and a table of the same as CSV.

Each step has one line.  A step that is done again replaces its line and all later ones,
since the run was then continued from an earlier checkpoint.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any, Dict, FrozenSet, Iterator, List, Mapping, Tuple, Union

from tinkex.errors import RunFolderError

METRICS_NAME = "metrics.jsonl"
CSV_NAME = "metrics.csv"

#: The remedy where something else was given instead of a run folder.
RUN_FOLDER_HINT = (
    "Give a run folder: the one given to `tinkex train --out` or ServiceClient.open_run."
)

#: The metrics of one step, by name.
Row = Dict[str, float]


def read_metrics(folder: Union[str, Path]) -> List[Dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` in *folder*, also while a run is writing it.

    Each is a dict of ``"step"`` (an int) and the step's metrics; a value that was not finite is
    nan.  Steps increase.

    Raises:
        RunFolderError: the file cannot be read, or is damaged elsewhere than in its last line.
    """
    path = Path(folder) / METRICS_NAME
    require_folder(path.parent, RUN_FOLDER_HINT)
    try:
        return [
            {name: math.nan if value is None else value for name, value in line.items()}
            for _, line in _lines(path)
        ]
    except OSError as error:
        raise RunFolderError(
            f"cannot read {path}: {error.strerror or error}",
            hint=f"{folder} is not a run folder, or nothing has been logged in it yet."
            if isinstance(error, FileNotFoundError)
            else None,
        ) from error


def require_folder(path: Path, hint: str) -> None:
    """Raise RunFolderError if *path* exists but is not a folder, such as a file of examples.

    A *path* that does not exist, or cannot be looked at, is left to what opens it.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise RunFolderError(f"{path} is not a folder", hint=hint)


class MetricsFile:
    """Writes ``metrics.jsonl`` in *folder*.  For one thread.

    A line counts once its line feed is there, so that a killed process can tear the last one only,
    which is overwritten.

    Attributes:
        last_step: the last step that was in the file when it was opened; -1 if it was empty.
        last_names: the names of its metrics.

    Raises:
        RunFolderError: the file cannot be written, or is damaged elsewhere than in its last line.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS_NAME
        self._line = _LastLine(self._path)
        require_folder(folder, "Choose another folder.")
        self.last_step = -1
        self.last_names: FrozenSet[str] = frozenset()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            for _, line in _lines(self._path):
                self.last_step = line["step"]
                self.last_names = frozenset(line.keys() - {"step"})
        except OSError as error:
            raise self._failed(error) from error

    def rewind(self, step: int) -> None:
        """Have the next line, of *step*, replace those of that step and later ones."""
        try:
            self._line.start_at(
                sum(length for length, line in _lines(self._path) if line["step"] < step)
            )
        except OSError as error:
            raise self._failed(error) from error

    def log(self, step: int, row: Row) -> None:
        """Write *row*, all metrics of *step* so far."""
        values = {name: value if math.isfinite(value) else None for name, value in row.items()}
        line = json.dumps({"step": step, **values}, ensure_ascii=False)
        try:
            self._line.write(step, line.encode() + b"\n")
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"cannot write the metrics to {self._path}: {error.strerror or error}",
            hint="Once the file can be written, run the program again: it continues from the last "
            "checkpoint.",
        )


class CsvFile:
    """Keeps ``metrics.csv`` in *folder* equal to its ``metrics.jsonl``.  For one thread.

    A metric that is new adds a column, for which the file is written again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / CSV_NAME
        self._line = _LastLine(self._path)
        self._columns: List[str] = []

    def rewind(self, step: int) -> None:
        """Write the file again with the next line."""
        self._columns = []

    def log(self, step: int, metrics: Row, row: Row) -> None:
        """Write *row*, all metrics of *step* so far, which ``metrics.jsonl`` has already."""
        if self._columns and row.keys() <= set(self._columns):
            self._line.write(step, self._text([{"step": step, **row}]).encode())
            return
        # A new column changes every line; rows are then read from the file that has them all.
        rows = read_metrics(self._folder)
        self._columns = list(dict.fromkeys(name for line in rows for name in line))
        head: Dict[str, Any] = {name: name for name in self._columns}
        table = self._text([head, *rows[:-1]]).encode()
        replace_file(self._path, table)
        self._line.start_at(len(table))
        self._line.write(step, self._text(rows[-1:]).encode())

    def close(self) -> None:
        """Do nothing: the file is open only while it is written."""

    def _text(self, rows: List[Dict[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


class _LastLine:
    """Writes lines to the end of the file at *path*, the last one again if its step is the same."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = self._end = 0  # of the last line, in bytes
        self._step = -1

    def start_at(self, offset: int) -> None:
        self._start = self._end = offset
        self._step = -1

    def write(self, step: int, line: bytes) -> None:
        if step != self._step:
            self._start = self._end
        with open(self._path, "r+b", buffering=0) as file:
            try:
                # First: a crash must not leave the tail of a longer line.
                file.truncate(self._start)
                file.seek(self._start)
                left = memoryview(line)
                while left:
                    left = left[file.write(left) :]
            except OSError:  # such as a full disk: what is left of the line has no line feed
                file.truncate(self._start)
                raise
        self._step, self._end = step, self._start + len(line)


def replace_file(path: Path, content: bytes) -> None:
    """Write *content* to *path*, where a reader finds either the earlier file or this one."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _lines(path: Path) -> Iterator[Tuple[int, Mapping[str, Any]]]:
    """Yield the length in bytes of each complete line of *path*, and what it holds.

    Raises:
        OSError: the file cannot be read.
        RunFolderError: a line is not one of `MetricsFile`.
    """
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                return  # torn, or being written
            try:
                line = json.loads(text)
                if type(line["step"]) is not int:
                    raise TypeError
            except (ValueError, KeyError, TypeError) as error:
                raise RunFolderError(
                    f"line {number} of {path} is damaged",
                    hint="Remove that line, or move the file away: a new one is begun.",
                ) from error
            yield len(text), line
