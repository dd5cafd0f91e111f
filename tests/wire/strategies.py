"""Random values of everything the codecs carry, and equality for types without it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tinkex.types import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    ImageChunk,
    ModelInput,
    PromptAltTokens,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
    SampledSequence,
    SampleResponse,
    TensorData,
    TopkLogprobs,
)

names = st.text(st.characters(codec="utf-8"), max_size=8)
int32s = st.integers(0, 2**31 - 1)
float32s = st.floats(width=32, allow_infinity=False)  # JSON cannot tell infinity from NaN
finite_float32s = st.floats(width=32, allow_infinity=False, allow_nan=False)


def arrays(dtype: Any, shape: Any, elements: Any) -> st.SearchStrategy[Any]:
    return npst.arrays(dtype, shape, elements=elements)


@st.composite
def dense(draw: Any, min_dims: int = 1) -> TensorData:
    # Sides of at least 1: a batched tensor does not record the number of empty rows.
    shape = draw(npst.array_shapes(min_dims=min_dims, max_dims=3, max_side=3))
    if draw(st.booleans()):
        shape = (0, *shape[1:])
    if draw(st.booleans()):
        return TensorData(draw(arrays(np.float32, shape, float32s)))
    return TensorData(draw(arrays(np.int64, shape, st.integers(-(2**63), 2**63 - 1))))


@st.composite
def sparse(draw: Any) -> TensorData:
    rows, columns = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    listed = [
        sorted(draw(st.sets(st.integers(0, columns - 1), max_size=columns))) for _ in range(rows)
    ]
    col = [column for row in listed for column in row]
    crow = np.cumsum([0, *(len(row) for row in listed)])
    values = draw(arrays(np.float32, (len(col),), float32s))
    return TensorData(values, "float32", (rows, columns), crow, col)


chunks = st.one_of(
    st.builds(EncodedTextChunk, arrays(np.int32, st.integers(0, 5), int32s)),
    st.builds(
        ImageChunk, st.binary(max_size=5), st.sampled_from(["png", "jpeg"]), st.none() | int32s
    ),
    st.builds(DmelChunk, st.binary(max_size=5)),
)
datums = st.builds(
    Datum,
    st.builds(ModelInput, st.lists(chunks, max_size=3)),
    st.dictionaries(names, dense(), max_size=3),
)
spans = st.builds(
    lambda kind, name, offset, length: kind(name, offset=offset, length=length),
    st.sampled_from([PromptProvenanceSpan, SampledProvenanceSpan]),
    names.filter(bool),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
)
span_lists = st.lists(spans, min_size=1, max_size=3)
datums_with_spans = st.builds(
    Datum, st.just(ModelInput()), st.dictionaries(names, dense()), span_lists, span_lists
)
sparse_datums = st.builds(Datum, st.just(ModelInput()), st.dictionaries(names, sparse()))
requests = st.builds(
    ForwardBackwardRequest,
    model_id=names,
    seq_id=int32s,
    data=st.lists(datums, max_size=3),
    loss_fn=names,
    loss_fn_config=st.dictionaries(names, finite_float32s | names, max_size=3),
    forward_only=st.booleans(),
)
outputs = st.builds(
    ForwardBackwardOutput,
    loss_fn_outputs=st.lists(
        st.dictionaries(st.sampled_from(["logprobs", "h", "é"]), dense(), max_size=3), max_size=4
    ),
    metrics=st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    loss_fn_output_type=st.sampled_from(["TorchLossReturn", "X"]),
)


@st.composite
def topks(draw: Any) -> TopkLogprobs:
    """Draw a table whose rows have some cells and end in sentinels; at least one row has k."""
    length, k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    token_ids = draw(arrays(np.int32, (length, k), st.integers(1, 2**31 - 1)))
    logprobs = draw(arrays(np.float32, (length, k), float32s))
    for row in range(1, length):
        used = draw(st.integers(0, k))
        token_ids[row, used:], logprobs[row, used:] = 0, -99999.0
    return TopkLogprobs(token_ids, logprobs)


@st.composite
def sequences(draw: Any) -> SampledSequence:
    size = draw(st.integers(1, 4))
    return SampledSequence(
        stop_reason=draw(st.sampled_from(["stop", "length"])),
        tokens_np=draw(arrays(np.int32, size, int32s)),
        logprobs_np=draw(st.none() | arrays(np.float32, size, float32s)),
        topk_logprobs_np=draw(st.none() | topks()),
    )


samples = st.builds(
    SampleResponse,
    sequences=st.lists(sequences(), max_size=3),
    prompt_logprobs_np=st.none() | arrays(np.float32, st.integers(1, 4), float32s),
    topk_prompt_logprobs_np=st.none() | topks(),
    target_prompt_logprobs=st.none() | dense(min_dims=2) | sparse(),
    prompt_cache_hit_tokens=int32s,
    prompt_alt_tokens=st.none()
    | st.builds(
        PromptAltTokens,
        arrays(np.int64, (2, 2), int32s).map(TensorData),
        arrays(np.float32, (2, 2), float32s).map(TensorData),
    ),
)


def plain(value: Any) -> Any:
    """Return *value* as nested plain data, comparable with ==; NaN becomes the text "nan"."""
    if isinstance(value, TensorData):
        return ("tensor", value.dtype, value.shape, plain(value.tolist()))
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, plain(value.tolist()))
    if hasattr(value, "__dataclass_fields__"):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return (type(value).__name__, plain(fields))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return "nan" if isinstance(value, float) and math.isnan(value) else value
