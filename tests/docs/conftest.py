from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """A page uses the plugin's marker; in a source tree, the plugin is not installed."""
    config.addinivalue_line("markers", "tinkex_server: options of the FakeServer of a test")
