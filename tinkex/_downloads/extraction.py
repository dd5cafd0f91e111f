"""Unpacking an archive from an untrusted source, into a folder and nowhere else.

Only plain files and folders are taken; links and devices are refused, and so are names that lead
out of the folder.  tarfile's own filters came with Python 3.12 and differ between versions.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import IO, Callable, List, cast

from tinkex._downloads.compression import ArchiveReader
from tinkex.errors import ResponseDecodeError

#: Most files in an archive.
MAX_FILES = 100_000

#: An archive may unpack to EXPANSION times its own size, and to SLACK_BYTES more.
EXPANSION = 64
SLACK_BYTES = 4 << 30

_CHUNK = 1 << 20

_DRIVE = re.compile(r"[A-Za-z]:")


def safe_parts(name: str) -> List[str]:
    """Return the parts of a relative path with ``/`` between them, without ``.``.

    Raises:
        ResponseDecodeError: it is empty or absolute, leads upward, or has another meaning on some
            system.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    outside = name.startswith("/") or ".." in parts or _DRIVE.match(name)
    odd = "\\" in name or any(ord(char) < 32 for char in name) or (os.name == "nt" and ":" in name)
    if not parts or outside or odd:
        raise ResponseDecodeError(
            f"{name!r:.200} is not a file name that is safe to write",
            hint="Nothing was written; the archive does not come from a well-behaved server.",
        )
    return parts


def extract(archive: Path, folder: Path, *, check: Callable[[], None] = lambda: None) -> int:
    """Unpack the tar *archive*, compressed or not, into the new *folder*; return its bytes.

    It is read to its end: checksums and the end marker are checked.  *check* is called often, and
    may raise to stop.  If anything is raised, the folder is deleted.

    Raises:
        ResponseDecodeError: it is not a tar file, broken, too large unpacked, or not safe.
        OSError: it cannot be written here.
    """
    limit = archive.stat().st_size * EXPANSION + SLACK_BYTES
    folder.mkdir()
    try:
        with ArchiveReader(archive) as reader:
            with tarfile.open(fileobj=cast(IO[bytes], reader), mode="r:") as tar:
                unpacked = _extract(tar, folder, limit, check)
                reader.finish(limit, check)
            return unpacked
    except (tarfile.TarError, UnicodeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ResponseDecodeError(
            f"the archive cannot be unpacked: {type(error).__name__}: {error}"
        ) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _extract(tar: tarfile.TarFile, folder: Path, limit: int, check: Callable[[], None]) -> int:
    unpacked = 0
    for count, member in enumerate(tar):
        check()
        if member.isdir() and member.name in (".", "./"):
            continue
        parts = safe_parts(member.name)
        unpacked += member.size
        if count >= MAX_FILES or unpacked > limit:
            raise ResponseDecodeError(
                f"the archive unpacks to more than {MAX_FILES} files or {limit} bytes"
            )
        target = folder.joinpath(*parts)
        if member.isdir():
            _make_folder(target)
        elif member.isreg():
            _make_folder(target.parent)
            _write(tar, member, target, check)
        else:
            raise ResponseDecodeError(
                f"{member.name!r} in the archive is a link or a device, not a file"
            )
    return unpacked


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ResponseDecodeError(f"{folder.name!r} is both a file and a folder") from error


def _write(
    tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, check: Callable[[], None]
) -> None:
    source = tar.extractfile(member)
    assert source is not None  # as it is for every plain file
    if target.exists():
        raise ResponseDecodeError(f"the archive holds {member.name!r} twice")
    left = member.size
    with source, open(target, "xb") as out:
        while left:
            check()
            data = source.read(min(left, _CHUNK))
            if not data:
                raise ResponseDecodeError(f"the archive ends in the middle of {member.name!r}")
            out.write(data)
            left -= len(data)
