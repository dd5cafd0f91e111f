"""Datum: one training example, made of a model input and named loss inputs.

See docs/protocol.md, "Passes" and "Losses".
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple, Union

from tinkex._runtime.numeric import as_int
from tinkex.errors import InvalidInputError, a_type
from tinkex.types.chunks import DmelChunk, EncodedTextChunk, ImageChunk
from tinkex.types.model_input import ModelInput
from tinkex.types.tensor_data import TensorData
from tinkex.types.tokens import hint_for_model_input

#: Loss input -> dtype to use if it is a plain list; for any other name the values decide.
INPUT_DTYPES: Mapping[str, str] = {
    "target_tokens": "int64",
    "weights": "float32",
    "logprobs": "float32",
    "advantages": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}

#: The inputs of a loss for one datum, by name.
LossFnInputs = Dict[str, TensorData]

# Tokens travel as int32 (docs/protocol.md, "Requests in protobuf").
_TOKEN_BYTES = 4


@dataclasses.dataclass(frozen=True, init=False)
class _Span:
    """*length* tokens of the sequence *sequence_id*, starting at token *offset*."""

    sequence_id: str
    offset: int
    length: int

    # Keyword-only, because two integers in a row are easily swapped.
    def __init__(self, sequence_id: str, *, offset: int = 0, length: int) -> None:
        if not isinstance(sequence_id, str) or not sequence_id:
            raise InvalidInputError(
                f"the sequence_id of a provenance span is {sequence_id!r}; it must be a name",
                hint="SampledSequence.sequence_id has it; some servers send none.",
            )
        object.__setattr__(self, "sequence_id", sequence_id)
        for name, value in (("offset", offset), ("length", length)):
            count = as_int(f"the {name} of a provenance span", value, 0)
            object.__setattr__(self, name, count)


class PromptProvenanceSpan(_Span):
    """A run of tokens from the prompt that a sequence was sampled from.

    Args:
        sequence_id: the ``SampledSequence.sequence_id`` of that sequence.
        offset: index of the run's first token in the prompt.
        length: number of tokens.
    """


class SampledProvenanceSpan(_Span):
    """A run of sampled tokens.

    Args:
        sequence_id: the ``SampledSequence.sequence_id`` of the sequence.
        offset: index of the run's first token in ``SampledSequence.tokens``.
        length: number of tokens.
    """


ProvenanceSpan = Union[PromptProvenanceSpan, SampledProvenanceSpan]


def _to_tensor(name: str, value: Any) -> TensorData:
    if isinstance(value, TensorData):
        return value
    # Arrays and tensors keep their kind of dtype; a list gets the dtype of its loss input.
    is_list = isinstance(value, (list, tuple))
    try:
        if hasattr(value, "detach") and hasattr(value, "numpy"):  # torch's, without importing torch
            return TensorData.from_torch(value)
        if is_list or hasattr(value, "__array__"):
            return TensorData(value, INPUT_DTYPES.get(name) if is_list else None)
    except InvalidInputError as error:
        message = f"loss input {name!r}: {error.message}"
        raise InvalidInputError(message, hint=error.hint) from error
    raise InvalidInputError(
        f"loss input {name!r} is {a_type(value)}; "
        "give a list, a numpy array, a torch tensor or a TensorData"
    )


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Datum:
    """One training example.

    Args:
        model_input: the input of the model, n tokens.
        loss_fn_inputs: per-token inputs of the loss, by name: lists, numpy arrays, torch tensors
            or TensorData.  ``target_tokens`` are int64 of shape ``(n,)`` (or ``(n, k)``), where
            ``target_tokens[i]`` is the token that should follow input token i; ``weights``,
            ``logprobs`` and ``advantages`` are float32 of the same shape.
        model_input_spans, loss_fn_input_spans: the origins of the input tokens and of the target
            tokens, for losses that need them; give both or neither.  See `with_provenance`.

    Values are copied, so later writes to an array have no effect.  You may assign loss inputs
    later, as in ``datum.loss_fn_inputs["advantages"] = advantages``; they are converted by the same
    rules when the datum is used.

    Raises:
        InvalidInputError: *model_input* is not a ModelInput, a loss input is ragged or of a kind
            that cannot be sent, or only one kind of spans is given.
    """

    model_input: ModelInput
    loss_fn_inputs: Dict[str, TensorData]
    model_input_spans: Optional[Tuple[ProvenanceSpan, ...]] = None
    loss_fn_input_spans: Optional[Tuple[ProvenanceSpan, ...]] = None

    def __init__(
        self,
        model_input: ModelInput,
        loss_fn_inputs: Mapping[str, Any],
        model_input_spans: Optional[Iterable[ProvenanceSpan]] = None,
        loss_fn_input_spans: Optional[Iterable[ProvenanceSpan]] = None,
    ) -> None:
        if not isinstance(model_input, ModelInput):
            raise InvalidInputError(
                f"the model_input of a Datum is {a_type(model_input)}, not a ModelInput",
                hint=hint_for_model_input(model_input),
            )
        if not isinstance(loss_fn_inputs, Mapping):
            raise InvalidInputError(
                f"the loss_fn_inputs of a Datum are {a_type(loss_fn_inputs)}, not a dict",
                hint='Name them, e.g. {"target_tokens": tokens[1:], "weights": weights[1:]}.',
            )
        object.__setattr__(self, "model_input", model_input)
        tensors = {
            str(name): _to_tensor(str(name), value) for name, value in loss_fn_inputs.items()
        }
        object.__setattr__(self, "loss_fn_inputs", tensors)
        # docs/protocol.md, "Requests in protobuf": an example has both lists or neither.
        if (model_input_spans is None) != (loss_fn_input_spans is None):
            raise InvalidInputError(
                "a Datum takes both model_input_spans and loss_fn_input_spans, or neither"
            )
        for name, spans in (
            ("model_input_spans", model_input_spans),
            ("loss_fn_input_spans", loss_fn_input_spans),
        ):
            object.__setattr__(self, name, None if spans is None else _as_spans(name, spans))

    def _snapshot(self) -> Datum:
        """Return a copy that is not affected by later changes to this datum's parts.

        Raises:
            InvalidInputError: a value assigned to ``loss_fn_inputs`` cannot be sent.
        """
        # Tensors are immutable, so the copies share them.
        inputs = dict(self.loss_fn_inputs)
        for name, value in inputs.items():
            # The value was assigned after the datum was created, so it is not converted yet.
            if type(value) is not TensorData:
                inputs[name] = _to_tensor(name, value)
        # Not through the constructor, which would check and convert every part again.
        datum = object.__new__(Datum)
        set_field = object.__setattr__
        set_field(datum, "model_input", self.model_input._snapshot())
        set_field(datum, "loss_fn_inputs", inputs)
        set_field(datum, "model_input_spans", self.model_input_spans)
        set_field(datum, "loss_fn_input_spans", self.loss_fn_input_spans)
        return datum

    def with_provenance(
        self, model_input: Iterable[ProvenanceSpan], loss_fn_inputs: Iterable[ProvenanceSpan]
    ) -> Datum:
        """Return a copy of this datum with spans that record where its tokens came from.

        Args:
            model_input: spans that cover the input tokens, in order, without a gap.
            loss_fn_inputs: spans that cover ``target_tokens``' first dimension in the same way.

        Raises:
            InvalidInputError: the spans do not add up to the number of tokens
                (``target_tokens`` are checked only if one-dimensional), or the length of an image
                is not known.
        """
        datum = Datum(self.model_input, self.loss_fn_inputs, model_input, loss_fn_inputs)
        _check_tiling("model_input_spans", datum.model_input_spans or (), self.model_input.length)
        targets = self.loss_fn_inputs.get("target_tokens")
        if targets is not None and len(targets.shape) == 1:
            spans = datum.loss_fn_input_spans or ()
            _check_tiling("loss_fn_input_spans", spans, targets.shape[0])
        return datum

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Datum):
            return NotImplemented
        return (
            self.model_input == other.model_input
            and self.loss_fn_inputs == other.loss_fn_inputs
            and self.model_input_spans == other.model_input_spans
            and self.loss_fn_input_spans == other.loss_fn_input_spans
        )

    def __hash__(self) -> int:
        # Only the names, because assigned values may be arrays, which cannot be hashed.
        return hash((self.model_input, tuple(sorted(self.loss_fn_inputs))))

    @property
    def nbytes(self) -> int:
        """Estimated bytes on the wire, used to split batches (docs/protocol.md, "Chunking")."""
        total = 0
        for tensor in self.loss_fn_inputs.values():
            total += tensor.nbytes
        for chunk in self.model_input.chunks:
            if isinstance(chunk, EncodedTextChunk):
                total += _TOKEN_BYTES * chunk.length
            elif isinstance(chunk, ImageChunk):
                total += len(chunk.data)
            elif isinstance(chunk, DmelChunk):
                total += len(chunk.dmel)
            else:
                total += len(chunk.location)
        return total


def _as_spans(what: str, spans: Iterable[ProvenanceSpan]) -> Tuple[ProvenanceSpan, ...]:
    """Return *spans* as a tuple.

    Raises InvalidInputError, naming *what*, if it holds anything but spans.
    """
    found = tuple(spans) if isinstance(spans, Iterable) else (spans,)
    for span in found:
        if not isinstance(span, (PromptProvenanceSpan, SampledProvenanceSpan)):
            raise InvalidInputError(
                f"{what} holds {a_type(span)}; it must be a list of "
                "PromptProvenanceSpan and SampledProvenanceSpan"
            )
    return found


def _check_tiling(what: str, spans: Iterable[ProvenanceSpan], tokens: int) -> None:
    """Raise InvalidInputError unless *spans* add up to *tokens*."""
    covered = sum(span.length for span in spans)
    if covered != tokens:
        raise InvalidInputError(
            f"{what} cover {covered} of {tokens} tokens",
            hint="Spans must cover the tokens in order, each token exactly once.",
        )


@dataclasses.dataclass(frozen=True)
class ForwardBackwardRequest:
    """A request for one pass over a batch, for every codec (docs/protocol.md, "Passes")."""

    model_id: str
    seq_id: int
    data: List[Datum]
    loss_fn: str
    loss_fn_config: Mapping[str, Union[float, str]] = dataclasses.field(default_factory=dict)
    forward_only: bool = False
