"""Unpacking an archive from an untrusted source, into a folder and nowhere else.

Only plain files and folders are unpacked; links and devices are refused, and so are names that lead
out of the folder.  tarfile's own filters came with Python 3.12 and differ between versions.  The
archive may be compressed; damage to it is detected (`ArchiveReader`).
"""

from __future__ import annotations

import importlib
import io
import os
import re
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import IO, BinaryIO, Callable, List, Type, TypeVar, cast

from tinkex.errors import ResponseDecodeError

try:
    from lzma import LZMAError
except ImportError:  # a Python built without lzma
    LZMAError: Type[Exception] = zlib.error  # type: ignore[no-redef]

#: The most files that an archive may contain.
MAX_FILES = 100_000

#: An archive may unpack to at most EXPANSION times its own size, plus SLACK_BYTES.
EXPANSION = 64
SLACK_BYTES = 4 << 30

_CHUNK = 1 << 20

_DRIVE = re.compile(r"[A-Za-z]:")

#: The first bytes of a compressed file, and the module that reads it.
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "lzma"}

T = TypeVar("T")


def safe_parts(name: str) -> List[str]:
    """Return the parts of *name*, a relative path with ``/`` as separator, without ``.``.

    Raises:
        ResponseDecodeError: *name* is empty or absolute, leads upward, or has a special meaning on
            some system.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    outside = name.startswith("/") or ".." in parts or _DRIVE.match(name)
    odd = "\\" in name or any(ord(char) < 32 for char in name) or (os.name == "nt" and ":" in name)
    if not parts or outside or odd:
        raise ResponseDecodeError(
            f"{name!r:.200} is not a file name that is safe to write",
            hint="Nothing was written: the server, or the archive, is not to be trusted.",
        )
    return parts


def extract(archive: Path, folder: Path, *, check: Callable[[], None] = lambda: None) -> int:
    """Unpack the tar *archive*, compressed or not, into the new *folder*; return the bytes written.

    The archive is read to its end, so its checksums and its end marker are verified.  *check* is
    called often, and may raise to stop.  If anything is raised, the folder is deleted.

    Raises:
        ResponseDecodeError: the archive is not a tar file, damaged, too large unpacked, or unsafe.
        OSError: the files cannot be written.
    """
    # A few compressed bytes can stand for gigabytes of zeros, which would fill the disk.
    limit = archive.stat().st_size * EXPANSION + SLACK_BYTES
    # A new folder, so that everything in it comes from this archive.
    folder.mkdir()
    try:
        with ArchiveReader(archive) as reader:
            # Opened as an uncompressed tar ("r:"), because the reader decompresses, and checks the
            # bytes that follow the tar.
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
        # Many archives begin with an entry for the root folder.
        if member.isdir() and member.name in (".", "./"):
            continue
        parts = safe_parts(member.name)
        unpacked += member.size  # the announced size, checked before any of the member is written
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
    assert source is not None  # it is None only for folders, links and devices
    if target.exists():
        raise ResponseDecodeError(f"the archive holds {member.name!r} twice")
    left = member.size
    # Exclusive mode neither overwrites a file nor follows a link.
    with source, open(target, "xb") as out:
        while left:
            check()
            data = source.read(min(left, _CHUNK))
            if not data:
                raise ResponseDecodeError(f"the archive ends in the middle of {member.name!r}")
            out.write(data)
            left -= len(data)


class ArchiveReader:
    """The uncompressed bytes of the archive at *path*.  Used by one thread; a context manager.

    It has the methods of a file that `tarfile` needs: read, seek and tell.  `tarfile` stops at the
    marker that ends the tar, but the checksum of a compressed file comes after it; `finish` reads
    that, too.

    Raises:
        ResponseDecodeError: from every method, if the compressed bytes are damaged.
    """

    def __init__(self, path: Path) -> None:
        self._source = _open_archive(path)
        self._last = b""

    def __enter__(self) -> ArchiveReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._source.close()

    def read(self, size: int = -1) -> bytes:
        """Read *size* bytes, or fewer at the end."""
        self._last = self._guarded(lambda: self._source.read(size))
        return self._last

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to *offset*; to go backwards, a compressed file is read again from its start."""
        return self._guarded(lambda: self._source.seek(offset, whence))

    def tell(self) -> int:
        """Return the position."""
        return self._source.tell()

    def finish(self, limit: int, check: Callable[[], None]) -> None:
        """Read on to the end, after `tarfile` has found no further member.

        *check* is called often, and may raise to stop.

        Raises:
            ResponseDecodeError: the tar has no end marker, more than *limit* bytes follow it, or
                the checksum of the compressed bytes is wrong.
        """
        # The last block that tarfile reads is the one where it found no further header.
        if self._last != bytes(tarfile.BLOCKSIZE):
            raise ResponseDecodeError(
                "the archive is damaged: its next file or its end marker is missing, or something "
                "else is in its place"
            )
        left = limit
        while True:
            check()
            piece = self.read(_CHUNK)
            if not piece:
                return
            left -= len(piece)
            if left < 0:
                raise ResponseDecodeError(f"more than {limit} bytes follow the end of the archive")

    def _guarded(self, act: Callable[[], T]) -> T:
        try:
            return act()
        # gzip, bz2 and lzma each raise different errors for damage.
        except (OSError, EOFError, zlib.error, LZMAError) as error:
            raise ResponseDecodeError(
                f"the archive is damaged: {type(error).__name__}: {error}"
            ) from error


def _open_archive(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        start = file.read(6)
    opener = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), "io")
    try:
        # Imported only when needed, because a Python may be built without bz2 or lzma.
        return cast(BinaryIO, importlib.import_module(opener).open(path, "rb"))
    except ImportError as error:
        raise ResponseDecodeError(
            f"the archive is compressed in a way that this Python cannot read: {error}"
        ) from error
