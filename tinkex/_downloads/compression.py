"""Reading an archive that may be compressed, so that damage to it is noticed.

The checksum of a compressed file comes at its end, which a reader of the tar format never reaches:
it stops at the marker that ends the tar.
"""

from __future__ import annotations

import importlib
import io
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO, Callable, Type, TypeVar, cast

from tinkex.errors import ResponseDecodeError

try:
    from lzma import LZMAError
except ImportError:  # a Python built without it
    LZMAError: Type[Exception] = zlib.error  # type: ignore[no-redef]

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20

#: How a compressed file starts, and the module that reads it.
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "lzma"}

T = TypeVar("T")


class ArchiveReader:
    """The uncompressed bytes of the archive at *path*.  Used by one thread; a context manager.

    It has what `tarfile` needs of a file: read, seek and tell.

    Raises:
        ResponseDecodeError: from every method, if the compressed bytes are damaged.
    """

    def __init__(self, path: Path) -> None:
        self._source = _open(path)
        self._last = b""

    def __enter__(self) -> ArchiveReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._source.close()

    def read(self, size: int = -1) -> bytes:
        """Read *size* bytes, fewer only at the end."""
        self._last = self._guarded(lambda: self._source.read(size))
        return self._last

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to *offset*; backwards, a compressed file is read again from its start."""
        return self._guarded(lambda: self._source.seek(offset, whence))

    def tell(self) -> int:
        """Return the position."""
        return self._source.tell()

    def finish(self, limit: int, check: Callable[[], None]) -> None:
        """Read on to the end, once `tarfile` has found no further member.

        *check* is called often, and may raise to stop.

        Raises:
            ResponseDecodeError: the tar has no end marker, more than *limit* bytes follow it, or
                the checksum of the compressed bytes is wrong.
        """
        # The last thing that tarfile reads is the block where it found no further header.
        if self._last != bytes(_BLOCK):
            raise ResponseDecodeError(
                "the archive is damaged: it breaks off, or holds something else, where its next "
                "file or its end marker should be"
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
        except (OSError, EOFError, zlib.error, LZMAError) as error:
            raise ResponseDecodeError(
                f"the archive is damaged: {type(error).__name__}: {error}"
            ) from error


def _open(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        start = file.read(6)
    opener = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), "io")
    try:
        return cast(BinaryIO, importlib.import_module(opener).open(path, "rb"))
    except ImportError as error:
        raise ResponseDecodeError(
            f"the archive is compressed in a way that this Python cannot read: {error}"
        ) from error
