"""Functions for spawned processes, which can import ``support`` but no test module."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def resolve_tiny_random(cache: str, start: Any, sources: Any) -> None:
    """Resolve the model ``tiny-random`` in *cache* after the barrier *start*."""
    from tinkex.local.engines import models

    start.wait()
    sources.put(models.resolve("tiny-random", cache_dir=Path(cache)).source)
