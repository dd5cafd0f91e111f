"""Provenance spans: which generated sequence a run of tokens came from.

See docs/protocol.md, "Requests in protobuf".
"""

from __future__ import annotations

import dataclasses
from typing import Any, Iterable, Tuple, Union

from tinkex._runtime.numeric import as_int
from tinkex.errors import InvalidInputError, a_type


@dataclasses.dataclass(frozen=True, init=False)
class _Span:
    """*length* tokens of the sequence *sequence_id*, from its token *offset* on."""

    sequence_id: str
    offset: int
    length: int

    # By keyword, because two numbers in a row are easily given in the wrong order.
    def __init__(self, sequence_id: str, *, offset: int = 0, length: int) -> None:
        if not isinstance(sequence_id, str) or not sequence_id:
            raise InvalidInputError(
                f"the sequence_id of a provenance span is {sequence_id!r}; it must be a name",
                hint="SampledSequence.sequence_id has it; some servers send none.",
            )
        object.__setattr__(self, "sequence_id", sequence_id)
        object.__setattr__(self, "offset", _count("offset", offset))
        object.__setattr__(self, "length", _count("length", length))


class PromptProvenanceSpan(_Span):
    """A run of tokens of the prompt that a sequence was sampled from.

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


def _count(name: str, value: Any) -> int:
    return as_int(f"the {name} of a provenance span", value, 0)


def as_spans(what: str, spans: Iterable[ProvenanceSpan]) -> Tuple[ProvenanceSpan, ...]:
    """Return *spans* as a tuple; InvalidInputError, naming *what*, if something else is in it."""
    found = tuple(spans) if isinstance(spans, Iterable) else (spans,)
    for span in found:
        if not isinstance(span, (PromptProvenanceSpan, SampledProvenanceSpan)):
            raise InvalidInputError(
                f"{what} holds {a_type(span)}; it must be a list of "
                "PromptProvenanceSpan and SampledProvenanceSpan"
            )
    return found


def check_tiling(what: str, spans: Iterable[ProvenanceSpan], tokens: int) -> None:
    """Raise InvalidInputError unless *spans* are *tokens* long together."""
    covered = sum(span.length for span in spans)
    if covered != tokens:
        raise InvalidInputError(
            f"{what} cover {covered} of {tokens} tokens",
            hint="Spans tile the tokens in order, each token in exactly one.",
        )
