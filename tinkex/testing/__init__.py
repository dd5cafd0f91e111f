"""A server for your own tests: real HTTP, deterministic, with faults on demand (docs/testing.md).

Needs ``pip install "tinkex[testing]"``, and no machine learning library.  Nothing is imported
before it is used, so that the pytest plugin costs nothing where it is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinkex.testing import faults
    from tinkex.testing.engine import CharacterTokenizer
    from tinkex.testing.exchange import Exchange, Reply
    from tinkex.testing.journal import Journal, ReceivedRequest
    from tinkex.testing.script import Injection
    from tinkex.testing.server import FakeServer

_MODULES = {
    "CharacterTokenizer": "engine",
    "Exchange": "exchange",
    "FakeServer": "server",
    "Injection": "script",
    "Journal": "journal",
    "ReceivedRequest": "journal",
    "Reply": "exchange",
    "faults": "faults",
}

__all__ = [
    "CharacterTokenizer",
    "Exchange",
    "FakeServer",
    "Injection",
    "Journal",
    "ReceivedRequest",
    "Reply",
    "faults",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return module if name == "faults" else getattr(module, name)
