"""The metrics files of a run folder: ``metrics.jsonl``, and the same as a CSV table.

Each step has one line.  A repeated step replaces its line and all later ones, because it means that
the run was continued from an earlier checkpoint.
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

#: The remedy if something other than a run folder was given.
RUN_FOLDER_HINT = (
    "Give a run folder: the one given to `tinkex train --out` or ServiceClient.open_run."
)

#: The metrics of one step, by name.
Row = Dict[str, float]


def read_metrics(folder: Union[str, Path]) -> List[Dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` in *folder*, even while a run is writing it.

    Each is a dict of ``"step"`` (an int) and the step's metrics, in ascending order of steps; a
    value that was not finite is nan.

    Raises:
        RunFolderError: the file cannot be read, or a line other than the last is damaged.
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

    If *path* does not exist or cannot be inspected, opening it will raise.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise RunFolderError(f"{path} is not a folder", hint=hint)


class MetricsFile:
    """Writes ``metrics.jsonl`` in *folder*.  Not thread-safe.

    A line counts only with its line feed, so a killed process can leave at most a torn last line,
    which is overwritten.

    Attributes:
        last_step: the last step in the file when it was opened; -1 if it was empty.
        last_names: the names of that step's metrics.

    Raises:
        RunFolderError: the file cannot be written, or a line other than the last is damaged.
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
        """Have the next line, for *step*, replace the lines of that step and all later ones."""
        try:
            self._line.start_at(
                sum(length for length, line in _lines(self._path) if line["step"] < step)
            )
        except OSError as error:
            raise self._failed(error) from error

    def log(self, step: int, row: Row) -> None:
        """Write *row*, which has all metrics of *step* so far."""
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
    """Keeps ``metrics.csv`` in *folder* equal to its ``metrics.jsonl``.  Not thread-safe.

    A new metric adds a column, so the whole file is written again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / CSV_NAME
        self._line = _LastLine(self._path)
        self._columns: List[str] = []

    def rewind(self, step: int) -> None:
        """Write the whole file again with the next line."""
        self._columns = []

    def log(self, step: int, metrics: Row, row: Row) -> None:
        """Write *row*, all metrics of *step* so far, which is already in ``metrics.jsonl``."""
        if self._columns and row.keys() <= set(self._columns):
            self._line.write(step, self._text([{"step": step, **row}]).encode())
            return
        # A new column changes every line, so read all rows from metrics.jsonl.
        rows = read_metrics(self._folder)
        self._columns = list(dict.fromkeys(name for line in rows for name in line))
        head: Dict[str, Any] = {name: name for name in self._columns}
        table = self._text([head, *rows[:-1]]).encode()
        replace_file(self._path, table)
        self._line.start_at(len(table))
        self._line.write(step, self._text(rows[-1:]).encode())

    def close(self) -> None:
        """Do nothing: the file is open only during writes."""

    def _text(self, rows: List[Dict[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


class _LastLine:
    """Writes lines to the end of file *path*; replaces the last one if the step is the same."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = self._end = 0  # byte offsets of the last line
        self._step = -1

    def start_at(self, offset: int) -> None:
        self._start = self._end = offset
        self._step = -1

    def write(self, step: int, line: bytes) -> None:
        if step != self._step:
            self._start = self._end
        with open(self._path, "r+b", buffering=0) as file:
            try:
                # Truncate first: a crash must not leave the tail of a longer line.
                file.truncate(self._start)
                file.seek(self._start)
                left = memoryview(line)
                while left:
                    left = left[file.write(left) :]
            except OSError:  # e.g. a full disk: the partial line has no line feed
                file.truncate(self._start)
                raise
        self._step, self._end = step, self._start + len(line)


def replace_file(path: Path, content: bytes) -> None:
    """Write *content* to *path* atomically: a reader finds either the old file or the new one."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _lines(path: Path) -> Iterator[Tuple[int, Mapping[str, Any]]]:
    """Yield each complete line of *path*: its length in bytes, and its parsed content.

    Raises:
        OSError: the file cannot be read.
        RunFolderError: a line was not written by `MetricsFile`.
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
                    hint="Remove that line, or move the file away: a new one is then started.",
                ) from error
            yield len(text), line
