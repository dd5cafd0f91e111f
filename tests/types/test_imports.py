"""Importing the value types loads nothing heavy and gives no warning."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "flask", "google.protobuf", "asyncio", "requests", "urllib3")


@pytest.mark.parametrize("module", ["tinkex.types", "tinkex.errors", "tinkex.wire.json_codec"])
def test_nothing_heavy_is_imported(module):
    script = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == []


def test_every_exported_name_exists():
    import tinkex.types

    missing = [name for name in tinkex.types.__all__ if not hasattr(tinkex.types, name)]
    assert missing == []
