"""Requests to samplers, and their responses (docs/protocol.md, "Sampling")."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple, Union

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex._runtime.late_import import np
from tinkex._runtime.numeric import convert_fields, is_finite, is_int, to_bool, to_int
from tinkex.errors import InvalidInputError
from tinkex.types._numbers import as_kept, numpy_on_demand
from tinkex.types._wire import excerpt
from tinkex.types.model_input import ModelInput
from tinkex.types.tensor_data import TensorData, index_array

if TYPE_CHECKING:
    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float32]
    TokenArray = npt.NDArray[np.int32]
else:
    FloatArray = TokenArray = Any

#: An unused cell of a top-k table: token 0 with this logprob.
TOPK_SENTINEL = -99999.0


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Args:
        max_tokens: draw at most this many new tokens; with None, only the context length limits
            their number.
        seed: makes the draw repeatable on the same server; None draws freely.
        stop: stop at any of these strings or token ids; None stops at the end-of-sequence token, an
            empty list only at *max_tokens*.
        temperature: 0 is greedy; 1 samples the model's own distribution.
        top_k: keep only the k most likely tokens; -1 keeps all.
        top_p: keep the smallest set of tokens whose total probability reaches p, in (0, 1].

    numpy numbers, and strings such as ``"0.7"``, are converted.  Other keywords are ignored with a
    warning, except that ``stop_token_ids`` is used as *stop* if *stop* is None.
    """

    max_tokens: Optional[int] = None
    seed: Optional[int] = None
    stop: Union[str, Sequence[str], Sequence[int], None] = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    def __post_init__(self) -> None:
        convert_fields(self, ints=("max_tokens", "seed", "top_k"), floats=("temperature", "top_p"))
        if self.stop is not None and type(self.stop) is not str:
            object.__setattr__(self, "stop", _stops(self.stop))

    def check(self) -> None:
        """Raise InvalidInputError if a value is out of range or of the wrong type."""
        if self.max_tokens is not None and not is_int(self.max_tokens, 1):
            raise _wrong("max_tokens", self.max_tokens, "an integer, at least 1, or None")
        if self.seed is not None and not is_int(self.seed):
            raise _wrong("seed", self.seed, "an integer, or None")
        if not (is_finite(self.temperature) and self.temperature >= 0):
            raise _wrong("temperature", self.temperature, "a finite number, 0 or more")
        if not (is_finite(self.top_p) and 0 < self.top_p <= 1):
            raise _wrong("top_p", self.top_p, "a number in (0, 1]")
        if not is_int(self.top_k, -1) or self.top_k == 0:
            raise _wrong("top_k", self.top_k, "an integer, at least 1, or -1 for all")
        if self.stop is not None and not isinstance(self.stop, str):
            items = self.stop if isinstance(self.stop, (list, tuple)) else (None,)
            if not (all(isinstance(i, str) for i in items) or all(is_int(i) for i in items)):
                what = "a string, a list of strings or a list of token ids"
                raise _wrong("stop", self.stop, what)

    def to_json(self) -> Dict[str, Any]:
        """Return the JSON form, with ``max_tokens``, ``seed`` and ``stop`` only if they are set."""
        # Sent even at their defaults (docs/protocol.md, "Sample requests").
        encoded: Dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }
        for name in ("max_tokens", "seed", "stop"):
            value = getattr(self, name)
            # Compared with None: a seed of 0 and an empty list of stops have their own meanings.
            if value is not None:
                encoded[name] = value
        return encoded

    @classmethod
    def from_json(cls, payload: Any) -> SamplingParams:
        """Read the JSON form, ignoring unknown fields.

        Raises InvalidInputError if it is not an object.
        """
        if not isinstance(payload, dict):
            raise InvalidInputError("sampling_params must be an object")
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: payload[name] for name in names if payload.get(name) is not None})


_init = SamplingParams.__init__


@functools.wraps(_init)
def _init_with_unknown(self: SamplingParams, *args: Any, **arguments: Any) -> None:
    """Accept any keyword, as the official class does, but with a warning.

    Programs pass parameters of other libraries, such as vLLM's.  This is a wrapper rather than
    ``**unknown`` in the signature, so that type checkers still report a misspelt argument.
    """
    known = self.__dataclass_fields__
    unknown = {name: arguments.pop(name) for name in sorted(arguments.keys() - known.keys())}
    # First, because self.stop then shows whether the caller gave one.
    _init(self, *args, **arguments)
    for name, value in unknown.items():
        if name == "stop_token_ids" and self.stop is None:
            object.__setattr__(self, "stop", _stops(value))
            effect = "its token ids are used as stop"
        else:
            effect = f"it is ignored (arguments: {', '.join(known)})"
        warnings.warn(f"SamplingParams has no argument {name!r}: {effect}", stacklevel=2)


SamplingParams.__init__ = _init_with_unknown  # type: ignore[method-assign]


def _wrong(name: str, value: Any, expected: str) -> InvalidInputError:
    """Return an error about argument *name*; commands show it as the name of their option."""
    return InvalidInputError(
        ErrorText(Setting(name), f" is {excerpt(value, 100)}; it must be {expected}")
    )


def _stops(stop: Any) -> Any:
    """Return a sequence of stops as a new list with token ids as ints; anything else unchanged."""
    if getattr(stop, "ndim", None) == 1:
        stop = stop.tolist()
    if not isinstance(stop, (list, tuple)):
        return stop
    # A string of digits is a stop string, and `check` must refuse a float: to_int would turn some
    # of them into token ids.
    return [item if isinstance(item, (str, float)) else to_int(item) for item in stop]


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """One request to a sampler.  Optional fields at their defaults are not sent.

    The prompt is copied, so later changes to its list of chunks have no effect.
    """

    prompt: ModelInput
    num_samples: int = 1
    sampling_params: SamplingParams = SamplingParams()
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: Optional[int] = None
    target_prompt_logprobs: Optional[TensorData] = None
    prompt_alt_tokens_k: int = 0
    record_stability_info: bool = False

    def __post_init__(self) -> None:
        convert_fields(self, ints=_COUNTS)
        set_field = object.__setattr__
        if isinstance(self.prompt, ModelInput):
            set_field(self, "prompt", self.prompt._snapshot())
        set_field(self, "prompt_logprobs", to_bool(self.prompt_logprobs))

    def check(self) -> None:
        """Raise InvalidInputError if a value or a sampling parameter is out of range."""
        if not is_int(self.num_samples, 1):
            raise _wrong("num_samples", self.num_samples, "an integer, at least 1")
        for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
            if not is_int(getattr(self, name), 0):
                raise _wrong(name, getattr(self, name), "an integer, 0 or more")
        wanted: Any = self.prompt_logprobs
        if not isinstance(wanted, bool):
            raise _wrong("include_prompt_logprobs", wanted, "True or False")
        last_n = self.prompt_logprobs_last_n
        if last_n is not None and not is_int(last_n, 1):
            raise _wrong("prompt_logprobs_last_n", last_n, "an integer, at least 1, or None")
        if last_n is not None and not self.prompt_logprobs:
            raise InvalidInputError(
                "prompt_logprobs_last_n was given without include_prompt_logprobs=True"
            )
        self.sampling_params.check()

    def to_json(self) -> Dict[str, Any]:
        """Return the JSON form without the addressing (session and seq_id)."""
        encoded: Dict[str, Any] = {
            "num_samples": self.num_samples,
            "prompt": self.prompt.to_json(),
            "sampling_params": self.sampling_params.to_json(),
            "prompt_logprobs": self.prompt_logprobs,
            "type": "sample",
        }
        for name in _OPTIONAL_COUNTS:
            value = getattr(self, name)
            if value:
                encoded[name] = value
        if self.record_stability_info:
            encoded["record_stability_info"] = True
        if self.target_prompt_logprobs is not None:
            encoded["target_prompt_logprobs"] = tensor_to_json(self.target_prompt_logprobs)
        return encoded

    @classmethod
    def from_json(cls, payload: Any) -> SampleRequest:
        """Read the JSON form; raise InvalidInputError if it is malformed or fails `check`."""
        if not isinstance(payload, dict):
            raise InvalidInputError("a sample request must be an object")
        # Null is the same as a missing field (docs/protocol.md, "Bodies").
        counts = {name: payload[name] for name in _COUNTS if payload.get(name) is not None}
        for name, value in counts.items():
            if isinstance(value, str):  # numeric strings are allowed for callers, not on the wire
                raise InvalidInputError(f"{name} is {value!r}; it must be an integer")
        target = payload.get("target_prompt_logprobs")
        params = payload.get("sampling_params")
        request = cls(
            prompt=ModelInput.from_json(payload.get("prompt")),
            sampling_params=SamplingParams.from_json({} if params is None else params),
            prompt_logprobs=bool(payload.get("prompt_logprobs")),
            target_prompt_logprobs=None if target is None else tensor_from_json(target),
            record_stability_info=bool(payload.get("record_stability_info")),
            **counts,
        )
        request.check()
        return request


#: Integers of a SampleRequest that are sent only if they are set, in this order.
_OPTIONAL_COUNTS = (
    "topk_prompt_logprobs",
    "topk_sample_logprobs",
    "prompt_logprobs_last_n",
    "prompt_alt_tokens_k",
)
_COUNTS = ("num_samples", *_OPTIONAL_COUNTS)


def tensor_to_json(tensor: TensorData) -> Dict[str, Any]:
    """Return a tensor's JSON form (docs/protocol.md, "Tensors"); orjson writes its arrays."""
    encoded = {"data": tensor.values, "dtype": tensor.dtype, "shape": list(tensor.shape)}
    if tensor.is_sparse:
        encoded["sparse_crow_indices"] = tensor.crow_indices
        encoded["sparse_col_indices"] = tensor.col_indices
    return encoded


def tensor_from_json(payload: Any) -> TensorData:
    """Read the JSON form of a tensor; null values become NaN.

    Raises InvalidInputError if it is malformed.
    """
    data = payload.get("data") if isinstance(payload, dict) else None
    if not isinstance(data, list):
        raise InvalidInputError("a tensor is an object with a list 'data', 'dtype' and 'shape'")
    dtype = payload.get("dtype", "float32")
    shape = payload.get("shape")
    indices = payload.get("sparse_crow_indices"), payload.get("sparse_col_indices")
    if dtype != "float32":
        return TensorData(data, dtype, shape, *indices)
    try:
        # For a float dtype numpy converts None to NaN, in C; values beyond float32 become infinity.
        with np.errstate(over="ignore"):
            values = np.array(data, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(f"tensor data is not a list of numbers: {error}") from error
    # No second copy: numpy has just made the array from a list.
    return TensorData._adopt(values, shape, *map(index_array, indices))


TopkRow = Optional[List[Tuple[int, float]]]


@dataclasses.dataclass(frozen=True, eq=False)
class TopkLogprobs:
    """The k most likely tokens at each of n positions.

    ``token_ids`` is int32 and ``logprobs`` float32, both of shape ``(n, k)``.  Unused cells hold
    token 0 with logprob -99999.
    """

    token_ids: TokenArray
    logprobs: FloatArray

    def rows(self) -> List[TopkRow]:
        """Return ``[(token, logprob), ...]`` for each position, or None if it has no data."""
        rows: List[TopkRow] = []
        for ids, logprobs in zip(self.token_ids.tolist(), self.logprobs.tolist()):
            # Both must match, because 0 is also a real token.  float32 holds the sentinel exactly.
            cells = [(i, p) for i, p in zip(ids, logprobs) if not (i == 0 and p == TOPK_SENTINEL)]
            rows.append(cells or None)
        return rows


@numpy_on_demand("tokens_np", "logprobs_np")
@dataclasses.dataclass(frozen=True, eq=False)
class SampledSequence:
    """One sampled continuation of m tokens.

    Attributes:
        stop_reason: ``"stop"`` (a stop token or string) or ``"length"``.
        tokens_np: int32 of shape ``(m,)``, including the stop token if one ended the sequence.
        logprobs_np: float32 of shape ``(m,)``: log-probability of each token under the model
            itself (temperature 1, no truncation), or None if the server sent none.
        sequence_id: the server's id of the sequence, or None.
        topk_logprobs_np: the most likely tokens at each sampled position, if requested.
    """

    stop_reason: str
    tokens_np: TokenArray
    logprobs_np: Optional[FloatArray] = None
    sequence_id: Optional[str] = None
    topk_logprobs_np: Optional[TopkLogprobs] = None

    @property
    def tokens(self) -> List[int]:
        """The token ids as a list (a new one on each access)."""
        ids: List[int] = as_kept(self, "tokens_np").tolist()
        return ids

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(as_kept(self, "tokens_np"))

    @property
    def logprobs(self) -> Optional[List[float]]:
        """The logprobs as a list, or None."""
        logprobs = as_kept(self, "logprobs_np")
        return None if logprobs is None else logprobs.tolist()

    def named(self, sequence_id: str) -> SampledSequence:
        """Return a copy with the id *sequence_id*."""
        return SampledSequence(
            self.stop_reason,
            as_kept(self, "tokens_np"),
            as_kept(self, "logprobs_np"),
            sequence_id,
            self.topk_logprobs_np,
        )

    @property
    def topk_logprobs(self) -> Optional[List[TopkRow]]:
        """``topk_logprobs_np`` as lists, or None."""
        return None if self.topk_logprobs_np is None else self.topk_logprobs_np.rows()


@numpy_on_demand("prompt_logprobs_np")
@dataclasses.dataclass(frozen=True, eq=False)
class SampleResponse:
    """The response to one SampleRequest with a prompt of n tokens.

    Attributes:
        sequences: the continuations, as many as ``num_samples``.
        prompt_logprobs_np: float32 of shape ``(n,)``; NaN where unknown (always at position 0).
        topk_prompt_logprobs_np: the most likely tokens at each prompt position, if requested.
        target_prompt_logprobs: if requested, the logprobs of the target tokens, with the request's
            shape and sparsity; 0 where the token is -1.
        prompt_cache_hit_tokens: the number of prompt tokens that the server had cached.
        prompt_alt_tokens: alternative tokens for the prompt, if requested.
    """

    sequences: List[SampledSequence]
    prompt_logprobs_np: Optional[FloatArray] = None
    topk_prompt_logprobs_np: Optional[TopkLogprobs] = None
    target_prompt_logprobs: Optional[TensorData] = None
    prompt_cache_hit_tokens: int = 0
    prompt_alt_tokens: Optional[PromptAltTokens] = None

    @property
    def prompt_logprobs(self) -> Optional[List[Optional[float]]]:
        """``prompt_logprobs_np`` as a list, with None for NaN."""
        if self.prompt_logprobs_np is None:
            return None
        # Only NaN differs from itself.
        known = self.prompt_logprobs_np == self.prompt_logprobs_np
        return [
            p if ok else None for p, ok in zip(self.prompt_logprobs_np.tolist(), known.tolist())
        ]

    @property
    def topk_prompt_logprobs(self) -> Optional[List[TopkRow]]:
        """``topk_prompt_logprobs_np`` as lists, or None."""
        return None if self.topk_prompt_logprobs_np is None else self.topk_prompt_logprobs_np.rows()


@dataclasses.dataclass(frozen=True, eq=False)
class PromptAltTokens:
    """Alternative tokens for prompt positions 1 to n - 1; both fields have shape ``(n - 1, k)``."""

    tokens: TensorData
    logprobs: TensorData
