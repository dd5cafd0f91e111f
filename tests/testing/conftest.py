from __future__ import annotations

from typing import Iterator

import pytest

from tinkex import ServiceClient
from tinkex.testing import FakeServer


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def service(fake: FakeServer) -> Iterator[ServiceClient]:
    with ServiceClient(base_url=fake.url, read_timeout_s=1.0) as client:
        yield client
