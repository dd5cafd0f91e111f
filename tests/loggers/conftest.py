"""Stand-ins for optional packages, with the part of their public interface that the loggers use."""

from __future__ import annotations

import sys
import types

import pytest

from tinkex._runtime import late_import


@pytest.fixture
def install(monkeypatch):
    """Return a function that installs a module of *name* with the given attributes."""

    def install(name, **attributes):
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(late_import._modules, name, module)
        return module

    return install


@pytest.fixture
def uninstall(monkeypatch):
    """Return a function that makes importing *name* fail."""

    def uninstall(*names):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.delitem(late_import._modules, name, raising=False)

    return uninstall
