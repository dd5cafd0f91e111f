"""Prepared: the examples of a file as training data, prepared when a batch needs them.

Also the checks before training begins: for examples that cannot be prepared, and for held-out
examples that are trained on as well.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf
from hashlib import blake2b
from typing import Any, Callable, Dict, Generic, List, Optional, Sequence, Tuple, TypeVar

import orjson

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex._runtime.late_import import np
from tinkex.data import Example, Examples
from tinkex.errors import InvalidInputError

logger = logging.getLogger(__name__)

P = TypeVar("P")

#: Called with the number of examples checked so far, and in all.
OnProgress = Callable[[int, int], Any]

#: Prepared examples are cached up to this many bytes; the rest are prepared again when needed.
KEPT_BYTES = 64 << 20

#: How many bad examples an error describes.
_LISTED = 5
#: Training ends after this many bad examples in a row, even with *skip_bad*.
_MAX_BAD = 100
_SKIP_BAD = Setting("skip_bad", True)


class Prepared(SequenceOf, Generic[P]):  # type: ignore[type-arg]
    """A sequence of examples, each as ``prepare(example)`` returns it.  For one thread.

    Args:
        examples: the examples of a file.
        prepare: returns a datum, or a pair of them; raises InvalidInputError.
        indices: the indices of the examples to use, in increasing order; by default all.
        skip_bad: replace an example that cannot be prepared with the next one, with a warning.
    """

    def __init__(
        self,
        examples: Examples,
        prepare: Callable[[Example], P],
        indices: Optional[Sequence[int]] = None,
        *,
        skip_bad: bool = False,
    ) -> None:
        self._examples = examples
        self._prepare = prepare
        self._indices: Any = np.arange(len(examples)) if indices is None else np.array(indices, int)
        self._skip_bad = skip_bad
        self._kept: Dict[int, P] = {}
        self._room = KEPT_BYTES

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: Any) -> Any:
        """Return one example, or a list of examples for a slice.

        Raises:
            InvalidInputError: an example cannot be prepared, or the file has changed.
        """
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        first = range(len(self))[place]  # raises IndexError if it is out of range
        # Bad examples are replaced, so that the number and size of the batches stay the same.
        for tried in range(_MAX_BAD):
            try:
                return self._made(int(self._indices[(first + tried) % len(self)]))
            except InvalidInputError as error:
                if not self._skip_bad or tried == _MAX_BAD - 1:
                    if not self._skip_bad and error.hint is None:
                        error.hint = ErrorText("Correct it, or leave it out: ", _SKIP_BAD, ".")
                    raise
                logger.warning("left out: %s", error.message)

    def check(self, most: int, progress: Optional[OnProgress] = None) -> int:
        """Prepare the first examples, to find bad ones before training begins.

        With *skip_bad*, bad examples are left out, with one warning.

        Args:
            most: the maximum number to check, so that training on a large file begins soon.
            progress: called after each example.

        Returns:
            How many examples were checked.

        Raises:
            InvalidInputError: some of them cannot be prepared; with *skip_bad*, none of them can.
        """
        checked = min(most, len(self))
        bad: List[int] = []
        messages: List[str] = []
        for place in range(checked):
            try:
                self._made(int(self._indices[place]))
            except InvalidInputError as error:
                bad.append(place)
                if len(bad) <= _LISTED:
                    messages.append(error.message)
            if progress is not None:
                progress(place + 1, checked)
        if bad:
            more = ["..."] if len(bad) > _LISTED else []
            count = f"{len(bad)} of {checked} examples cannot be used:"
            message = "\n  ".join([count, *messages, *more])
            if not self._skip_bad or len(bad) == len(self):
                hint = (
                    None
                    if self._skip_bad
                    else ErrorText("Correct them, or leave them out: ", _SKIP_BAD, ".")
                )
                raise InvalidInputError(message, hint=hint)
            logger.warning("left out: %s", message)
            self._indices = np.delete(self._indices, bad)
        return checked

    def leave_out(self, others: Prepared[P]) -> int:
        """Leave out the examples that *others* also has; return how many.  Reads all of both."""
        # Keep digests, and only of the smaller side: the examples may not fit into memory.
        own = [digest_of(self._examples[index]) for index in self._indices.tolist()]
        wanted = set(own)
        is_other = np.zeros(len(others._examples), bool)
        is_other[others._indices] = True
        found = (digest_of(e) for e, other in zip(others._examples, is_other) if other)
        shared = {digest for digest in found if digest in wanted}
        kept = [digest not in shared for digest in own]
        self._indices = self._indices[kept]
        return len(own) - len(self)

    def _made(self, index: int) -> P:
        """Return example *index* of the file, prepared; cache it if there is room."""
        kept = self._kept.get(index)
        if kept is not None:
            return kept
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
    """Return a digest of 16 bytes, equal for equal examples only."""
    return blake2b(orjson.dumps(example), digest_size=16).digest()


def split_heldout(count: int, heldout: int, seed: int) -> Tuple[Any, Any]:
    """Choose *heldout* of *count* examples at random, determined by *seed*.

    Returns:
        The indices of the examples to train on, and of those held out; both are arrays in
        increasing order.
    """
    # RandomState, because it yields the same numbers in every release of numpy: a run that
    # continues must hold out the same examples.
    order = np.random.RandomState(seed).permutation(count)
    return np.sort(order[heldout:]), np.sort(order[:heldout])
