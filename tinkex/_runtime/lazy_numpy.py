"""numpy, imported when it is first used: ``from tinkex._runtime.lazy_numpy import np``.

It is a third of what importing the clients takes in time and a quarter in memory, and a program
that only looks at runs and checkpoints never needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinkex._runtime.late_import import import_late

if TYPE_CHECKING:
    import numpy as np
else:

    class _Numpy:
        """Stands for the module; what was asked for once is found like any attribute."""

        def __getattr__(self, name: str) -> Any:
            value = getattr(import_late("numpy"), name)
            setattr(self, name, value)
            return value

    np = _Numpy()

__all__ = ["np"]
