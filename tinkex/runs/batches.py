"""The batches of a run, starting at any position."""

from __future__ import annotations

import itertools
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence, TypeVar, Union

from tinkex.errors import InvalidInputError, a_type

B = TypeVar("B")

#: A sequence; a function that takes the number of batches to skip and returns an iterable of the
#: rest; or an iterable that yields the same batches each time.
Batches = Union[Sequence[B], Callable[[int], Iterable[B]], Iterable[B]]


def batches_from(batches: Batches[B], first: int) -> Iterator[B]:
    """Iterate over *batches*, starting with number *first*.

    The skipped batches are read only if *batches* is a plain iterable.

    Raises:
        InvalidInputError: *batches* is not iterable, or is an iterable with fewer than *first*
            batches.
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
    # Count them, because islice ends silently: data that has become shorter would look like a
    # finished loop.
    skipped = sum(1 for _ in itertools.islice(remaining, first))
    if skipped < first:
        raise InvalidInputError(
            f"there are only {skipped} batches, but the run has done {first} of them already",
            hint="Batches must be the same each time that the program runs.",
        )
    return remaining


def _is_indexed(batches: object) -> bool:
    """Whether *batches* has a length and indices without being a Sequence, like a data set."""
    has = all(hasattr(batches, name) for name in ("__len__", "__getitem__"))
    # A mapping has both methods, too, but takes keys, not indices.
    return has and not isinstance(batches, Mapping)
