"""Rotary embeddings whose frequencies depend on the length of the sequence (longrope).

transformers chooses one set of frequencies for an entire forward pass, by the largest position in
it.  That is wrong for a batch of rows of different lengths, and for a prompt that is computed in
pieces.  A RopeLengths chooses for each row by the length of the row's own sequence.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch

_LENGTH_DEPENDENT = ("longrope", "dynamic")


class RopeLengths:
    """The rotary embeddings of *model* that depend on the length of the sequence.

    Attributes:
        thresholds: the lengths, in ascending order, at which the frequencies change: a sequence of
            such a length has other frequencies than one that is a token shorter.  Empty for most
            models.
    """

    def __init__(self, model: Any, longest: int) -> None:
        found: Set[int] = set()
        device = next(model.parameters()).device
        self._lengths: Optional[Sequence[int]] = None  # of the rows of the pass in progress
        for module in model.modules():
            # A dict by type of layer if windowed layers rotate differently, as in Gemma 3.
            kind = getattr(module, "rope_type", None)
            kinds = kind if isinstance(kind, dict) else {None: kind}
            arguments = [
                {} if layer_type is None else {"layer_type": layer_type}
                for layer_type, name in kinds.items()
                if isinstance(name, str) and any(word in name for word in _LENGTH_DEPENDENT)
            ]
            if not arguments:
                continue
            if "position_ids" not in inspect.signature(module.forward).parameters:
                raise TypeError(f"{type(module).__name__} ({kind}) takes no position_ids")
            thresholds = [_threshold(module, longest, device, more) for more in arguments]
            if any(thresholds):
                found.update(length for length in thresholds if length is not None)
                # Set on the instance, where nn.Module's __call__ finds it before the class's
                # method.
                module.forward = functools.partial(self._by_row, module.forward)
        self.thresholds: List[int] = sorted(found)

    def range_of(self, length: int) -> int:
        """Return the number, from 0, of the range between thresholds that *length* lies in."""
        return sum(length >= threshold for threshold in self.thresholds)

    @contextlib.contextmanager
    def rows(self, lengths: Sequence[int]) -> Iterator[None]:
        """Within the block, row i of a forward pass belongs to a sequence of ``lengths[i]``."""
        self._lengths = lengths if self.thresholds else None
        try:
            yield
        finally:
            self._lengths = None

    def _by_row(
        self, forward: Callable[..., Any], x: Any, position_ids: torch.Tensor, **arguments: Any
    ) -> Any:
        """Call *forward* once per range of lengths, and join the results in the rows' order."""
        lengths = self._lengths
        if lengths is None:
            return forward(x, position_ids, **arguments)
        ranges: Dict[int, List[int]] = {}
        for row, length in enumerate(lengths):
            ranges.setdefault(self.range_of(length), []).append(row)
        if len(ranges) == 1:  # the common case: one call
            return _as_of(forward, x, position_ids, max(lengths), arguments)
        # One row of positions may serve all rows: expand it, so that rows can be selected below.
        if position_ids.shape[-2] == 1:
            position_ids = position_ids.expand(*position_ids.shape[:-2], len(lengths), -1)
        joined = [row for rows in ranges.values() for row in rows]
        order = torch.tensor(joined, device=position_ids.device).argsort()
        parts = [
            _as_of(
                forward,
                x,
                position_ids[..., rows, :],
                max(lengths[row] for row in rows),
                arguments,
            )
            for rows in ranges.values()
        ]
        # Axes are counted from the end, (..., rows, positions, frequencies): some models put the
        # three axes of images before the rows.
        return _map(lambda *some: torch.cat(some, -3).index_select(-3, order), *parts)


def _as_of(
    forward: Callable[..., Any],
    x: Any,
    position_ids: torch.Tensor,
    length: int,
    arguments: Dict[str, Any],
) -> Any:
    """Call *forward* as if the sequence had *length* tokens.

    transformers chooses by the largest position.  So append the sequence's last position, because a
    piece may end before it (its angles are dropped again), and clamp larger positions, which are
    padding.
    """
    position_ids = position_ids.clamp(max=length - 1)
    last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
    result = forward(x, torch.cat([position_ids, last], -1), **arguments)
    return _map(lambda values: values[..., :-1, :], result)


def _map(function: Callable[..., torch.Tensor], *results: Any) -> Any:
    """Apply *function* to tensors, or to the tensors of tuples (cosines and sines) in turn."""
    if isinstance(results[0], tuple):
        return tuple(function(*tensors) for tensors in zip(*results))
    return function(*results)


def _threshold(
    module: Any, longest: int, device: torch.device, arguments: Dict[str, Any]
) -> Optional[int]:
    """Return the smallest length up to *longest* with other frequencies than a short sequence has.

    None if there is none.  Found by bisection on what the module computes, since its settings have
    other names in each family and release.
    """
    x = torch.zeros(1, 1, 1, dtype=torch.float32, device=device)
    # Position 1: at 0 all angles are 0, whatever the frequencies.
    position_ids = torch.ones(1, 1, dtype=torch.long, device=device)

    def same(length: int) -> bool:
        angles = _as_of(module.forward, x, position_ids, length, arguments)
        if not isinstance(angles, tuple):
            angles = (angles,)
        return all(torch.equal(one, other) for one, other in zip(angles, short))

    with torch.no_grad():
        result = _as_of(module.forward, x, position_ids, 2, arguments)
        short: Tuple[torch.Tensor, ...] = result if isinstance(result, tuple) else (result,)
        low, high = 2, longest
        if same(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if same(middle) else (low, middle)
        # transformers keeps the last choice of frequencies in the module: leave the module as it
        # was found.
        same(2)
    return high
