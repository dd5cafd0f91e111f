"""Cutting batches and joining outputs (docs/protocol.md, "Chunking")."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tinkex.errors import InvalidInputError
from tinkex.types import (
    Datum,
    ForwardBackwardOutput,
    ImageAssetPointerChunk,
    ModelInput,
    TensorData,
)
from tinkex.wire.chunking import combine, split


def output(metrics, datums: int = 1, kind: str = "X") -> ForwardBackwardOutput:
    outputs = [{"logprobs": TensorData([float(i)])} for i in range(datums)]
    return ForwardBackwardOutput(outputs, metrics, kind)


def joined(name: str, values, datums=None) -> dict:
    counts = datums or [1] * len(values)
    return combine([output({name: v}, n) for v, n in zip(values, counts)]).metrics


# ---- split ----


def runs(sizes, max_datums, max_bytes) -> list:
    return [sizes[run] for run in split(sizes, max_datums, max_bytes)]


def test_a_run_is_closed_when_the_next_datum_would_not_fit():
    assert runs([8] * 5, max_datums=100, max_bytes=16) == [[8, 8], [8, 8], [8]]


def test_a_run_is_closed_when_it_has_its_number_of_datums():
    assert runs([4] * 5, max_datums=2, max_bytes=100) == [[4, 4], [4, 4], [4]]


def test_a_datum_above_the_limit_is_sent_alone():
    assert runs([4, 40, 4], max_datums=10, max_bytes=16) == [[4], [40], [4]]
    assert runs([40, 4], max_datums=10, max_bytes=16) == [[40], [4]]


def test_no_data_gives_no_run():
    assert split([], max_datums=10, max_bytes=10) == []


def test_an_image_of_unknown_length_is_measured_by_its_bytes():
    pointer = ImageAssetPointerChunk("png", "https://example.org/x.png")
    assert Datum(ModelInput([pointer]), {}).nbytes == len("https://example.org/x.png")


@settings(deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 40), max_size=20),
    max_datums=st.integers(1, 5),
    max_bytes=st.integers(1, 60),
)
def test_order_is_kept_limits_hold_and_no_cut_is_early(sizes, max_datums, max_bytes):
    cut = runs(sizes, max_datums, max_bytes)
    assert [size for run in cut for size in run] == sizes
    for run in cut:
        assert 1 <= len(run) <= max_datums
        assert len(run) == 1 or sum(run) <= max_bytes
    for run, following in zip(cut, cut[1:]):
        assert sum(run) + following[0] > max_bytes or len(run) == max_datums


# ---- combine ----


def test_outputs_are_joined_in_order_under_the_first_type():
    combined = combine([output({}, 2, "X"), output({}, 0, "Y"), output({}, 1, "Z")])
    assert [d["logprobs"].tolist() for d in combined.loss_fn_outputs] == [[0.0], [1.0], [0.0]]
    assert combined.loss_fn_output_type == "X"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x:sum", {"x:sum": 7.0}),
        ("x:min", {"x:min": 1.0}),
        ("x:max", {"x:max": 4.0}),
        ("x:mean", {"x:mean": 2.0}),  # (1 * 4 + 1 * 2 + 2 * 1) / 4, with 1, 1 and 2 datums
        ("x:slack", {"x:slack": 2.0}),
        ("x:unique", {"x:unique": 4.0, "x:unique_1": 2.0, "x:unique_2": 1.0}),
        ("x:hash2", {"x:hash2": 7}),
    ],
)
def test_a_metric_is_reduced_by_its_suffix(name, expected):
    assert joined(name, [4.0, 2.0, 1.0], [1, 1, 2]) == expected


def test_hashes_are_added_modulo_two_to_the_64():
    top = float(2**63)
    assert joined("x:hash2", [top, top, 5.0]) == {"x:hash2": 5}
    assert joined("x:hash2", [-1.0]) == {"x:hash2": 2**64 - 1}


def test_one_chunk_is_reduced_like_several():
    metrics = {"a:sum": 0.1, "a:mean": 0.3, "a:slack": 0.7, "a:unique": 4.0, "plain": 2.0}
    assert combine([output(metrics, 3)]).metrics == {**metrics, "a:slack": 0.0}


@pytest.mark.parametrize("name", ["loss", "a:b:sum", "x:median", ":", ""])
def test_a_metric_without_a_known_reduction_survives(name):
    assert joined(name, [1.5]) == {name: 1.5}
    assert joined(name, [1.5, 2.5]) == {name: 1.5, f"{name}_1": 2.5}


def test_a_metric_some_chunk_lacks_is_dropped():
    outputs = [output({"a:sum": 1.0, "b:sum": 1.0}), output({"b:sum": 2.0, "c:sum": 2.0})]
    assert combine(outputs).metrics == {"b:sum": 3.0}


def test_a_mean_over_no_datums_is_unweighted():
    assert joined("x:mean", [1.0, 3.0], [0, 0]) == {"x:mean": 2.0}


@pytest.mark.parametrize("reduction", ["sum", "mean", "min", "max", "slack"])
def test_a_nan_metric_is_kept(reduction):
    for values in ([math.nan, 1.0], [1.0, math.nan]):
        (value,) = joined(f"x:{reduction}", values).values()
        assert math.isnan(value)


def test_metrics_that_cannot_be_summed_do_not_crash():
    assert math.isnan(joined("x:sum", [math.inf, -math.inf])["x:sum"])
    assert joined("x:sum", [math.inf, 1.0]) == {"x:sum": math.inf}
    assert math.isnan(joined("x:hash2", [math.nan, 1.0])["x:hash2"])
    assert joined("x:sum", [1e308, 1e308]) == {"x:sum": math.inf}


def test_values_may_be_numpy_numbers():
    assert joined("x:sum", [np.float32(1), np.float32(2)]) == {"x:sum": 3.0}


def test_an_empty_list_of_outputs_cannot_be_combined():
    with pytest.raises(InvalidInputError):
        combine([])
