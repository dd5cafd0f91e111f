"""Modules that are imported when something in them is first used, by whichever thread uses it.

A forked child has the parent's locks but only one of its threads: the import lock of a module that
another thread was importing would never be released.  A fork therefore waits for our imports.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
import threading
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Tuple

#: The longest wait of a fork, in seconds: the forking thread may hold a lock that an import needs.
_MAX_FORK_WAIT_S = 10.0

# Guards _importing, and is held while the process forks.  Not held during an import: two threads
# whose imports need each other's modules would deadlock.
_condition = threading.Condition()
_importing: Dict[int, int] = {}  # thread ident -> imports in progress
_modules: Dict[str, Any] = {}  # fully imported modules; sys.modules may hold partial ones


def import_late(name: str) -> Any:
    """Return the module *name*, importing it at the first call.  Thread-safe."""
    module = _modules.get(name)  # atomic
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


def import_extra(name: str, attribute: str, *, user: str, extra: str) -> Any:
    """Return the optional module *name*, which *user* needs and ``tinkex[extra]`` installs.

    Args:
        attribute: a name that the module must have, and that a folder of the same name lacks.

    Raises:
        ConfigError: the module is not installed, or cannot be imported.
    """
    from tinkex.errors import ConfigError  # not needed unless this is called

    hint = f'python -m pip install "tinkex[{extra}]"'
    try:
        module = import_late(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and name.startswith(error.name or "?")
        reason = "which is not installed" if missing else f"which cannot be imported: {error}"
        raise ConfigError(f"{user} needs {name}, {reason}", hint=hint) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{user} needs {name}, which is not installed", hint=hint)
    return module


if TYPE_CHECKING:
    import numpy

    np = numpy
else:

    class _Numpy:
        """numpy, imported when first used: ``from tinkex._runtime.late_import import np``.

        numpy takes a third of the time and a quarter of the memory of importing the clients, and a
        program that only looks at runs and checkpoints never needs it.
        """

        def __getattr__(self, name: str) -> Any:
            value = getattr(import_late("numpy"), name)
            setattr(self, name, value)  # from now on an ordinary attribute
            return value

    np = _Numpy()


def names_in_stub(
    spec: ModuleSpec,
) -> Tuple[List[str], Callable[[str], Any], Callable[[], List[str]]]:
    """Return ``__all__``, ``__getattr__`` and ``__dir__`` of a package, read from ``__init__.pyi``.

    This way the names are listed once, in a form that type checkers also read.  The stub holds only
    absolute imports, ``from module import Name as Name``, each carried out when the name is first
    used; aliases, ``Name = Other``; and annotations, which are ignored.

    Args:
        spec: the package's ``__spec__``.
    """
    package = sys.modules[spec.name]
    # Use the loader, which also reads from zip files.
    path = os.path.join((spec.submodule_search_locations or [""])[0], "__init__.pyi")
    source: bytes = spec.loader.get_data(path)  # type: ignore[union-attr]
    homes: Dict[str, Tuple[str, str]] = {}  # public name -> module, and its name there
    for node in ast.parse(source, path).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                homes[alias.asname or alias.name] = (node.module or "", alias.name)
        elif isinstance(node, ast.Assign):
            homes[node.targets[0].id] = homes[node.value.id]  # type: ignore[attr-defined]

    def get_attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {spec.name!r} has no attribute {name!r}")
        module, attribute = homes[name]
        if module == spec.name:
            value = import_late(f"{module}.{attribute}")
        else:
            value = getattr(import_late(module), attribute)
        setattr(package, name, value)  # from now on found without this function
        return value

    public = sorted(homes)
    return public, get_attribute, public.copy


def _before_fork() -> None:
    # Both the parent and the child release it after the fork: no import begins in between.
    _condition.acquire()
    me = threading.get_ident()  # its own import continues in the child, with its lock
    _condition.wait_for(lambda: not _importing.keys() - {me}, _MAX_FORK_WAIT_S)


def _after_fork_in_child() -> None:
    me = threading.get_ident()
    # Drop imports that outlasted the wait: their threads do not exist here.
    for thread in _importing.keys() - {me}:
        del _importing[thread]
    _condition.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_condition.release,
        after_in_child=_after_fork_in_child,
    )
