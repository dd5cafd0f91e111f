"""Training data: checked, turned into arrays, and cut into micro-batches of like length."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Dict, List, Mapping, Sequence, Union

import numpy as np
import numpy.typing as npt

from tinkex.errors import InvalidInputError
from tinkex.local.engines.engine import LOSSES, EngineError, EngineInfo, check_sequence_mask
from tinkex.local.engines.torch_engine.losses import LOSS_TABLE, SEQUENCE_MASK, Loss
from tinkex.types import Datum, ModelInput, TensorData

Array = npt.NDArray[Any]

#: Tokens (with padding) of one pass: bounds the activations kept (SmolLM2: about 2 MB each).
TOKENS_PER_PASS = 2048

# Shorter rows than this share of the longest one go into another pass, if that pass is not tiny.
_LIKE_LENGTH = 0.8
_WORTH_A_PASS = 512


@dataclasses.dataclass(frozen=True)
class Row:
    """One datum, checked.

    Attributes:
        tokens: int32, shape (n,).
        targets: int64, shape (m, k), of the last m <= n tokens; k is 1 for one-dimensional
            ``target_tokens``.
        inputs: float32 arrays of the same shape, by loss input name, defaults filled in.
        shape: the shape of ``target_tokens`` as it was given.
    """

    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int64]
    inputs: Dict[str, npt.NDArray[np.float32]]
    shape: Sequence[int]


def check_loss(loss_fn: str, config: Mapping[str, Union[float, str]]) -> Dict[str, float]:
    """Return *config* with defaults filled in; EngineError if the loss or a key is unknown."""
    loss = LOSS_TABLE.get(loss_fn)
    if loss is None:
        raise EngineError(f"unknown loss_fn {loss_fn!r}; this server has {', '.join(LOSSES)}")
    for name, value in config.items():
        if name not in loss.config:
            known = ", ".join(loss.config) or "none"
            raise EngineError(f"loss_fn_config: {loss_fn} has no key {name!r}; known keys: {known}")
        if isinstance(value, str) or not math.isfinite(value):
            raise EngineError(f"loss_fn_config: {name} is {value!r}; it must be a finite number")
    return {**loss.config, **{name: float(value) for name, value in config.items()}}


def check_batch(
    data: Sequence[Datum], loss_fn: str, config: Mapping[str, float], info: EngineInfo
) -> List[Row]:
    """Turn every datum into a Row.

    Raises:
        EngineError: a datum is at fault; the message names its index, the input, the remedy.
    """
    if not data:
        raise EngineError("the batch is empty; give at least one datum")
    loss = LOSS_TABLE[loss_fn]
    rows = []
    for index, datum in enumerate(data):
        try:
            rows.append(_check_datum(datum, loss_fn, loss, config, info))
        except EngineError as error:
            raise EngineError(f"datum {index}: {error}", error.category) from error
    return rows


def check_tokens(model_input: ModelInput, info: EngineInfo) -> npt.NDArray[np.int32]:
    """Return the token ids of *model_input*; EngineError if it has none, or unknown ones."""
    try:
        tokens = model_input.to_numpy()
    except InvalidInputError as error:
        raise EngineError(f"{error.message}; {info.model_name} reads text tokens only") from error
    if tokens.size == 0:
        raise EngineError("model_input is empty; give at least one token")
    _check_vocabulary("model_input", tokens, info)
    return tokens


def _check_vocabulary(name: str, tokens: Array, info: EngineInfo) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= info.vocab_size:
        bad = low if low < 0 else high
        raise EngineError(
            f"{name} holds token {bad}; {info.model_name} has tokens 0 to {info.vocab_size - 1}. "
            "Encode with its own tokenizer (get_tokenizer())"
        )


def _check_datum(
    datum: Datum, loss_fn: str, loss: Loss, config: Mapping[str, float], info: EngineInfo
) -> Row:
    tokens = check_tokens(datum.model_input, info)
    if tokens.size > info.context_length:
        raise EngineError(
            f"model_input has {tokens.size} tokens; the context of {info.model_name} holds "
            f"{info.context_length}. Cut it into shorter ones"
        )
    given = datum.loss_fn_inputs
    known = ("target_tokens", *loss.inputs)
    for name in given:
        if name not in known:
            hint = "; fold a mask into advantages (0 where masked)" if name == "mask" else ""
            raise EngineError(f"{loss_fn} has no input {name!r}; it takes {', '.join(known)}{hint}")
    for name in ("target_tokens", *loss.required):
        if name not in given:
            raise EngineError(f"input {name!r} is missing; {loss_fn} needs it")
    targets = _check_targets(given["target_tokens"], loss_fn, loss, tokens.size, info)
    inputs = {}
    for name in loss.inputs:
        if name in given:
            inputs[name] = _check_numbers(name, given[name], targets)
        else:
            value = config.get(name, loss.defaults.get(name, 0.0))
            inputs[name] = np.full(targets.shape, value, dtype=np.float32)
    if loss.by_sequence:
        check_sequence_mask(inputs[SEQUENCE_MASK], inputs["advantages"])
    wide = (len(targets), -1)
    return Row(
        tokens,
        targets.reshape(wide),
        {name: values.reshape(wide) for name, values in inputs.items()},
        targets.shape,
    )


def _check_targets(
    tensor: TensorData, loss_fn: str, loss: Loss, length: int, info: EngineInfo
) -> npt.NDArray[np.int64]:
    if tensor.dtype != "int64":
        raise EngineError(f"target_tokens are {tensor.dtype}; they must be int64 token ids")
    targets = tensor.to_numpy()
    if targets.ndim not in loss.ranks:
        shapes = " or ".join("(n,)" if rank == 1 else "(n, k)" for rank in loss.ranks)
        raise EngineError(
            f"target_tokens have shape {targets.shape}; {loss_fn} takes shape {shapes}"
        )
    if targets.shape[0] > length or targets.size == 0:
        raise EngineError(
            f"target_tokens have shape {targets.shape}, model_input has {length} tokens; "
            "give one target (the token that follows) per input token, or per token at its end"
        )
    _check_vocabulary("target_tokens", targets, info)
    return targets.astype(np.int64, copy=False)


def _check_numbers(
    name: str, tensor: TensorData, targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    values = tensor.to_numpy()
    if values.shape != targets.shape:
        raise EngineError(
            f"{name} has shape {values.shape}, target_tokens have {targets.shape}; "
            "they must be the same"
        )
    values = values.astype(np.float32, copy=False)
    finite = np.isfinite(values)
    if not finite.all():
        where = int(np.argmin(finite.reshape(len(values), -1).all(axis=1)))
        raise EngineError(f"{name} is NaN or infinite at token {where}; every value must be finite")
    return values


def plan_passes(lengths: Sequence[int], budget: int = TOKENS_PER_PASS) -> List[List[int]]:
    """Group the indices of *lengths* into passes, longest first.

    A pass holds rows of like length, and at most *budget* tokens with padding (a single longer
    row has a pass for itself).  The plan depends on the lengths only.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    passes: List[List[int]] = []
    current: List[int] = []
    for index in order:
        longest = lengths[current[0]] if current else 0
        full = (len(current) + 1) * longest > budget
        unlike = lengths[index] < _LIKE_LENGTH * longest and len(current) * longest >= _WORTH_A_PASS
        if current and (full or unlike):
            passes.append(current)
            current = []
        current.append(index)
    if current:
        passes.append(current)
    return passes
