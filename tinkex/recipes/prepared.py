"""Prepared: the examples of a file as data for training, made when a batch needs them.

And what a file is checked for before training begins: examples that cannot be prepared, and
held-out examples that are trained on as well.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf
from hashlib import blake2b
from typing import Any, Callable, Dict, Generic, List, Optional, Sequence, Tuple, TypeVar

import orjson

from tinkex._runtime.late_import import np
from tinkex.data import Example, Examples
from tinkex.errors import InvalidInputError

logger = logging.getLogger(__name__)

P = TypeVar("P")

#: Called with how many examples of how many were looked at.
OnProgress = Callable[[int, int], Any]

#: So many bytes of prepared examples are kept in memory; others are prepared again.
KEPT_BYTES = 64 << 20

#: Bad examples that an error describes.
_LISTED = 5


class Prepared(SequenceOf, Generic[P]):  # type: ignore[type-arg]
    """*indices* of *examples*, each as ``prepare(example)`` returns it.  For one thread.

    Args:
        examples: of one file.
        prepare: returns a datum, or a pair of them; raises InvalidInputError.
        indices: those to use, in order; all by default.
    """

    def __init__(
        self,
        examples: Examples,
        prepare: Callable[[Example], P],
        indices: Optional[Sequence[int]] = None,
    ) -> None:
        self._examples = examples
        self._prepare = prepare
        self._indices: Any = np.arange(len(examples)) if indices is None else np.array(indices, int)
        self._kept: Dict[int, P] = {}
        self._room = KEPT_BYTES

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: Any) -> Any:
        """Return one example, or a list of those of a slice.

        Raises:
            InvalidInputError: it cannot be prepared, or the file has changed.
        """
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        index = int(self._indices[place])
        found = self._kept.get(index)
        return self._make(index) if found is None else found

    def check(self, *, skip_bad: bool = False, progress: Optional[OnProgress] = None) -> None:
        """Prepare every example once, so that a bad one is found before training begins.

        Args:
            skip_bad: leave the bad ones out, with a warning.
            progress: called after each.

        Raises:
            InvalidInputError: some cannot be prepared, or all.
        """
        bad: List[str] = []
        good: List[int] = []
        for done, index in enumerate(self._indices.tolist(), 1):
            try:
                self._make(index)
                good.append(index)
            except InvalidInputError as error:
                bad.append(error.message)
            if progress is not None:
                progress(done, len(self))
        if not bad:
            return
        listed = bad[:_LISTED] + (["..."] if len(bad) > _LISTED else [])
        message = "\n  ".join([f"{len(bad)} of {len(self)} examples cannot be used:", *listed])
        if not skip_bad or not good:
            hint = None if skip_bad else "Correct them, or leave them out with skip_bad=True."
            raise InvalidInputError(message, hint=hint)
        logger.warning("left out: %s", message)
        self._indices = np.array(good, int)

    def leave_out(self, others: Prepared[P]) -> int:
        """Leave out the examples that *others* has, too; return how many.  Reads all of both."""
        digests = {index: digest_of(self._examples[index]) for index in self._indices.tolist()}
        own = set(digests.values())
        found = (digest_of(others._examples[index]) for index in others._indices.tolist())
        shared = {digest for digest in found if digest in own}
        kept = [index for index, digest in digests.items() if digest not in shared]
        self._indices = np.array(kept, int)
        return len(digests) - len(kept)

    def _make(self, index: int) -> P:
        try:
            made = self._prepare(self._examples[index])
        except InvalidInputError as error:
            where = f"line {self._examples.line(index)} of {self._examples.path}"
            raise InvalidInputError(f"{where}: {error.message}", hint=error.hint) from error
        data: Any = made if isinstance(made, tuple) else (made,)
        nbytes = sum(datum.nbytes for datum in data)
        if nbytes <= self._room:
            self._room -= nbytes
            self._kept[index] = made
        return made


def digest_of(example: Example) -> bytes:
    """Return 16 bytes that are the same for equal examples, and for no others."""
    return blake2b(orjson.dumps(example), digest_size=16).digest()


def split_heldout(count: int, heldout: int, seed: int) -> Tuple[Any, Any]:
    """Choose *heldout* of *count* examples by *seed*; return the indices of the others, and theirs.

    Both are arrays in increasing order.
    """
    order = np.random.RandomState(seed).permutation(count)
    return np.sort(order[heldout:]), np.sort(order[:heldout])
