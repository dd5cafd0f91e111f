"""The embedded server: the Tinker API on this machine, before a real engine.

Nothing is imported before it is used: neither Flask nor torch comes with ``import tinkex.local``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinkex.local.engines.torch_engine.portable import merge_adapter
    from tinkex.local.server import LocalServer, load_engine

__all__ = ["LocalServer", "load_engine", "merge_adapter"]


def __getattr__(name: str) -> Any:
    if name == "merge_adapter":
        from tinkex.local.engines.torch_engine import portable

        return portable.merge_adapter
    if name in __all__:
        from tinkex.local import server

        return getattr(server, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
