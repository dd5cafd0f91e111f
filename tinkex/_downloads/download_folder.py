"""DownloadFolder: where the files of a checkpoint are collected until all are there.

A hidden folder: beside the destination, which it becomes in one step; or inside the destination,
if that is a folder already, whose other files are not touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import List, Mapping, Tuple

from tinkex._downloads.checkpoint_files import (
    CONFIG_FILE,
    check_complete,
    files_in,
    is_adapter_file,
)
from tinkex._downloads.extraction import safe_parts
from tinkex._downloads.part_file import Part
from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.errors import InvalidInputError, ResponseDecodeError

#: The hidden folder inside of a destination that exists.
INSIDE = ".checkpoint.part"


class DownloadFolder:
    """The folder for a download to *target*; what is left of another checkpoint is deleted.

    *made_for* identifies the checkpoint.  Used by one thread of one process at a time.

    Raises:
        InvalidInputError: something else has the name of the folder.
    """

    def __init__(self, target: Path, made_for: Mapping[str, str]) -> None:
        self._target = target
        # Either way on the file system of the destination, so that moving the files is a rename.
        self.folder = (
            target / INSIDE if target.is_dir() else target.with_name(f".{target.name}.part")
        )
        self.files = self.folder / "files"
        self.notes = self.folder / "notes"
        self.archive = self.folder / "archive"
        self._made_for = self.folder / "checkpoint.json"
        facts = json.dumps(made_for)
        # The parts of another checkpoint may have the same names, and must not be resumed from.
        if self.folder.exists() and self._read_facts() != facts:
            self._delete_other()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made_for.write_text(facts, encoding="utf-8")

    def _read_facts(self) -> str:
        with contextlib.suppress(OSError, UnicodeError):
            return self._made_for.read_text(encoding="utf-8")
        return ""

    def _delete_other(self) -> None:
        """Delete what is left of the download of another checkpoint, and nothing else."""
        # The caller may have a folder of this name: only one with our note, or an empty one, is
        # deleted.
        ours = self.folder.is_dir() and (self._made_for.exists() or not any(self.folder.iterdir()))
        if not ours:
            raise InvalidInputError(
                f"{self.folder} is not from a download, which needs a folder of that name",
                hint="Move it away, or choose another folder.",
            )
        shutil.rmtree(self.folder)

    def part(self, name: str) -> Part:
        """The file *name* of the checkpoint, to be fetched; its folder is made."""
        parts = safe_parts(name)
        part = Part(name, self.files.joinpath(*parts), self.notes.joinpath(*parts))
        for path in (part.file, part.note):
            path.parent.mkdir(parents=True, exist_ok=True)
        return part

    def archive_part(self, name: str) -> Part:
        """The archive of the checkpoint *name*, to be fetched."""
        return Part(name, self.archive, self.folder / "archive.json")

    def check(self, what: str) -> None:
        """Check that the files make a complete checkpoint, *what*; delete all if they do not.

        Raises:
            ResponseDecodeError: they do not.
        """
        try:
            check_complete(self.files, what)
        except ResponseDecodeError:
            shutil.rmtree(self.folder)  # the next download must not resume from damaged files
            raise

    def finish(self) -> None:
        """Move the files to the destination, and delete the rest.

        A destination that exists keeps its files that do not belong to a checkpoint.

        Raises:
            InvalidInputError: the destination has a folder in the place of a file, or the reverse.
                Nothing was changed.
        """
        if self._target.is_dir():
            self._move_into()
        else:
            # One step: the destination is complete, or not there.
            os.rename(self.files, self._target)
        shutil.rmtree(self.folder)

    def _move_into(self) -> None:
        """Replace the files of the checkpoint that is there by the new ones."""
        target, old = self._target, self.folder / f"old-{uuid.uuid4().hex}"
        new = files_in(self.files)
        for file in new:  # all of them before the first is moved
            _check_way(target, file)
        replaced = {file for file in new if (target / file).exists()}
        replaced |= {  # weights beside those of another checkpoint might be taken for its own
            Path(path.name)
            for path in target.iterdir()
            if path.is_file() and is_adapter_file(path.name)
        }
        # The configuration goes first and comes last: without it, no program takes the folder for
        # a complete checkpoint.
        moves = [(target / file, old / file) for file in sorted(replaced, key=_config_first)]
        moves += [
            (self.files / file, target / file)
            for file in sorted(new, key=_config_first, reverse=True)
        ]
        _move_all(moves)

    def drop_if_empty(self) -> bool:
        """Delete the folder if there is nothing in it to resume from; return whether it was."""
        if self.archive.exists() or any(file.is_file() for file in self.files.rglob("*")):
            return False
        shutil.rmtree(self.folder, ignore_errors=True)
        return True


def check_free(target: Path, overwrite: bool) -> None:
    """Raise InvalidInputError if *target* cannot be written to without losing what is there."""
    above = next((parent for parent in target.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise InvalidInputError(f"{above} is a file, not a folder", hint="Choose another folder.")
    # `exists` follows links: a dangling one occupies the name all the same.
    if not (target.exists() or target.is_symlink()):
        return
    if not target.is_dir():
        raise InvalidInputError(
            f"{target} is not a folder, and a checkpoint is one",
            hint="Move it away, or choose a folder.",
        )
    # What an interrupted download has left is no reason to refuse the next one.
    if not overwrite and any(path.name != INSIDE for path in target.iterdir()):
        raise InvalidInputError(
            f"{target} exists already, and is not empty",
            hint=ErrorText(
                "Choose another folder, or ",
                Setting("overwrite", True),
                ": that replaces the files of a checkpoint in it, and keeps the others.",
            ),
        )


def _check_way(target: Path, file: Path) -> None:
    """Raise InvalidInputError if the relative path *file* cannot be a file in *target*."""
    for parent in list(file.parents)[:-1]:
        if (target / parent).exists() and not (target / parent).is_dir():
            raise _in_the_way(target / parent, "a file", "a folder")
    if (target / file).is_dir():
        raise _in_the_way(target / file, "a folder", "a file")


def _in_the_way(path: Path, found: str, needed: str) -> InvalidInputError:
    return InvalidInputError(
        f"{path} is {found}, where the checkpoint has {needed}",
        hint="Move it away, or choose another folder. Nothing was changed.",
    )


def _config_first(file: Path) -> Tuple[bool, Path]:
    return (file.name != CONFIG_FILE, file)


def _move_all(moves: List[Tuple[Path, Path]]) -> None:
    """Rename each of *moves*, from and to; should one fail, rename the others back."""
    done: List[Tuple[Path, Path]] = []
    try:
        for source, sink in moves:
            sink.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, sink)
            done.append((source, sink))
    except BaseException:
        for source, sink in reversed(done):
            os.replace(sink, source)
        raise
