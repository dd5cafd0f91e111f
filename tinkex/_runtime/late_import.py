"""Modules imported when something is first used, in whichever thread that is.

A child of a fork has none of the parent's other threads, but all their locks: that of a module
which one of them was importing stays shut for ever.  So a fork waits until ours are through.
"""

from __future__ import annotations

import importlib
import os
import threading
from typing import Any, Dict

#: A fork waits no longer, in seconds: its thread may hold what the import waits for.
_PATIENCE_S = 10.0

# Guards _importing, and is held while the process forks.  Not while a module is imported: threads
# that import would wait for each other in a circle.
_condition = threading.Condition()
_importing: Dict[int, int] = {}  # imports under way, by thread
_modules: Dict[str, Any] = {}  # what was imported; complete, unlike what sys.modules may hold


def import_late(name: str) -> Any:
    """Return the module *name*, imported at the first call.  Thread-safe."""
    module = _modules.get(name)
    if module is None:
        thread = threading.get_ident()
        with _condition:
            _importing[thread] = _importing.get(thread, 0) + 1
        try:
            module = _modules[name] = importlib.import_module(name)
        finally:
            with _condition:
                _importing[thread] -= 1
                if not _importing[thread]:
                    del _importing[thread]
                    _condition.notify_all()
    return module


def _before_fork() -> None:
    _condition.acquire()
    me = threading.get_ident()
    _condition.wait_for(lambda: not _importing.keys() - {me}, _PATIENCE_S)


def _after_fork_in_child() -> None:
    me = threading.get_ident()
    for thread in _importing.keys() - {me}:
        del _importing[thread]
    _condition.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_condition.release,
        after_in_child=_after_fork_in_child,
    )
