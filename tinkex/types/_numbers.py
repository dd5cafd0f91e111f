"""Flat sequences of numbers that become numpy arrays on first use.

Importing numpy takes more time and memory than everything else that a program needs to sample short
texts.  So short lists and results are kept as an ``array.array``, whose memory numpy can share
later.  Both kinds of array have a length, ``tolist`` and ``tobytes``.
"""

from __future__ import annotations

import array
import math
import sys
from typing import Any, Callable, Type, TypeVar

from tinkex._runtime.late_import import np

C = TypeVar("C")

#: Up to this length a loop in Python is cheaper than importing numpy.
SHORT = 2000

_DTYPES = {"i": "int32", "f": "float32"}


class _Field:
    """A dataclass field that may be set to an array.array and reads as a numpy array."""

    def __init__(self, name: str) -> None:
        self._kept = f"_{name}"

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        values = getattr(instance, self._kept)
        # Two threads may both convert the value; their arrays share the same memory.
        if isinstance(values, array.array):
            values = np.frombuffer(values, _DTYPES[values.typecode])
            self.__set__(instance, values)
        return values

    def __set__(self, instance: Any, values: Any) -> None:
        object.__setattr__(instance, self._kept, values)  # the dataclass may be frozen


def numpy_on_demand(*names: str) -> Callable[[Type[C]], Type[C]]:
    """Return a class decorator: fields *names* may hold an array.array, and read as numpy."""

    def decorate(cls: Type[C]) -> Type[C]:
        for name in names:
            setattr(cls, name, _Field(name))
        return cls

    return decorate


def as_kept(instance: Any, name: str) -> Any:
    """Return the value of field *name* unconverted: an array of either kind, or None."""
    return getattr(instance, f"_{name}")


def from_bytes(typecode: str, raw: bytes) -> Any:
    """Read little-endian *raw* as an array of int32 (typecode ``"i"``) or float32 (``"f"``).

    Raises ValueError if the length is not a multiple of four.
    """
    values = array.array(typecode, raw)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def holds_nan(values: Any) -> bool:
    """Whether *values*, an array of either kind, contains NaN."""
    if isinstance(values, array.array) and len(values) <= SHORT:
        return any(map(math.isnan, values))
    return bool(np.any(np.isnan(values)))
