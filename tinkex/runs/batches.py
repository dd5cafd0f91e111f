"""Batches of a run, from any place on."""

from __future__ import annotations

import itertools
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence, TypeVar, Union

from tinkex.errors import InvalidInputError, a_type

B = TypeVar("B")

#: A sequence; a function of how many batches to leave out; or an iterable that yields the same
#: batches each time.
Batches = Union[Sequence[B], Callable[[int], Iterable[B]], Iterable[B]]


def batches_from(batches: Batches[B], first: int) -> Iterator[B]:
    """Iterate over *batches* from number *first* on.

    Nothing is read that is left out, except of a plain iterable, which is advanced.

    Raises:
        InvalidInputError: *batches* is not iterable, or an iterable is shorter than *first*.
    """
    indexed: Any = batches
    if isinstance(batches, Sequence) or _is_indexed(batches):
        return (indexed[index] for index in range(first, len(indexed)))
    if callable(batches):
        return iter(batches(first))
    if not isinstance(batches, Iterable):
        raise InvalidInputError(
            f"batches is {a_type(batches)}",
            hint="Give a sequence, an iterable, or a function of the number of batches to skip.",
        )
    remaining = iter(batches)
    # Counted, because islice ends silently: data that became shorter would look like a finished
    # loop.
    skipped = sum(1 for _ in itertools.islice(remaining, first))
    if skipped < first:
        raise InvalidInputError(
            f"there are only {skipped} batches, but the run has done {first} of them already",
            hint="Batches must be the same each time that the program runs.",
        )
    return remaining


def _is_indexed(batches: object) -> bool:
    """Whether it has a length and an order without being a Sequence, like a data set."""
    has = all(hasattr(batches, name) for name in ("__len__", "__getitem__"))
    # A mapping has both methods, too, but takes keys, not places.
    return has and not isinstance(batches, Mapping)
