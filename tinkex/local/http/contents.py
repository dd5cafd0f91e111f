"""What can be downloaded: one file of a checkpoint, or all as a tar archive; and any part of it.

The archive is never written anywhere: its bytes follow from the files, so that a part of it can be
read by itself, and reading it again gives the same bytes.  A content belongs to one request.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import BinaryIO, Iterator, List, Tuple

_CHUNK = 1 << 18


class Content:
    """Bytes to be downloaded: open files and bytes between them, one after the other.

    Attributes:
        size: number of bytes in all.
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
                    # The length is in the headers, which were sent: the connection has to break.
                    raise OSError("a saved file became shorter while it was read")
                left -= len(chunk)
                yield chunk

    def _add(self, source: BinaryIO) -> int:
        # Of the open file: a deletion, or another save under the name, no longer changes it.
        size = source.seek(0, io.SEEK_END)
        self._parts.append((self.size, self.size + size, source))
        self.size += size
        return size


def file_content(folder: Path, relative: str) -> Content:
    """Open one file in *folder*; OSError if it is not there."""
    content = Content()
    content._add((folder / relative).open("rb"))
    return content


def tar_content(folder: Path) -> Content:
    """Open all files of *folder* as an archive; OSError if it is not there."""
    content = Content()
    try:
        # All are opened before the first byte is sent: a checkpoint that is deleted meanwhile can
        # be sent to its end.
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
    """Return the files in *folder*, at any depth, by name; OSError if it is not there."""
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
        # Time, user and group stay 0: the same files make the same bytes.
        content._add(io.BytesIO(member.tobuf(tarfile.PAX_FORMAT)))
    except BaseException:
        source.close()
        raise
    content._add(source)
    content._add(io.BytesIO(bytes(-member.size % tarfile.BLOCKSIZE)))
