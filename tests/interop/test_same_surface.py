"""tinkex offers synchronous callers the same names as the official SDK 0.38.

The test inspects both packages and calls nothing.  The exceptions are those of
docs/compatibility.md, which a test of the main suite checks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any, Dict, List, Mapping

import pytest
from compat.surface import EXCEPTIONS, PROBE
from interop.conftest import PYTHON, ROOT
from interop.official import official

official("0.38")

Surface = Mapping[str, Mapping[str, Any]]


def surface(module: str, python: str) -> Surface:
    """Return the public classes of *module*, their members, and the members' parameters."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT) if module == "tinkex" else ""}
    command = [python, "-W", "ignore", "-c", PROBE, module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: Surface = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def theirs() -> Surface:
    return surface("tinker", sys.executable)


@pytest.fixture(scope="module")
def ours() -> Surface:
    return surface("tinkex", PYTHON)


def lacking(theirs: Surface, ours: Surface, part: str) -> List[str]:
    """Return the missing names: ``name``, ``name.member`` or ``name.member(parameter)``."""
    found: List[str] = []
    for name, members in theirs[part].items():
        if name not in ours[part]:
            found.append(name)
            continue
        mine: Dict[str, Any] = ours[part][name]
        for member, parameters in members.items():
            if member not in mine:
                found.append(f"{name}.{member}")
            elif parameters is not None and mine[member] is not None and "**" not in mine[member]:
                lost = [one for one in parameters if one not in mine[member] and one != "**"]
                found += [f"{name}.{member}({one})" for one in lost]
    return sorted(found)


def test_everything_missing_is_documented(theirs: Surface, ours: Surface) -> None:
    missing = {name for part in theirs for name in lacking(theirs, ours, part)}
    assert len(theirs["tinker"]) > 50
    unexplained = [one for one in missing if not any(re.fullmatch(p, one) for p in EXCEPTIONS)]
    assert sorted(unexplained) == []
    stale = [p for p in EXCEPTIONS if not any(re.fullmatch(p, one) for one in missing)]
    assert stale == []
