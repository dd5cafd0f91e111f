"""Parts: a large body as bytes and arrays, which are joined a little at a time as they are sent.

Joined as a whole, a batch would be in memory twice, and the second time in fresh memory: to have
the system hand that out takes longer than to fill it.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, Iterator, List


class Parts:
    """A body.

    Until `keep` was called, its arrays must not be written to by anyone.

    Args:
        blocks: each a list of bytes and contiguous arrays; what is in one is sent in one piece.
        size: of all of them together, in bytes.
    """

    def __init__(self, blocks: List[List[Any]], size: int) -> None:
        self._blocks = blocks
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        """The body, one block after the other."""
        return map(b"".join, self._blocks)

    def __bytes__(self) -> bytes:
        return b"".join(chain.from_iterable(self._blocks))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Parts):
            return NotImplemented
        return len(self) == len(other) and bytes(self) == bytes(other)

    __hash__ = None  # type: ignore[assignment]  # what is equal today may differ tomorrow

    def keep(self) -> None:
        """Copy the arrays: whoever gave them may write to them from now on."""
        self._blocks = [[bytes(self)]]
