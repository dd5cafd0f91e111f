"""Splitting a batch into requests, and joining their results (docs/protocol.md, "Chunking")."""

from __future__ import annotations

import math
from typing import Collection, Dict, List, Mapping, Sequence

from tinkex.errors import InvalidInputError
from tinkex.types import ForwardBackwardOutput

_UINT64 = (1 << 64) - 1


def split(
    sizes: Sequence[int], max_datums: int, max_bytes: int, breaks: Collection[int] = ()
) -> List[slice]:
    """Split datums of *sizes* bytes, in order, into slices of at most *max_datums* and *max_bytes*.

    A datum larger than *max_bytes* gets a slice of its own.  A new slice begins at each index in
    *breaks*.  Without datums there are no slices.
    """
    slices: List[slice] = []
    start = filled_bytes = 0
    for index, nbytes in enumerate(sizes):
        filled_bytes += nbytes
        full = index - start == max_datums or filled_bytes > max_bytes
        if index > start and (full or index in breaks):
            slices.append(slice(start, index))
            start, filled_bytes = index, nbytes
    if sizes:
        slices.append(slice(start, len(sizes)))
    return slices


def combine(outputs: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """Join the outputs of the chunks of one batch, given in chunk order.

    The part of a metric's name after the colon says how the metric is reduced: ``sum``, ``min``,
    ``max``, ``mean`` (weighted by datums), ``slack`` (max minus mean), ``hash2`` (sum modulo
    2**64), ``unique`` (the first value keeps the name, the i-th after it is named ``<name>_<i>``).
    The names are those of the first chunk; a metric that another chunk lacks is dropped, because
    reducing only some of the chunks would give a wrong value.

    A name without exactly one colon, or with an unknown reduction, is treated like ``unique``; a
    mean over chunks without any datum is unweighted.  A single chunk is reduced like several.

    Raises:
        InvalidInputError: *outputs* is empty.
    """
    if not outputs:
        raise InvalidInputError("there are no outputs to combine")
    weights = [len(output.loss_fn_outputs) for output in outputs]
    metrics: Dict[str, float] = {}
    # For an unknown reduction, the official SDK raises an error or drops the metric.  Here, a
    # server's new metric must not cost the result of a batch.
    for name in outputs[0].metrics:
        if all(name in output.metrics for output in outputs):
            values = [output.metrics[name] for output in outputs]
            metrics.update(_reduce(name, values, weights))
    return ForwardBackwardOutput(
        loss_fn_outputs=[datum for output in outputs for datum in output.loss_fn_outputs],
        metrics=metrics,
        loss_fn_output_type=outputs[0].loss_fn_output_type,
    )


def _reduce(name: str, values: Sequence[float], weights: Sequence[int]) -> Mapping[str, float]:
    reduction = name.partition(":")[2] if name.count(":") == 1 else ""
    if reduction == "sum":
        return {name: float(sum(values))}
    if reduction == "mean":
        return {name: _mean(values, weights)}
    if reduction == "min":
        return {name: -_max([-value for value in values])}
    if reduction == "max":
        return {name: _max(values)}
    if reduction == "slack":
        return {name: _max(values) - _mean(values, weights)}
    # In integers: the float64 sum of two large hashes would lose their low bits.
    if reduction == "hash2" and all(math.isfinite(value) for value in values):
        return {name: sum(int(value) & _UINT64 for value in values) & _UINT64}
    return {name if i == 0 else f"{name}_{i}": value for i, value in enumerate(values)}


def _max(values: Sequence[float]) -> float:
    # Python's max drops a NaN that is not the first element.
    return math.nan if any(math.isnan(value) for value in values) else float(max(values))


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    if len(values) == 1:  # value * weight / weight may differ from value in the last bit
        return float(values[0])
    if not any(weights):
        weights = [1] * len(values)
    return sum(value * weight for value, weight in zip(values, weights)) / sum(weights)
