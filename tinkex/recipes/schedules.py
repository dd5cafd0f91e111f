"""Schedules: functions from the index of a step, from 0, to the parameters of the optimizer.

Each begins with *warmup* steps in which the learning rate rises linearly, from 1/*warmup* of it in
the first step.  Steps after the last one have the rate of the last one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Callable

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex._runtime.numeric import as_int
from tinkex.errors import InvalidInputError
from tinkex.types import AdamParams

Schedule = Callable[[int], AdamParams]


def constant(learning_rate: float, *, warmup: int = 0, **adam: Any) -> Schedule:
    """Return a schedule with the same *learning_rate* for every step.

    Args:
        learning_rate: the learning rate after warm-up.
        warmup: the number of warm-up steps.
        adam: further parameters, as for `AdamParams`.

    Raises:
        InvalidInputError: an argument is out of range.
    """
    return _schedule(_constant, learning_rate, 0, warmup, adam)


def linear(learning_rate: float, steps: int, *, warmup: int = 0, **adam: Any) -> Schedule:
    """Return a schedule that decreases linearly from *learning_rate* to zero after *steps* steps.

    Other arguments and errors as for `constant`.
    """
    return _schedule(_linear, learning_rate, steps, warmup, adam)


def cosine(learning_rate: float, steps: int, *, warmup: int = 0, **adam: Any) -> Schedule:
    """Return a schedule that decreases along half a cosine to zero after *steps* steps.

    Other arguments and errors as for `constant`.
    """
    return _schedule(_cosine, learning_rate, steps, warmup, adam)


def _constant(done: float) -> float:
    return 1.0


def _linear(done: float) -> float:
    return 1.0 - done


def _cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _schedule(
    decay: Callable[[float], float], learning_rate: float, steps: int, warmup: int, adam: Any
) -> Schedule:
    params = AdamParams(learning_rate=learning_rate, **adam)
    params.check()
    steps = as_int("steps", steps, 0 if decay is _constant else 1, text=False)
    warmup = as_int("warmup", warmup, 0, text=False)
    if decay is not _constant and warmup >= steps:
        raise InvalidInputError(
            ErrorText(Setting("warmup"), f" is {warmup}; it must be less than the {steps} steps")
        )
    return functools.partial(_params_of, params, decay, steps, warmup)


def _params_of(
    params: AdamParams, decay: Callable[[float], float], steps: int, warmup: int, index: int
) -> AdamParams:
    if index < warmup:
        share = (index + 1) / warmup
    else:
        # The rate reaches zero only after the last step: otherwise that step would do nothing.
        share = decay((min(index, steps - 1) - warmup) / (steps - warmup) if steps else 0.0)
    return dataclasses.replace(params, learning_rate=params.learning_rate * share)
