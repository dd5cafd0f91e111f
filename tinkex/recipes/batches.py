"""Batches: the examples of each step, reshuffled in each epoch, identical on every run."""

from __future__ import annotations

import functools
import math
from typing import List, Optional, Sequence, TypeVar, overload

from tinkex._runtime.late_import import np
from tinkex._runtime.numeric import as_int
from tinkex.errors import InvalidInputError

T = TypeVar("T")


def split_batch(batch: Sequence[T], count: int) -> List[List[T]]:
    """Split *batch* into *count* parts of nearly the same size; fewer if it has fewer examples."""
    count = max(1, min(count, len(batch)))
    ends = [len(batch) * part // count for part in range(count + 1)]
    return [list(batch[start:end]) for start, end in zip(ends, ends[1:])]


class Batches(Sequence[List[T]]):
    """Batches of *data*; examples are read when their batch is accessed.

    A batch may span two epochs, so every batch is full, except for the last one if *steps* is not
    given.  The order depends only on *seed* and the epoch, so a run that continues sees the same
    batches as an uninterrupted one.

    Args:
        data: anything with a length and indices.
        size: examples per batch.
        epochs: how often each example is used; may be a fraction.
        steps: the number of batches, instead of *epochs*.
        seed: seed of the order; None keeps the order of *data*.

    Raises:
        InvalidInputError: *data* is empty, or an argument is out of range.
    """

    def __init__(
        self,
        data: Sequence[T],
        size: int,
        *,
        epochs: float = 1.0,
        steps: Optional[int] = None,
        seed: Optional[int] = 0,
    ) -> None:
        if len(data) == 0:
            raise InvalidInputError("there are no examples to train on")
        if not 0 < epochs < math.inf:
            raise InvalidInputError(f"epochs is {epochs}; it must be positive")
        self._data = data
        self._size = as_int("size", size, 1, text=False)
        self._seed = seed
        if steps is not None:
            self._steps = as_int("steps", steps, 1, text=False)
            self._examples = self._steps * self._size
        else:
            self._examples = max(1, round(len(data) * epochs))
            self._steps = math.ceil(self._examples / self._size)
        # The orders of the current epoch and of the next one, into which a batch may reach.
        self._order = functools.lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return self._steps

    @overload
    def __getitem__(self, index: int) -> List[T]: ...

    @overload
    def __getitem__(self, index: slice) -> List[List[T]]: ...

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """Return the batch of one step, or a list of batches for a slice."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(self._steps))]
        if not -self._steps <= index < self._steps:
            raise IndexError(f"there are {self._steps} batches")
        first = (index % self._steps) * self._size
        places = range(first, min(first + self._size, self._examples))
        return [self._data[self._index_at(place)] for place in places]

    def _index_at(self, place: int) -> int:
        epoch, offset = divmod(place, len(self._data))
        return offset if self._seed is None else int(self._order(epoch)[offset])

    def _order_of(self, epoch: int):  # type: ignore[no-untyped-def]
        # RandomState, because it yields the same numbers in every release of numpy.
        return np.random.RandomState([self._seed or 0, epoch]).permutation(len(self._data))
