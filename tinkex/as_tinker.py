"""Use tinkex in programs and libraries that import ``tinker``, the official SDK.

Either call `install_as_tinker` before anything imports ``tinker``, or run the program like this::

    python -m tinkex.as_tinker train.py --steps 10
    python -m tinkex.as_tinker -m some_library.recipe --steps 10
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import runpy
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Dict, List, Optional, Sequence

import tinkex
from tinkex.errors import ConfigError

#: Official module -> the module of tinkex that takes its place.
_HOMES: Dict[str, str] = {
    "tinker": "tinkex",
    "tinker._exceptions": "tinkex.errors",
    "tinker.lib.retry_handler": "tinkex.lib.public_interfaces",
}

#: The boundary between two words of a class name: ModelInput, APIFuture, ModelID.
_WORD_BOUNDARY = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def install_as_tinker() -> None:
    """Make ``import tinker`` import tinkex, everywhere in this process.

    ``tinker`` is then the package tinkex itself.  ``tinker.types``, ``tinker.types.tensor_data``
    and the like, ``tinker.lib.public_interfaces`` and ``tinker._exceptions`` are modules of tinkex;
    any other module raises ModuleNotFoundError.  Calling this again has no effect.  A child process
    that starts a new interpreter (e.g. with multiprocessing's "spawn") must call it itself.

    Raises:
        ConfigError: the official SDK, or another package named ``tinker``, is already imported.
    """
    imported = sys.modules.get("tinker")
    if imported is tinkex:
        return
    if imported is not None:
        raise ConfigError(
            "tinkex cannot take the place of tinker, which is already imported (from "
            f"{getattr(imported, '__file__', None)})",
            hint="Call tinkex.install_as_tinker() before anything imports tinker, or run the "
            "program with `python -m tinkex.as_tinker program.py`.",
        )
    sys.meta_path.insert(0, _TinkerFinder())
    importlib.import_module("tinker")


def _home(name: str) -> Optional[str]:
    """Return the tinkex module for the official module *name*; None if there is none."""
    if name in _HOMES:
        return _HOMES[name]
    parent, _, module = name.rpartition(".")
    ours = f"tinkex.{name.partition('.')[2]}"
    if not module.startswith("_") and importlib.util.find_spec(ours) is not None:
        return ours
    # The official SDK has a module for nearly every class: tinker.types.loss_fn_type.
    for package in ("tinkex.types", "tinkex.lib.public_interfaces"):
        if parent == f"tinker.{package.partition('.')[2]}" and module in _module_names(package):
            return package
    return None


def _module_names(package: str) -> List[str]:
    names = (tinkex.types if package == "tinkex.types" else tinkex).__all__
    return [_WORD_BOUNDARY.sub("_", name).lower() for name in names]


class _TinkerFinder(MetaPathFinder, Loader):
    """Finds ``tinker`` and its modules, before any other finder can."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        if fullname.partition(".")[0] != "tinker":
            return None
        if _home(fullname) is None:
            # Not left to the other finders: the __path__ is tinkex's own, so they might import one
            # of its modules a second time.
            raise ModuleNotFoundError(
                f"No module named {fullname!r} (tinkex takes the place of tinker)", name=fullname
            )
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> None:
        """Let the import system create a module; `exec_module` replaces it."""

    def exec_module(self, module: ModuleType) -> None:
        # Replaced here rather than in create_module: the import system would overwrite the __spec__
        # of our module.
        sys.modules[module.__name__] = importlib.import_module(_home(module.__name__) or "")


def main(args: Optional[Sequence[str]] = None) -> None:
    """Run a program with tinkex in place of ``tinker``: ``python -m tinkex.as_tinker``."""
    parser = argparse.ArgumentParser(
        prog="python -m tinkex.as_tinker",
        usage="%(prog)s program.py [argument ...]\n       %(prog)s -m module [argument ...]",
        description="Run a Python program that imports tinker with tinkex in its place.",
    )
    parser.add_argument("-m", dest="is_module", action="store_true", help="run a module")
    parser.add_argument("program", help="a file, or a module's name after -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the program")
    given = parser.parse_args(args)
    install_as_tinker()
    sys.argv = [given.program, *given.arguments]
    if given.is_module:
        # "python -m" has already put the current folder first in sys.path, as the program expects.
        runpy.run_module(given.program, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(given.program))
        runpy.run_path(given.program, run_name="__main__")


if __name__ == "__main__":
    main()
