"""Token ids from lists, arrays, tensors and the return values of tokenizers."""

from __future__ import annotations

import array
from typing import Any, Mapping

from tinkex._runtime.late_import import np
from tinkex.errors import InvalidInputError, a_type
from tinkex.types._numbers import SHORT


def as_tokens(tokens: Any, *, owned: bool = False) -> Any:
    """Return *tokens* as a contiguous array of int32 that shares no memory with them.

    *tokens* are a flat sequence of ints, an array, or the return value of a tokenizer: a mapping
    with ``input_ids`` of one sequence.  The result is an array.array for a short list or tuple of
    plain ints, and a numpy array for anything else.

    Args:
        owned: nothing else refers to the array *tokens*, so it need not be copied.

    Raises:
        InvalidInputError: *tokens* are not a flat sequence of integers, or an integer is outside
            0 .. 2**31 - 1.
    """
    # Exactly int: array.array would also accept bools, which are refused below.
    if isinstance(tokens, (list, tuple)) and len(tokens) <= SHORT and {*map(type, tokens)} <= {int}:
        try:
            short = array.array("i", tokens)
        except OverflowError:
            pass  # the error below names the range
        else:
            if min(short, default=0) >= 0:
                return short
    if isinstance(tokens, Mapping):  # BatchEncoding is a Mapping, not a dict
        return as_tokens(_only_sequence(tokens))
    try:
        ids = np.asarray(tokens)
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: a tensor with a gradient
        raise InvalidInputError(f"tokens are not a flat sequence of integers: {error}") from error
    if ids.ndim == 0:
        raise InvalidInputError(
            f"tokens are of type {type(tokens).__name__}; they must be a flat sequence of integers",
            hint="Encode text first: ModelInput.from_ints(tokenizer.encode(text))."
            if isinstance(tokens, (str, bytes))
            else "Give a list or an array of token ids.",
        )
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InvalidInputError(
            f"tokens must be a flat sequence of integers, not {ids.dtype} of shape {ids.shape}",
            hint=_hint_for(ids),
        )
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > 0x7FFFFFFF):
        raise InvalidInputError(
            f"token ids range from {int(ids.min())} to {int(ids.max())}; "
            "they must lie in 0 .. 2**31 - 1"
        )
    # Copied, because callers reuse buffers; for a list, numpy has just created a new array.
    owned = owned or isinstance(tokens, (list, tuple))
    return ids.astype(np.int32, order="C", copy=not owned)


def hint_for_model_input(given: Any) -> str:
    """Return advice for a caller who gave *given* instead of a ModelInput."""
    try:
        as_tokens(given)
    except InvalidInputError:
        return "Encode text first: ModelInput.from_ints(tokenizer.encode(text))."
    return "Make one from token ids: ModelInput.from_ints(tokens)."


def _only_sequence(encoding: Mapping[str, Any]) -> Any:
    """Return the ids in a tokenizer's result; InvalidInputError unless they are one sequence."""
    if "input_ids" not in encoding:
        raise InvalidInputError(
            f"tokens are {a_type(encoding)} without input_ids",
            hint="Give a flat list of token ids.",
        )
    ids = encoding["input_ids"]
    if not _is_nested(ids):
        return ids
    if len(ids) != 1:
        raise InvalidInputError(
            f"the input_ids of {a_type(encoding)} are {len(ids)} sequences; a model input is one",
            hint="Make one of each: [ModelInput.from_ints(ids) for ids in ...['input_ids']].",
        )
    return ids[0]


def _is_nested(ids: Any) -> bool:
    if isinstance(ids, (list, tuple)):
        return bool(ids) and (isinstance(ids[0], (list, tuple)) or hasattr(ids[0], "shape"))
    return getattr(ids, "ndim", None) == 2


def _hint_for(ids: Any) -> str:
    """Return advice about *ids*, an array that is not a flat sequence of integers."""
    if ids.ndim == 2 and ids.dtype.kind in "iu":
        return (
            f"These are {len(ids)} sequence{'' if len(ids) == 1 else 's'} of ids, one per row: "
            "make a ModelInput of each row, such as tokens[0]."
        )
    if ids.dtype.kind in "fb":
        return "Convert them first, e.g. tokens.astype(np.int32)."
    return "Encode text first: ModelInput.from_ints(tokenizer.encode(text))."
