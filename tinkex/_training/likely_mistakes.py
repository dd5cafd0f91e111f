"""Warnings of batches that can be trained on, but are hardly what is meant.  No threads."""

from __future__ import annotations

import logging
from typing import Sequence, Set

from tinkex._runtime.lazy_numpy import np
from tinkex.types import Datum, EncodedTextChunk
from tinkex.types._numbers import as_kept

logger = logging.getLogger(__name__)

_UNSHIFTED = (
    "%s: target_tokens of data[%d] are its input tokens, so the model would learn to repeat what "
    "it has just read. target_tokens[i] is the token after input token i: for next-token training "
    "use model_input = tokens[:-1], target_tokens = tokens[1:], weights = weights[1:]. (This is "
    "logged once.)"
)
_ZERO_WEIGHTS = (
    "%s: all weights of a batch of %d are 0, so it adds nothing to the gradient. Weights are 1 for "
    "the target tokens to learn, such as a completion's, and 0 for the others, such as the "
    "prompt's; an example cut to a maximum length may have lost its whole completion. (This is "
    "logged once.)"
)


class MistakeWatch:
    """Warns once of each kind of mistake.  Thread-safe, but two racing threads may both warn.

    Args:
        owner: whose batches they are: ``"run ..."``.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._warned: Set[str] = set()

    def look_at_targets(self, data: Sequence[Datum]) -> None:
        """Warn if the target tokens of a datum are its input tokens, not shifted by one."""
        if _UNSHIFTED not in self._warned:
            for index, datum in enumerate(data):
                if _is_unshifted(datum):
                    self._warn(_UNSHIFTED, index)
                    return

    def look_at_weights(self, data: Sequence[Datum]) -> None:
        """Warn if all datums of a batch to be trained on have weights, and all of these are 0."""
        if _ZERO_WEIGHTS not in self._warned and all(map(_has_zero_weights, data)):
            self._warn(_ZERO_WEIGHTS, len(data))

    def _warn(self, message: str, number: int) -> None:
        self._warned.add(message)
        logger.warning(message, self._owner, number)


def _is_unshifted(datum: Datum) -> bool:
    targets, chunks = datum.loss_fn_inputs.get("target_tokens"), datum.model_input.chunks
    if targets is None or targets.is_sparse or not chunks:
        return False
    if not all(isinstance(chunk, EncodedTextChunk) for chunk in chunks):
        return False
    first = as_kept(chunks[0], "tokens_np")
    if not len(first) or not targets.values.size or first[0] != targets.values[0]:
        return False  # nearly always: the rest is not looked at
    tokens = datum.model_input.to_numpy()
    # One token repeated is the same when it is shifted.
    return np.array_equal(targets.to_numpy(), tokens) and bool(np.any(tokens != tokens[0]))


def _has_zero_weights(datum: Datum) -> bool:
    weights = datum.loss_fn_inputs.get("weights")
    return weights is not None and not weights.values.any()
