"""Parts: a body that is joined while it is sent."""

from __future__ import annotations

import numpy as np

from tinkex.wire.codec import Parts


def test_blocks_are_joined_one_by_one() -> None:
    parts = Parts([[b"ab", np.int16([1, 2])], [], [b"c"]], 7)
    assert list(parts) == [b"ab\1\0\2\0", b"", b"c"]
    assert bytes(parts) == b"ab\1\0\2\0c"
    assert len(parts) == 7
    assert not Parts([], 0)


def test_a_single_block_is_not_copied() -> None:
    body = b"x" * 1000
    assert bytes(Parts([[body]], len(body))) is body


def test_arrays_may_be_overwritten_once_the_parts_are_kept() -> None:
    array = np.int32([1, 2, 3])
    kept, other = Parts([[array, b"x"]], 13), Parts([[array], [b"x"]], 13)
    before = bytes(kept)
    assert kept == other
    kept.keep()
    array[:] = 0
    assert bytes(kept) == b"".join(kept) == before
    assert len(kept) == len(before)
    assert kept != other
    assert kept != before  # of another type, on which nothing should depend
