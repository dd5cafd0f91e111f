"""Parts: a large body, which is not joined before it is sent."""

from __future__ import annotations

from itertools import chain
from typing import Any, Iterator, List


class Parts:
    """A large body as bytes and arrays, joined a block at a time while it is sent.

    Joining all of it first would hold a batch in memory twice, and getting that much fresh memory
    from the system takes longer than filling it.

    The arrays must not be written to before `keep` is called.

    Args:
        blocks: lists of bytes and contiguous arrays; each block is sent in one piece.
        size: bytes of all blocks together.
    """

    def __init__(self, blocks: List[List[Any]], size: int) -> None:
        self._blocks = blocks
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        """Yield the body block by block."""
        return map(b"".join, self._blocks)

    def __bytes__(self) -> bytes:
        return b"".join(chain.from_iterable(self._blocks))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Parts):
            return NotImplemented
        return len(self) == len(other) and bytes(self) == bytes(other)

    __hash__ = None  # type: ignore[assignment]  # the arrays may change

    def keep(self) -> None:
        """Copy the arrays, so that their owner may write to them again."""
        self._blocks = [[bytes(self)]]
