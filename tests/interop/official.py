"""The official client in this environment, which may have one of several releases."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest


def official(release: str) -> Any:
    """Return the package ``tinker`` if it has *release*; else skip the calling module."""
    try:
        found = version("tinker")
    except PackageNotFoundError:
        found = "none"
    if not found.startswith(f"{release}."):
        reason = f"this is about tinker {release}; here is {found}"
        pytest.skip(reason, allow_module_level=True)
    return importlib.import_module("tinker")
