"""A server for your own tests: real HTTP, deterministic, with faults on demand (docs/testing.md).

Needs ``pip install "tinkex[testing]"``, and no machine learning library.  Submodules are imported
only when used, so that the pytest plugin costs nothing in projects that do not use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinkex.testing import faults as faults
    from tinkex.testing.engine import CharacterTokenizer as CharacterTokenizer
    from tinkex.testing.exchange import Exchange as Exchange, Reply as Reply
    from tinkex.testing.journal import Journal as Journal, ReceivedRequest as ReceivedRequest
    from tinkex.testing.script import Injection as Injection
    from tinkex.testing.server import FakeServer as FakeServer

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

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return module if name == "faults" else getattr(module, name)
