from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Declare the plugin's marker for a page: in a source tree the plugin is not installed."""
    config.addinivalue_line("markers", "tinkex_server: options of the FakeServer of a test")
