"""Checks of arguments before anything is sent, and warnings about likely mistakes in batches."""

from __future__ import annotations

import logging
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Union

from tinkex._runtime.late_import import np
from tinkex._runtime.numeric import as_int, is_finite, to_float
from tinkex.errors import InvalidInputError, a_type
from tinkex.types import Datum, EncodedTextChunk, TensorData
from tinkex.types._numbers import as_kept
from tinkex.types.datum import INPUT_DTYPES
from tinkex.types.tensor_data import first_where

logger = logging.getLogger(__name__)

#: Loss inputs that have one entry per input token, on every server that knows them.
_PER_TOKEN = frozenset(INPUT_DTYPES)

#: Other names of loss inputs that were already checked for a misspelling; there are few.
_checked_names: Set[str] = set()


_UNSHIFTED = (
    "%s: target_tokens of data[%d] are its input tokens, so the model would learn to repeat what "
    "it has just read. target_tokens[i] is the token after input token i: for next-token training "
    "use model_input = tokens[:-1], target_tokens = tokens[1:], weights = weights[1:]. (this "
    "warning is shown once)"
)
_ZERO_WEIGHTS = (
    "%s: all weights of a batch of %d are 0, so it adds nothing to the gradient. Weights are 1 for "
    "the target tokens to learn, such as a completion's, and 0 for the others, such as the "
    "prompt's; an example cut to a maximum length may have lost all of its completion. "
    "(this warning is shown once)"
)


def check_batch(data: Sequence[Datum], loss_fn: str) -> List[Datum]:
    """Return a snapshot of *data*.

    Raises:
        InvalidInputError: *data* is empty; or an element of it is not a Datum, has an empty
            model_input, or has a loss input of the wrong length or with NaN or infinity; or
            *loss_fn* is not a name.
    """
    if not isinstance(loss_fn, str) or not loss_fn:
        raise InvalidInputError(f"the loss is {loss_fn!r}; give its name, e.g. 'cross_entropy'")
    if isinstance(data, Datum) or not isinstance(data, Iterable):
        raise InvalidInputError(
            f"the batch is {a_type(data)}; it must be a list of Datum",
            hint="A single example is a batch of one: [datum].",
        )
    # The batch is encoded later, in another thread; until then the caller may change its lists.
    batch = [_snapshot(index, datum) for index, datum in enumerate(data)]
    if not batch:
        raise InvalidInputError("the batch is empty", hint="Give at least one Datum.")
    for index, datum in enumerate(batch):
        _check_lengths(index, datum)
    _check_numbers(batch)
    return batch


def as_loss_config(
    loss_fn_config: Optional[Mapping[str, Union[float, str]]],
) -> Dict[str, Union[float, str]]:
    """Return a copy of *loss_fn_config* with Python's own int, float and str.

    Raises:
        InvalidInputError: *loss_fn_config* does not map names to finite numbers and strings.
    """
    if not isinstance(loss_fn_config, (Mapping, type(None))):
        raise InvalidInputError(f"loss_fn_config is {a_type(loss_fn_config)}; it must be a dict")
    config: Dict[str, Union[float, str]] = {}
    for name, given in (loss_fn_config or {}).items():
        # The protocol has no booleans here (docs/protocol.md, "Passes").
        value: Any = int(given) if isinstance(given, bool) else to_float(given, text=False)
        if not (isinstance(name, str) and (is_finite(value) or isinstance(value, str))):
            raise InvalidInputError(
                f"loss_fn_config[{name!r}] is {given!r}; it must be a finite number or a string, "
                "and its name a string"
            )
        config[name] = value
    return config


def _snapshot(index: int, datum: Any) -> Datum:
    if not isinstance(datum, Datum):
        raise InvalidInputError(f"data[{index}] is {a_type(datum)}, not a Datum")
    try:
        return datum._snapshot()
    except InvalidInputError as error:
        message = f"data[{index}]: {error.message}"
        raise InvalidInputError(message, hint=error.hint) from error


def _check_lengths(index: int, datum: Datum) -> None:
    length = 0
    for chunk in datum.model_input.chunks:
        if not isinstance(chunk, EncodedTextChunk):
            return  # only the server knows how many tokens an image takes
        length += chunk.length
    if length == 0:
        raise InvalidInputError(
            f"data[{index}]: model_input has no tokens",
            hint="Leave empty examples out of the batch.",
        )
    what = f"{length} tokens"
    targets = datum.loss_fn_inputs.get("target_tokens")
    if targets is not None and 0 < len(targets) < length and not _lacks_one(datum, targets):
        # Targets for the response alone: some servers align loss inputs with the end of the input.
        length, what = len(targets), f"{len(targets)} target tokens"
    for name, tensor in datum.loss_fn_inputs.items():
        if name not in _PER_TOKEN:
            if name not in _checked_names:
                _warn_if_misspelt(name)
        elif len(tensor) != length:
            raise InvalidInputError(
                f"data[{index}]: loss input {name!r} has {len(tensor)} entries for {what}",
                hint="It needs one per input token. For next-token training use "
                "model_input = tokens[:-1], target_tokens = tokens[1:], weights = weights[1:].",
            )


def _lacks_one(datum: Datum, targets: TensorData) -> bool:
    """Whether *targets* are the input tokens without the first or the last one."""
    # A common mistake: the targets were shifted, but the input was not cut to their length.
    tokens, given = datum.model_input.to_numpy(), targets.to_numpy()
    return np.array_equal(given, tokens[1:]) or np.array_equal(given, tokens[:-1])


def _warn_if_misspelt(name: str) -> None:
    """Warn, once, about a loss input that seems misspelt: a server may ignore it silently."""
    import difflib

    # Not locked: adding is atomic, and at worst two threads warn about the same name.
    _checked_names.add(name)
    for known in difflib.get_close_matches(name, sorted(_PER_TOKEN), 1, 0.8):
        logger.warning(
            "there is no loss input %r, and a server may ignore it: is %r meant?", name, known
        )


def _check_numbers(batch: Sequence[Datum]) -> None:
    """Raise InvalidInputError if a loss input holds NaN or infinity."""
    floats = [
        tensor.values
        for datum in batch
        for tensor in datum.loss_fn_inputs.values()
        if tensor.dtype == "float32"
    ]
    first = first_where(lambda array: ~np.isfinite(array), floats)
    if first is None:
        return
    at = int(np.flatnonzero(~np.isfinite(floats[first]))[0])
    index, name = next(
        (index, name)
        for index, datum in enumerate(batch)
        for name, tensor in datum.loss_fn_inputs.items()
        if tensor.values is floats[first]
    )
    raise InvalidInputError(
        f"data[{index}]: loss input {name!r} holds {floats[first][at]} at position {at}",
        hint="Training on NaN or infinity would spoil the weights; find out where they come from.",
    )


class MistakeWatch:
    """Warns once about each kind of mistake.  Thread-safe, but two racing threads may both warn.

    Args:
        owner: the owner of the batches, for messages: ``"run ..."``.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._warned: Set[str] = set()

    def check_targets(self, data: Sequence[Datum]) -> None:
        """Warn if the target tokens of a datum are its input tokens, not shifted by one."""
        if _UNSHIFTED not in self._warned:
            for index, datum in enumerate(data):
                if _is_unshifted(datum):
                    self._warn(_UNSHIFTED, index)
                    return

    def check_weights(self, data: Sequence[Datum]) -> None:
        """Warn if every datum of a training batch has weights, and all of the weights are 0."""
        if _ZERO_WEIGHTS not in self._warned and all(map(_has_zero_weights, data)):
            self._warn(_ZERO_WEIGHTS, len(data))

    def _warn(self, message: str, detail: int) -> None:
        self._warned.add(message)
        logger.warning(message, self._owner, detail)


def _is_unshifted(datum: Datum) -> bool:
    targets, chunks = datum.loss_fn_inputs.get("target_tokens"), datum.model_input.chunks
    if targets is None or targets.is_sparse or not chunks:
        return False
    if not all(isinstance(chunk, EncodedTextChunk) for chunk in chunks):
        return False
    first = as_kept(chunks[0], "tokens_np")
    if not len(first) or not targets.values.size or first[0] != targets.values[0]:
        return False  # nearly always decides, at the cost of one comparison
    tokens = datum.model_input.to_numpy()
    # If the input repeats a single token, shifted targets look the same.
    return np.array_equal(targets.to_numpy(), tokens) and bool(np.any(tokens != tokens[0]))


def _has_zero_weights(datum: Datum) -> bool:
    weights = datum.loss_fn_inputs.get("weights")
    return weights is not None and not weights.values.any()


def check_ttl(ttl_seconds: Any) -> Optional[int]:
    """Return *ttl_seconds* as an int, 1 or more, or None; otherwise raise InvalidInputError."""
    if ttl_seconds is None:
        return None
    return as_int("ttl_seconds", ttl_seconds, 1, otherwise=", or None")


def check_token(weights_access_token: Any) -> Optional[str]:
    """Return the token without whitespace around it, or None.

    Raises InvalidInputError if it is not a valid token.
    """
    if weights_access_token is None:
        return None
    if not isinstance(weights_access_token, str):
        raise InvalidInputError(
            f"weights_access_token is of type {type(weights_access_token).__name__}, not a string"
        )
    token = weights_access_token.strip()
    # `copy_weights` sends it as a header, which must not hold a line break.
    if not (token.isascii() and token.isprintable()):
        raise InvalidInputError("weights_access_token holds characters that no valid token has")
    return token or None


def check_name(name: object) -> str:
    """Return the name of a checkpoint without surrounding whitespace.

    A name read from a file often ends with a line break.

    Raises:
        InvalidInputError: *name* cannot name a checkpoint.
    """
    if not isinstance(name, str):
        raise InvalidInputError(
            f"checkpoint name {name!r} is of type {type(name).__name__}, not a string",
            hint="Write a number as text, e.g. f'step-{step}'.",
        )
    bare = name.strip()
    if bare in ("", ".", "..") or "/" in bare or not bare.isprintable():
        raise InvalidInputError(
            f"checkpoint name {name!r} must be a bare name, without slashes or line breaks",
            hint="The server makes the path: tinker://<run>/weights/<name>.",
        )
    return bare


def check_metadata(user_metadata: Optional[Mapping[str, str]]) -> Optional[Dict[str, str]]:
    """Return a copy; raise InvalidInputError unless *user_metadata* maps strings to strings."""
    if user_metadata is None:
        return None
    if not isinstance(user_metadata, Mapping):
        raise InvalidInputError(f"user_metadata is {a_type(user_metadata)}; it must be a dict")
    for key, value in user_metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidInputError(
                f"user_metadata[{key!r}] is {value!r}; keys and values must be strings"
            )
    return dict(user_metadata)


def check_recipients(recipients: Optional[Sequence[str]]) -> Optional[List[str]]:
    """Return a copy; raise InvalidInputError unless *recipients* is a list of strings."""
    if recipients is None:
        return None
    is_list = isinstance(recipients, Iterable) and not isinstance(recipients, str)
    found = list(recipients) if is_list else []
    if not found or not all(isinstance(recipient, str) and recipient for recipient in found):
        raise InvalidInputError(
            f"age_encryption_recipients is {a_type(recipients)}, which is not valid",
            hint="Give a list of age public keys, such as 'age1...', or None for no encryption.",
        )
    return found
