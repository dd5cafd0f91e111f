"""A plugin for ``TINKEX_CANARY=1 python -m pytest``: no test may leak its API key.

Every client that is given no other key uses CANARY, also in the processes that tests start.  A test
fails if the key then appears in its log, its output, an error of the library, or a file in its
temporary folder.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, Generator, Iterator, List

import pytest

CANARY = "tml-canary-51d0b7c2e98f"

#: Larger files hold weights, and are not searched.
_MOST_BYTES = 1 << 22

_leaks: List[str] = []


def pytest_configure() -> None:
    """Give every client the key, and check every error when it is created."""
    os.environ["TINKER_API_KEY"] = CANARY
    from tinkex.errors import TinkexError

    make = TinkexError.__init__

    @functools.wraps(make)
    def init(self: TinkexError, *args: Any, **facts: Any) -> None:
        if CANARY in repr((args, facts)):
            _leaks.append(f"an error, {type(self).__name__}")
        make(self, *args, **facts)

    TinkexError.__init__ = init  # type: ignore[method-assign]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Fail the teardown of a test that has leaked the key."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    if report.when != "teardown":
        return
    shown = [*_leaks, *(name for name, text in report.sections if CANARY in text)]
    _leaks.clear()
    shown += _files_with_it(getattr(item, "funcargs", {}).get("tmp_path"))
    if shown:
        report.outcome = "failed"
        report.longrepr = f"the key is in {', '.join(shown)}"


def _files_with_it(folder: Any) -> Iterator[str]:
    if not isinstance(folder, Path):
        return
    for path in folder.rglob("*"):
        small = path.is_file() and not path.is_symlink() and path.stat().st_size <= _MOST_BYTES
        if small and CANARY.encode() in path.read_bytes():
            yield f"the file {path.relative_to(folder)}"
