"""The pytest plugin: fixtures `tinkex_server` and `tinkex_service` (docs/testing.md).

pytest imports this module in every run, so it imports nothing more until a fixture is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterator

import pytest

if TYPE_CHECKING:
    from tinkex import ServiceClient
    from tinkex.testing.server import FakeServer

#: Sent by clients that the tested code creates; the server requires no key.
_KEY = "tml-fake"


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        "tinkex_server(**options): options of tinkex.testing.FakeServer for the fixture, "
        'such as models=["Qwen/Qwen3-8B"]',
    )


@pytest.fixture
def tinkex_server(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeServer]:
    """A running `tinkex.testing.FakeServer`, to which clients without a base_url connect."""
    from tinkex.testing.server import FakeServer

    marker = request.node.get_closest_marker("tinkex_server")
    options = {} if marker is None else dict(marker.kwargs)
    with FakeServer(**options) as server:
        monkeypatch.setenv("TINKER_BASE_URL", server.url)
        monkeypatch.setenv("TINKER_API_KEY", options.get("api_key") or _KEY)
        yield server


@pytest.fixture
def tinkex_service(tinkex_server: FakeServer) -> Iterator[ServiceClient]:
    """A `ServiceClient` of `tinkex_server`, which gives up on a lost response after 5 s."""
    from tinkex import ServiceClient

    with ServiceClient(read_timeout_s=5.0, poll_timeout_s=5.0) as service:
        yield service
