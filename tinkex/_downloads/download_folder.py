"""DownloadFolder: collects the files of a checkpoint until all have arrived.

It is a hidden folder.  If the destination does not exist, the folder lies beside it, and its files
become the destination in one step.  If the destination is a folder already, the hidden folder lies
inside it.
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

#: The name of the hidden folder inside an existing destination.
INSIDE = ".checkpoint.part"


class DownloadFolder:
    """The folder for a download to *target*; remains of another checkpoint's download are deleted.

    *made_for* identifies the checkpoint.  Used by one thread of one process at a time.

    Raises:
        InvalidInputError: something that is not from a download has the name of the folder.
    """

    def __init__(self, target: Path, made_for: Mapping[str, str]) -> None:
        self._target = target
        # Both are on the destination's file system, so that moving the files is a rename.
        self.folder = (
            target / INSIDE if target.is_dir() else target.with_name(f".{target.name}.part")
        )
        self.files = self.folder / "files"
        self.notes = self.folder / "notes"
        self.archive = self.folder / "archive"
        self._made_for = self.folder / "checkpoint.json"
        facts = json.dumps(made_for)
        # Parts of another checkpoint may have the same names, but must not be resumed from.
        if self.folder.exists() and self._read_facts() != facts:
            self._delete_other()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made_for.write_text(facts, encoding="utf-8")

    def _read_facts(self) -> str:
        with contextlib.suppress(OSError, UnicodeError):
            return self._made_for.read_text(encoding="utf-8")
        return ""

    def _delete_other(self) -> None:
        """Delete the remains of another checkpoint's download, and nothing else."""
        # The user may have a folder of this name, so it is deleted only if it is empty or contains
        # our note.
        ours = self.folder.is_dir() and (self._made_for.exists() or not any(self.folder.iterdir()))
        if not ours:
            raise InvalidInputError(
                f"{self.folder} is in the way: the download needs a folder of that name, and this "
                "one is not from a download",
                hint="Move it away, or choose another folder.",
            )
        shutil.rmtree(self.folder)

    def part(self, name: str) -> Part:
        """Return the part for file *name* of the checkpoint; its folder is created."""
        parts = safe_parts(name)
        part = Part(name, self.files.joinpath(*parts), self.notes.joinpath(*parts))
        for path in (part.file, part.note):
            path.parent.mkdir(parents=True, exist_ok=True)
        return part

    def archive_part(self, name: str) -> Part:
        """Return the part for the archive of the checkpoint *name*."""
        return Part(name, self.archive, self.folder / "archive.json")

    def check(self, what: str) -> None:
        """Check that the files form a complete checkpoint, *what*; delete them all if not.

        Raises:
            ResponseDecodeError: the checkpoint is incomplete or damaged.
        """
        try:
            check_complete(self.files, what)
        except ResponseDecodeError:
            shutil.rmtree(self.folder)  # the next download must not resume from damaged files
            raise

    def finish(self) -> None:
        """Move the files to the destination, and delete this folder.

        An existing destination keeps its files that do not belong to a checkpoint.

        Raises:
            InvalidInputError: the destination has a folder in the place of a file, or vice versa.
                Nothing was changed.
        """
        if self._target.is_dir():
            self._move_into()
        else:
            # Atomic: the destination is either complete or does not exist.
            os.rename(self.files, self._target)
        shutil.rmtree(self.folder)

    def _move_into(self) -> None:
        """Replace the files of the destination's checkpoint by the new files."""
        target, old = self._target, self.folder / f"old-{uuid.uuid4().hex}"
        new = files_in(self.files)
        for file in new:  # check all files before moving the first
            _check_way(target, file)
        replaced = {file for file in new if (target / file).exists()}
        replaced |= {  # old weights beside the new ones might be taken for theirs
            Path(path.name)
            for path in target.iterdir()
            if path.is_file() and is_adapter_file(path.name)
        }
        # The configuration is removed first and added last: without it, no program takes the folder
        # for a complete checkpoint.
        moves = [(target / file, old / file) for file in sorted(replaced, key=_config_first)]
        moves += [
            (self.files / file, target / file)
            for file in sorted(new, key=_config_first, reverse=True)
        ]
        _move_all(moves)

    def drop_if_empty(self) -> bool:
        """Delete the folder if it holds nothing to resume from; return whether it was deleted."""
        if self.archive.exists() or any(file.is_file() for file in self.files.rglob("*")):
            return False
        shutil.rmtree(self.folder, ignore_errors=True)
        return True


def check_free(target: Path, overwrite: bool) -> None:
    """Raise InvalidInputError if a download to *target* would overwrite something."""
    above = next((parent for parent in target.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise InvalidInputError(f"{above} is a file, not a folder", hint="Choose another folder.")
    # `exists` follows links, but a dangling link occupies the name, too.
    if not (target.exists() or target.is_symlink()):
        return
    if not target.is_dir():
        raise InvalidInputError(
            f"{target} exists and is not a folder, but a checkpoint needs one",
            hint="Move it away, or choose a folder.",
        )
    # The remains of an interrupted download are no reason to refuse the next one.
    if not overwrite and any(path.name != INSIDE for path in target.iterdir()):
        raise InvalidInputError(
            f"{target} exists already, and is not empty",
            hint=ErrorText(
                "Choose another folder, or ",
                Setting("overwrite", True),
                ", which replaces the files of a checkpoint in it and keeps the others.",
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
    """Rename each pair (from, to) of *moves*; if one fails, rename the others back."""
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
