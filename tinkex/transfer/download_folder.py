"""DownloadFolder: where the files of a checkpoint are collected, until all are there.

A hidden folder beside the destination, whose place the files take in one step.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Mapping, Optional

from tinkex.errors import InvalidInputError
from tinkex.transfer.extraction import safe_parts
from tinkex.transfer.part_file import Part


class DownloadFolder:
    """The folder for what goes to *target*; what another checkpoint has left in it is deleted.

    *made_for* names the checkpoint.  Used by one thread of one process at a time.
    """

    def __init__(self, target: Path, made_for: Mapping[str, str]) -> None:
        self.folder = target.with_name(f".{target.name}.part")
        self.files = self.folder / "files"
        self.notes = self.folder / "notes"
        self.archive = self.folder / "archive"
        self._made_for = self.folder / "checkpoint.json"
        facts = json.dumps(made_for)
        if self.folder.exists() and self._read_facts() != facts:
            shutil.rmtree(self.folder)  # of another checkpoint
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made_for.write_text(facts, encoding="utf-8")

    def _read_facts(self) -> str:
        with contextlib.suppress(OSError, UnicodeError):
            return self._made_for.read_text(encoding="utf-8")
        return ""

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

    def finish(self, target: Path) -> None:
        """Put the files at *target*, in one step, and delete the rest."""
        old: Optional[Path] = None
        if target.exists() or target.is_symlink():
            old = self.folder / f"old-{uuid.uuid4().hex}"
            os.rename(target, old)
        try:
            os.rename(self.files, target)
        except BaseException:
            if old is not None:
                os.rename(old, target)
            raise
        shutil.rmtree(self.folder)

    def drop_if_empty(self) -> bool:
        """Delete the folder if there is nothing in it to go on from; tell whether."""
        if self.archive.exists() or any(file.is_file() for file in self.files.rglob("*")):
            return False
        shutil.rmtree(self.folder)
        return True


def check_free(target: Path, overwrite: bool) -> None:
    """Raise InvalidInputError if there is something at *target* that must stay."""
    if overwrite or not (target.exists() or target.is_symlink()):
        return
    if not target.is_dir() or any(target.iterdir()):
        raise InvalidInputError(
            f"{target} exists already", hint="Choose another folder, or overwrite=True."
        )
