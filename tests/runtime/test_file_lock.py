"""lock_file: one holder at a time, until it closes the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinkex._runtime.file_lock import lock_file


def test_a_locked_file_cannot_be_locked_again_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("a+b") as second:
        with path.open("a+b") as first:
            lock_file(first.fileno())
            with pytest.raises(BlockingIOError):
                lock_file(second.fileno())
        lock_file(second.fileno())
