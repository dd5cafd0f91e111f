"""Content: a download, one file of a checkpoint or all as a tar archive, in whole or in part.

The archive is never written to disk: its bytes are computed from the files, so that any part can be
read by itself, and reading it again gives the same bytes.  A content belongs to one request.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import BinaryIO, Iterator, List, Tuple

_CHUNK = 1 << 18


class Content:
    """The bytes of a download: open files, and bytes between them, in order.

    Attributes:
        size: total number of bytes.
    """

    def __init__(self) -> None:
        self.size = 0
        self._parts: List[Tuple[int, int, BinaryIO]] = []  # begin, end, source

    def close(self) -> None:
        """Close the files."""
        for _, _, source in self._parts:
            source.close()

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from *start* to before *stop*."""
        for begin, end, source in self._parts:
            if end <= start or begin >= stop:
                continue
            source.seek(max(start, begin) - begin)
            left = min(stop, end) - max(start, begin)
            while left:
                chunk = source.read(min(left, _CHUNK))
                if not chunk:
                    # The length was sent in the headers, so the connection has to be broken.
                    raise OSError("a saved file became shorter while it was read")
                left -= len(chunk)
                yield chunk

    def _add(self, source: BinaryIO) -> int:
        # The size of the open file, which neither a deletion nor another save changes any more.
        size = source.seek(0, io.SEEK_END)
        self._parts.append((self.size, self.size + size, source))
        self.size += size
        return size


def file_content(folder: Path, relative: str) -> Content:
    """Open one file in *folder*; OSError if it does not exist."""
    content = Content()
    content._add((folder / relative).open("rb"))
    return content


def tar_content(folder: Path) -> Content:
    """Open all files of *folder* as an archive; OSError if the folder does not exist."""
    content = Content()
    try:
        # All are opened before the first byte is sent, so that a checkpoint that is deleted during
        # the download is still sent to its end.
        for file in files_of(folder):
            _add_member(content, folder, file)
    except BaseException:
        content.close()
        raise
    # Two empty blocks end an archive, and it is padded to a full record.
    ending = 2 * tarfile.BLOCKSIZE
    ending += -(content.size + ending) % tarfile.RECORDSIZE
    content._add(io.BytesIO(bytes(ending)))
    return content


def files_of(folder: Path) -> List[Path]:
    """Return the files in *folder*, at any depth, sorted; OSError if it does not exist."""
    if not folder.is_dir():
        raise FileNotFoundError(str(folder))
    # Sorted, so that a resumed download continues in the same archive.
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _add_member(content: Content, folder: Path, file: Path) -> None:
    member = tarfile.TarInfo(file.relative_to(folder).as_posix())
    source = file.open("rb")
    try:
        member.size = source.seek(0, io.SEEK_END)
        member.mode = 0o644
        # Time, user and group stay 0, so that the same files make the same bytes.
        content._add(io.BytesIO(member.tobuf(tarfile.PAX_FORMAT)))
    except BaseException:
        source.close()
        raise
    content._add(source)
    content._add(io.BytesIO(bytes(-member.size % tarfile.BLOCKSIZE)))
