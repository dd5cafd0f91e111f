"""Numbers and flags as callers have them, converted to Python's own.

Settings come from numpy, pandas, torch, YAML and the environment.  Accepted as an integer or a
float are Python's numbers, anything with ``__index__`` or ``__float__`` (such as numpy scalars),
zero-dimensional arrays and tensors and, if *text* is true, strings such as ``"1e-4"``.  A float
without a fraction is also accepted as an integer: a row of a DataFrame holds only floats.  A bool
is never a number.
"""

from __future__ import annotations

import math
import operator
from typing import Any, Iterable, Optional, Type

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.errors import InvalidInputError, TinkexError

_FLAGS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}


def to_int(value: Any, *, text: bool = True) -> Any:
    """Return *value* as an int, or unchanged if it does not stand for an integer."""
    if type(value) is int:
        return value
    number = _plain(value, text)
    if isinstance(number, float) and number.is_integer():
        return int(number)
    return number if type(number) is int else value


def to_float(value: Any, *, text: bool = True) -> Any:
    """Return *value* as a float or an int, or unchanged if it does not stand for a number."""
    if type(value) is float or type(value) is int:
        return value
    number = _plain(value, text)
    return number if type(number) in (int, float) else value


def to_bool(value: Any) -> Any:
    """Return *value* as a bool, or unchanged if it does not stand for one.

    Accepted are bools, 0 and 1, numpy's bools, and words such as ``"true"`` and ``"off"``.
    """
    if type(value) is bool:
        return value
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower(), value)
    plain = _plain(value, False)
    return bool(plain) if type(plain) in (bool, int) and plain in (0, 1) else value


def convert_fields(
    instance: Any, *, ints: Iterable[str] = (), floats: Iterable[str] = (), text: bool = True
) -> None:
    """Convert fields of a frozen dataclass in place.  Other values stay: the class checks them."""
    for name in ints:
        value = getattr(instance, name)
        if value is not None and type(value) is not int:
            object.__setattr__(instance, name, to_int(value, text=text))
    for name in floats:
        value = getattr(instance, name)
        if value is not None and type(value) is not float and type(value) is not int:
            object.__setattr__(instance, name, to_float(value, text=text))


def is_int(value: Any, least: float = -math.inf) -> bool:
    """Return whether *value* is an int (not a bool) of at least *least*."""
    return type(value) is int and value >= least


def is_finite(value: Any) -> bool:
    """Return whether *value* is an int or a float (not a bool), and in the range of floats."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an int of more than 1024 bits
        return False


def as_int(
    what: str,
    value: Any,
    least: int,
    *,
    most: Optional[int] = None,
    text: bool = True,
    otherwise: str = "",
    error: Type[TinkexError] = InvalidInputError,
) -> int:
    """Return *value* as an int from *least* to *most*.

    Raises:
        InvalidInputError, or *error*: *value* is not; the message names *what*, and *otherwise*,
            the other values that are accepted.
    """
    number = to_int(value, text=text)
    if is_int(number, least) and (most is None or number <= most):
        return int(number)
    limits = f"{least} or more" if most is None else f"{least} to {most}"
    message = ErrorText(Setting(what), f" is {value!r}; it must be an integer, {limits}{otherwise}")
    raise error(message)


def as_flag(what: str, value: Any) -> bool:
    """Return *value* as a bool.

    Raises:
        InvalidInputError: *value* does not stand for a bool; the message names *what*.
    """
    flag = to_bool(value)
    if isinstance(flag, bool):
        return flag
    raise InvalidInputError(ErrorText(Setting(what), f" is {value!r}; it must be True or False"))


def as_seconds(
    what: str, value: Any, *, error: Type[TinkexError] = InvalidInputError
) -> Optional[float]:
    """Return a timeout in seconds; None (also for infinity) means no limit.

    Raises:
        InvalidInputError, or *error*: *value* is neither a number nor None.
    """
    number = to_float(value, text=False)
    if number is None or number == math.inf:
        return None
    if type(number) in (int, float) and not math.isnan(number):
        return float(number)
    raise error(
        ErrorText(
            Setting(what), f" is {value!r}; it must be a number of seconds, or None for no limit"
        )
    )


def _plain(value: Any, text: bool) -> Any:
    """Return *value* as an int or a float if it is a number, otherwise as something else."""
    if getattr(value, "shape", ()) != ():
        return value
    if hasattr(value, "item"):
        value = value.item()  # a numpy scalar, an array or a tensor
    if isinstance(value, (bool, complex)):
        return value
    try:
        if isinstance(value, str):
            return _parsed(value) if text else value
        if hasattr(type(value), "__index__"):
            return operator.index(value)
        if hasattr(type(value), "__float__"):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass  # not a number, or out of the range of floats
    return value


def _parsed(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return float(text)
