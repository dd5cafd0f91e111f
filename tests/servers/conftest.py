from __future__ import annotations

from typing import Iterator

import pytest
from servers.profiles import NAMES
from servers.raw import GatedEngine, Raw, serving


@pytest.fixture(params=NAMES)
def raw(request: pytest.FixtureRequest) -> Iterator[Raw]:
    """A running server of each profile in turn, and raw HTTP to it."""
    engine = GatedEngine(vocab_size=1000, context_length=256)
    with serving(str(request.param), engine) as server:
        talker = Raw(server, str(request.param), engine)
        try:
            yield talker
        finally:
            engine.gate.set()
            talker.http.close()
