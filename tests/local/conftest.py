from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest
from local.harness import Api, HeldEngine, serving


@pytest.fixture
def engine() -> HeldEngine:
    return HeldEngine()


@pytest.fixture
def api(tmp_path: Path, engine: HeldEngine) -> Iterator[Api]:
    with serving(tmp_path, engine) as running:
        yield running
