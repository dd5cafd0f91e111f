"""The inputs of each loss, and the checks of an engine's input before anything is computed.

Used by both engines, and by the server before it queues a request.  Pure; numpy only.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import numpy.typing as npt

from tinkex.errors import InvalidInputError
from tinkex.local.engines.engine import EngineError, EngineInfo
from tinkex.types import AdamParams, Datum, LoraConfig, ModelInput, SampleRequest, TensorData

Array = npt.NDArray[Any]
Tokens = npt.NDArray[np.int32]

CLIP_LOW = "clip_low_threshold"
CLIP_HIGH = "clip_high_threshold"
SEQUENCE_MASK = "sequence_ratio_mask"


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """The inputs and settings of one loss.

    Attributes:
        required: per-token inputs besides ``target_tokens`` that must be given.
        defaults: per-token inputs that may be omitted, and their default values; a configuration
            key of the same name overrides the default.
        config: configuration keys, and their defaults.
        gate: the input that excludes a token (no loss, no gradient) by being 0, if the loss has
            one.
        ranks: how many dimensions ``target_tokens`` may have.
        by_sequence: whether the loss reads the ratio of the whole sequence, which needs the
            log-probabilities of all tokens of a datum.
    """

    required: Tuple[str, ...] = ("logprobs", "advantages")
    defaults: Mapping[str, float] = dataclasses.field(default_factory=dict)
    config: Mapping[str, float] = dataclasses.field(default_factory=dict)
    gate: Optional[str] = "advantages"
    ranks: Tuple[int, ...] = (1,)
    by_sequence: bool = False

    @property
    def inputs(self) -> Tuple[str, ...]:
        """Every per-token input besides ``target_tokens``."""
        return (*self.required, *self.defaults)


_CLIP = {CLIP_LOW: 0.8, CLIP_HIGH: 1.2}
# From the paper's experiments (arXiv 2507.18071): the ratio of a sequence is the geometric mean of
# its tokens' ratios, and varies far less than they do.
_SEQUENCE_CLIP = {CLIP_LOW: 1 - 3e-4, CLIP_HIGH: 1 + 4e-4}

#: The losses every engine offers; docs/protocol.md, "Losses", defines them.
LOSSES: Dict[str, LossInputs] = {
    "cross_entropy": LossInputs((), {"weights": 1.0}, gate="weights", ranks=(1, 2)),
    "importance_sampling": LossInputs(),
    "ppo": LossInputs(defaults=_CLIP, config=_CLIP),
    "cispo": LossInputs(defaults=_CLIP, config=_CLIP),
    "gspo": LossInputs(
        defaults={**_SEQUENCE_CLIP, SEQUENCE_MASK: 1.0}, config=_SEQUENCE_CLIP, by_sequence=True
    ),
    "dro": LossInputs(config={"beta": 0.05}, gate=None),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One datum, checked.

    Attributes:
        tokens: int32, shape (n,).
        targets: int64, shape (m, k), for the last m <= n tokens; k is 1 for one-dimensional
            ``target_tokens``.
        inputs: float32 arrays of shape (m, k), by loss input name, defaults filled in.
        shape: the shape of ``target_tokens`` as given by the client.
    """

    tokens: Tokens
    targets: npt.NDArray[np.int64]
    inputs: Dict[str, npt.NDArray[np.float32]]
    shape: Sequence[int]


def check_loss(loss_fn: str, config: Mapping[str, Union[float, str]]) -> Dict[str, float]:
    """Return *config* with defaults filled in; EngineError if the loss or a key is unknown."""
    loss = LOSSES.get(loss_fn)
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
        EngineError: a datum is invalid; the message names its index, the input and the remedy.
    """
    if not data:
        raise EngineError("the batch is empty; give at least one datum")
    rows = []
    for index, datum in enumerate(data):
        try:
            rows.append(_check_datum(datum, loss_fn, config, info))
        except EngineError as error:
            raise EngineError(f"datum {index}: {error}", error.category) from error
    return rows


def check_tokens(model_input: ModelInput, info: EngineInfo, what: str = "model_input") -> Tokens:
    """Return the token ids of *model_input*.

    Raises:
        EngineError: there are none, too many, or unknown ones.
    """
    try:
        tokens = model_input.to_numpy()
    except InvalidInputError as error:
        raise EngineError(f"{error.message}; {info.model_name} reads text tokens only") from error
    if tokens.size == 0:
        raise EngineError(f"{what} is empty; give at least one token")
    if tokens.size > info.context_length:
        raise EngineError(
            f"{what} has {tokens.size} tokens; {info.model_name} reads at most "
            f"{info.context_length}: shorten it"
        )
    check_vocabulary(what, tokens, info)
    return tokens


def check_vocabulary(what: str, tokens: Array, info: EngineInfo) -> None:
    """Raise EngineError if one of *tokens* is not an integer in the vocabulary."""
    if not np.issubdtype(tokens.dtype, np.integer):
        raise EngineError(f"{what} are {tokens.dtype}; they must be int64 token ids")
    # Checked here, because a GPU reports an index out of range only by an assertion, after which
    # the process can no longer use the GPU.
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= info.vocab_size:
        bad = low if low < 0 else high
        raise EngineError(
            f"{what} holds token {bad}; the vocabulary of {info.model_name} runs from 0 to "
            f"{info.vocab_size - 1}: use its own tokenizer (get_tokenizer())"
        )


def _check_datum(datum: Datum, loss_fn: str, config: Mapping[str, float], info: EngineInfo) -> Row:
    loss = LOSSES[loss_fn]
    tokens = check_tokens(datum.model_input, info)
    given = datum.loss_fn_inputs
    known = ("target_tokens", *loss.inputs)
    # Refuse unknown inputs rather than ignore them: if one is misspelt or unsupported, training
    # would optimize something other than intended.
    for name in given:
        if name not in known:
            hint = "; fold a mask into advantages (0 where masked)" if name == "mask" else ""
            raise EngineError(f"{loss_fn} has no input {name!r}; it takes {', '.join(known)}{hint}")
    for name in ("target_tokens", *loss.required):
        if name not in given:
            raise EngineError(f"input {name!r} is missing; {loss_fn} needs it")
    targets = _check_targets(given["target_tokens"], loss_fn, tokens.size, info)
    inputs = {}
    for name in loss.inputs:
        if name in given:
            inputs[name] = _check_numbers(name, given[name], targets)
        else:
            # Clip thresholds may be settings of the call or per-token inputs (docs/protocol.md,
            # "Losses").  Fill them in here, so that losses read arrays only.
            value = config.get(name, loss.defaults[name])
            inputs[name] = np.full(targets.shape, value, dtype=np.float32)
    if loss.by_sequence:
        _check_mask(inputs[SEQUENCE_MASK], inputs["advantages"])
    # (n,) becomes (n, 1), so that later code handles (n, k) only.
    wide = (len(targets), -1)
    return Row(
        tokens,
        targets.reshape(wide),
        {name: values.reshape(wide) for name, values in inputs.items()},
        targets.shape,
    )


def _check_targets(
    tensor: TensorData, loss_fn: str, length: int, info: EngineInfo
) -> npt.NDArray[np.int64]:
    targets = tensor.to_numpy()
    ranks = LOSSES[loss_fn].ranks
    if targets.ndim not in ranks:
        shapes = " or ".join("(n,)" if rank == 1 else "(n, k)" for rank in ranks)
        raise EngineError(
            f"target_tokens have shape {targets.shape}; {loss_fn} takes shape {shapes}"
        )
    if targets.shape[0] > length or targets.size == 0:
        raise EngineError(
            f"target_tokens have shape {targets.shape}, model_input has {length} tokens; "
            "give one target (the token that follows) per input token, or for the last ones"
        )
    check_vocabulary("target_tokens", targets, info)
    return targets.astype(np.int64, copy=False)  # the dtype of torch.gather's indices


def _check_numbers(
    name: str, tensor: TensorData, targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    values = tensor.to_numpy()
    if values.shape != targets.shape:
        raise EngineError(
            f"{name} has shape {values.shape}, target_tokens have {targets.shape}; "
            "they must be the same"
        )
    # Checked after the cast, which makes a float64 beyond float32's range infinite.
    values = values.astype(np.float32, copy=False)
    finite = np.isfinite(values)
    if not finite.all():
        where = int(np.argmin(finite.reshape(len(values), -1).all(axis=1)))
        raise EngineError(f"{name} is NaN or infinite at token {where}; every value must be finite")
    return values


def _check_mask(mask: Array, advantages: Array) -> None:
    """Raise EngineError unless the ratio of a sequence can be computed with *mask*."""
    if (mask < 0).any():
        raise EngineError("sequence_ratio_mask is negative; use 1 for tokens of the sequence, or 0")
    if not mask.any() and advantages.any():
        raise EngineError("sequence_ratio_mask is 0 everywhere, so the sequence has no ratio")


def check_values(params: Union[AdamParams, LoraConfig, SampleRequest]) -> None:
    """Raise EngineError if one of *params* is out of range."""
    try:
        params.check()
    except InvalidInputError as error:
        raise EngineError(error.message) from error


def check_sample(request: SampleRequest, info: EngineInfo) -> Tuple[Tokens, int]:
    """Return the tokens of the prompt, and how many more may follow (at least one).

    The caller has checked *request* itself before, e.g. by `check_values`.

    Raises:
        EngineError: the prompt is invalid, or a setting is out of range for this prompt or model.
    """
    prompt = check_tokens(request.prompt, info, "the prompt")
    room = info.context_length - prompt.size
    if room < 1:
        raise EngineError(
            f"the prompt has {prompt.size} tokens; the context of {info.context_length} leaves no "
            "room for a continuation. Shorten the prompt"
        )
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        if getattr(request, name) > info.vocab_size:
            raise EngineError(
                f"{name} is {getattr(request, name)}; the vocabulary of {info.model_name} has "
                f"{info.vocab_size} tokens"
            )
    last_n = request.prompt_logprobs_last_n
    if last_n is not None and last_n > prompt.size - 1:
        raise EngineError(
            f"prompt_logprobs_last_n is {last_n}; a prompt of {prompt.size} tokens has "
            f"{prompt.size - 1} logprobs, as nothing precedes the first"
        )
    return prompt, room


def prompt_targets(request: SampleRequest, info: EngineInfo) -> Optional[npt.NDArray[np.int64]]:
    """Return the token ids (n - 1, k) to score at each prompt position, -1 for none.

    None if the request has none; EngineError if they do not fit its prompt of n tokens.
    """
    tensor, length = request.target_prompt_logprobs, request.prompt.length
    if tensor is None:
        return None
    targets = tensor.to_numpy(pad_value=-1)
    if tensor.dtype != "int64" or targets.ndim != 2 or targets.shape[0] != length - 1:
        raise EngineError(
            f"target_prompt_logprobs is {tensor.dtype} of shape {targets.shape}; it must be int64 "
            f"of shape ({length - 1}, k): one row per prompt token except the first"
        )
    if targets.size and not -1 <= int(targets.min()) <= int(targets.max()) < info.vocab_size:
        raise EngineError(
            f"target_prompt_logprobs holds a token outside -1 to {info.vocab_size - 1}"
        )
    return targets.astype(np.int64, copy=False)
