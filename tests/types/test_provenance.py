"""The origin of tokens: the spans that a Datum may carry."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from tinkex.errors import InvalidInputError
from tinkex.types import (
    Datum,
    ImageChunk,
    ModelInput,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
)

DATUM = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
THREE = [PromptProvenanceSpan("q", length=1), SampledProvenanceSpan("q", length=2)]


def test_a_span_has_an_id_an_offset_and_a_length():
    span = SampledProvenanceSpan("q", offset=3, length=np.int64(2))
    assert (span.sequence_id, span.offset, span.length) == ("q", 3, 2)
    assert type(span.length) is int
    assert PromptProvenanceSpan("q", length=0).offset == 0
    assert pickle.loads(pickle.dumps(span)) == span


def test_a_prompt_span_and_a_sampled_span_differ():
    assert PromptProvenanceSpan("q", length=1) != SampledProvenanceSpan("q", length=1)
    assert "SampledProvenanceSpan(sequence_id='q'" in repr(SampledProvenanceSpan("q", length=1))


@pytest.mark.parametrize(
    ("sequence_id", "offset", "length", "what"),
    [
        ("", 0, 1, "sequence_id"),
        (None, 0, 1, "sequence_id"),
        ("q", -1, 1, "offset"),
        ("q", 0, -1, "length"),
        ("q", 0, 1.5, "length"),
        ("q", True, 1, "offset"),
    ],
)
def test_an_impossible_span_is_refused_by_name(sequence_id, offset, length, what):
    with pytest.raises(InvalidInputError, match=what):
        PromptProvenanceSpan(sequence_id, offset=offset, length=length)


def test_with_provenance_makes_a_new_datum():
    datum = DATUM.with_provenance(model_input=THREE, loss_fn_inputs=iter(THREE))
    assert datum.model_input_spans == tuple(THREE)
    assert datum.loss_fn_input_spans == tuple(THREE)
    assert datum.loss_fn_inputs == DATUM.loss_fn_inputs
    assert DATUM.model_input_spans is None
    assert datum != DATUM
    assert datum == DATUM.with_provenance(THREE, THREE)


@pytest.mark.parametrize("short", ["model_input", "loss_fn_inputs"])
def test_spans_that_do_not_cover_the_tokens_are_refused(short):
    spans = {"model_input": THREE, "loss_fn_inputs": THREE, short: THREE[1:]}
    with pytest.raises(InvalidInputError, match="cover 2 of 3 tokens"):
        DATUM.with_provenance(**spans)


def test_target_tokens_of_two_dimensions_are_not_checked():
    wide = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [[2, 3], [3, 4], [4, 5]]})
    assert wide.with_provenance(THREE, THREE[:1]).loss_fn_input_spans == (THREE[0],)


def test_the_error_for_an_input_of_unknown_length_names_what_is_missing():
    image = Datum(ModelInput([ImageChunk(b"x", "png")]), {})
    with pytest.raises(InvalidInputError, match="expected_tokens"):
        image.with_provenance([], [])


def test_both_kinds_of_spans_are_required_or_neither():
    with pytest.raises(InvalidInputError, match="both"):
        Datum(DATUM.model_input, DATUM.loss_fn_inputs, model_input_spans=THREE)


@pytest.mark.parametrize("spans", [["q"], "q", 5, THREE[0]], ids=repr)
def test_a_value_that_is_not_a_list_of_spans_is_refused(spans):
    if spans is THREE[0]:
        assert Datum(ModelInput.empty(), {}, spans, []).model_input_spans == (spans,)
        return
    with pytest.raises(InvalidInputError, match="model_input_spans holds a"):
        Datum(DATUM.model_input, DATUM.loss_fn_inputs, spans, THREE)
