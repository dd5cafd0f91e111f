"""Files of examples, one JSON object per line; they may be larger than memory.

Opening a file reads it once, checks every line, and records where each example begins.  Examples
are read from the file when they are accessed.
"""

from __future__ import annotations

import array
import bisect
import contextlib
import hashlib
import operator
import os
import stat
import warnings
from collections.abc import Sequence as SequenceOf
from typing import (
    BinaryIO,
    Callable,
    FrozenSet,
    Iterator,
    List,
    NamedTuple,
    Set,
    Tuple,
    Type,
    Union,
    overload,
)

import orjson

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.data.examples import Example, parse_example
from tinkex.errors import InvalidInputError

#: A longer line is not read into memory.
MAX_LINE_BYTES = 64 << 20
_LISTED = 5  # how many bad lines a message describes
_BOM = b"\xef\xbb\xbf"
_HINT = "A file of examples is JSONL: UTF-8 text with one JSON object per line."


class _Index(NamedTuple):
    """The result of one pass over a file."""

    offsets: array.array[int]  # of the first byte of each example
    left_out: array.array[int]  # for each line left out, the number of examples before it
    kinds: FrozenSet[Type[object]]
    fingerprint: str
    state: Tuple[int, int]  # size and modification time


class Examples(SequenceOf[Example]):
    """The examples of a file, in order (`open_examples`).

    Attributes:
        path: the file, as an absolute path.
        fingerprint: SHA-256 of the file's bytes, in hexadecimal.
        kinds: the types of the examples.

    Each access opens the file, so an instance holds no open file, may be used by several threads
    and processes, and can be pickled.  Accesses raise InvalidInputError if the file has changed.
    """

    def __init__(self, path: str, index: _Index) -> None:
        self.path = path
        self.fingerprint = index.fingerprint
        self.kinds = index.kinds
        self._index = index

    def __repr__(self) -> str:
        return f"<{len(self)} examples of {self.path}>"

    def __len__(self) -> int:
        return len(self._index.offsets)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> List[Example]: ...
    def __getitem__(self, place: Union[int, slice]) -> Union[Example, List[Example]]:
        """Return one example, or the list of examples in a slice."""
        if isinstance(place, slice):
            return list(self._read(range(*place.indices(len(self)))))
        [example] = self._read([self._position(place)])
        return example

    def __iter__(self) -> Iterator[Example]:
        return self._read(range(len(self)))

    def line(self, place: int) -> int:
        """Return the number, from 1, of the line that holds example *place*."""
        position = self._position(place)
        return position + 1 + bisect.bisect_right(self._index.left_out, position)

    def _position(self, place: int) -> int:
        position = operator.index(place)
        if not -len(self) <= position < len(self):
            raise IndexError(f"example {place} of {len(self)}")
        return position % len(self)

    def _read(self, places: SequenceOf[int]) -> Iterator[Example]:
        with _opened(self.path) as file:
            if _state(file) != self._index.state:
                raise InvalidInputError(
                    f"{self.path} has changed since it was opened", hint="Open it again."
                )
            for place in places:
                file.seek(self._index.offsets[place])
                yield _parse(file.readline(MAX_LINE_BYTES))


def open_examples(path: Union[str, os.PathLike[str]], *, skip_bad: bool = False) -> Examples:
    """Read and check the file *path*; return its examples (docs/data.md).

    Blank lines are skipped.  Memory holds 8 bytes per line; a line may have up to 64 MiB.  Blocks
    for a second or two per 100 MB.

    Args:
        skip_bad: leave out the lines that are not examples, with a warning.

    Raises:
        InvalidInputError: the file cannot be read, has no examples, has lines that are not
            examples, or has changed during the call.
    """
    name = os.path.abspath(path)
    bad: List[str] = []
    with _opened(name) as file:
        index, bad_lines = _scan(file, bad)
        # In a file that is being written, the offsets could point into the middle of lines.
        if _state(file) != index.state:
            raise InvalidInputError(f"{name} changed while it was read")
    lines = len(index.offsets) + len(index.left_out)
    if bad_lines:
        kind = "is not an example" if bad_lines == 1 else "are not examples"
        listed = [*bad, *(["..."] if bad_lines > len(bad) else [])]
        message = "\n  ".join([f"{bad_lines} of {lines} lines {kind} in {name}:", *listed])
        if not skip_bad or not index.offsets:
            advice = (" Correct them, or leave them out: ", Setting("skip_bad", True), ".")
            raise InvalidInputError(message, hint=ErrorText(_HINT, *(() if skip_bad else advice)))
        warnings.warn(f"left out: {message}", stacklevel=2)
    if not index.offsets:
        raise InvalidInputError(f"{name} has no examples: it is empty", hint=_HINT)
    return Examples(name, index)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidInputError(
                    f"{path} is not a regular file",
                    hint="The file is read more than once: save it to disk first.",
                )
            yield file
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror or error}") from error


def _state(file: BinaryIO) -> Tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _scan(file: BinaryIO, bad: List[str]) -> Tuple[_Index, int]:
    """Read all lines; return the index and the number of bad lines; describe the first in *bad*."""
    state = _state(file)
    digest = hashlib.sha256()
    # Arrays take 8 bytes per item, a list of ints would take 36, and files have millions of lines.
    offsets, left_out = array.array("Q"), array.array("Q")
    kinds: Set[Type[object]] = set()
    bad_lines = number = offset = 0
    for number, (line, size) in enumerate(_lines(file, digest.update), 1):
        start, offset = offset, offset + size
        if number == 1 and line.startswith(_BOM):
            start, line = len(_BOM), line[len(_BOM) :]
        try:
            if line.strip():
                kinds.add(type(_parse(line)))
                offsets.append(start)
                continue
        except InvalidInputError as error:
            bad_lines += 1
            if len(bad) < _LISTED:
                bad.append(f"line {number}: {error.message}")
        left_out.append(len(offsets))
    return _Index(offsets, left_out, frozenset(kinds), digest.hexdigest(), state), bad_lines


def _lines(file: BinaryIO, update: Callable[[bytes], object]) -> Iterator[Tuple[bytes, int]]:
    """Yield each line and its length in bytes; if a line is too long, only its beginning."""
    while True:
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        update(line)
        size = len(line)
        part = line if size > MAX_LINE_BYTES else b"\n"
        while part and not part.endswith(b"\n"):
            part = file.readline(1 << 20)
            update(part)
            size += len(part)
        yield line, size


def _parse(line: bytes) -> Example:
    if len(line) > MAX_LINE_BYTES:
        raise InvalidInputError(f"it is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if "UTF-8" in error.msg:
            raise InvalidInputError("it is not UTF-8") from error
        raise InvalidInputError(f"it is not JSON: {error.msg} (column {error.colno})") from error
    return parse_example(record)
