"""docs/compatibility.md names every exception that the interop tests allow."""

from __future__ import annotations

import pytest
from compat.programs import ROOT
from compat.surface import EXCEPTIONS


@pytest.mark.parametrize("words", sorted(set(EXCEPTIONS.values())))
def test_an_exception_is_documented(words: str) -> None:
    assert words in (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
