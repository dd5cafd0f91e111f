from __future__ import annotations

import numpy as np
import pytest

from tinkex.errors import InvalidInputError
from tinkex.types import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ImageChunk,
    ModelInput,
    PromptProvenanceSpan,
    TensorData,
)

TEXT = ModelInput.from_ints([1, 2, 3])


def converted(name: str, value) -> TensorData:
    return Datum(TEXT, {name: value}).loss_fn_inputs[name]


@pytest.mark.parametrize(
    ("name", "values", "dtype"),
    [
        ("target_tokens", [2, 3, 4], "int64"),
        ("target_tokens", [], "int64"),
        ("weights", [0, 1, 1], "float32"),
        ("advantages", [True, False], "float32"),
        ("logprobs", (-1, -2), "float32"),
        ("clip_low_threshold", [1], "float32"),
        ("mine", [1, 2], "int64"),
        ("mine", [1.0, 2], "float32"),
    ],
)
def test_a_plain_list_takes_the_dtype_of_its_name(name, values, dtype):
    tensor = converted(name, values)
    assert tensor.dtype == dtype
    assert tensor.shape == (len(values),)


def test_nested_lists_make_a_table():
    assert converted("target_tokens", [[1, 2], [3, 4]]).shape == (2, 2)


def test_an_array_keeps_its_dtype():
    assert converted("weights", np.int32([1])).dtype == "int64"


def test_a_tensor_is_kept_unchanged():
    tensor = TensorData([1.0])
    assert converted("weights", tensor) is tensor


@pytest.mark.parametrize(
    "value",
    [
        [[1, 2], [3]],
        [1.5],
        ["a"],
        np.uint8([1]),
        "abc",
        5,
        None,
        {"data": [1]},
    ],
    ids=repr,
)
def test_an_input_that_cannot_be_sent_is_refused_by_name(value):
    with pytest.raises(InvalidInputError, match="target_tokens"):
        converted("target_tokens", value)


def test_the_error_for_a_ragged_input_names_the_remedy():
    with pytest.raises(InvalidInputError) as caught:
        converted("weights", [[1.0], [1.0, 2.0]])
    assert "pad" in caught.value.hint


def test_torch_tensors_are_converted():
    torch = pytest.importorskip("torch")
    assert converted("weights", torch.tensor([1.0, 0.5])).tolist() == [1.0, 0.5]


def test_bytes_are_estimated_over_chunks_and_inputs():
    # An image of unknown length, or without bytes, must not stop the batch from being cut.
    chunks = [EncodedTextChunk([1, 2]), ImageChunk(b"12345", "png"), ImageChunk(b"", "png")]
    model_input = ModelInput([*chunks, DmelChunk(b"123")])
    datum = Datum(model_input, {"target_tokens": [1, 2], "weights": [1, 2]})
    assert datum.nbytes == 2 * 4 + 5 + 0 + 3 + 2 * 8 + 2 * 4


def test_equality_is_by_value():
    assert Datum(TEXT, {"weights": [1, 0]}) == Datum(TEXT, {"weights": np.float32([1, 0])})
    assert Datum(TEXT, {"weights": [1, 0]}) != Datum(TEXT, {"weights": [1, 1]})
    assert Datum(TEXT, {}) != Datum(ModelInput.empty(), {})
    assert hash(Datum(TEXT, {"weights": [1, 0]})) == hash(Datum(TEXT, {"weights": [1, 1]}))


# ---- Wrong objects, and inputs that are assigned later ----


@pytest.mark.parametrize("model_input", [[1, 2, 3], np.int64([1]), None, {"chunks": []}, "text"])
def test_a_model_input_of_the_wrong_type_is_refused_with_the_remedy(model_input):
    with pytest.raises(InvalidInputError, match="model_input") as caught:
        Datum(model_input, {"weights": [1.0]})
    assert "ModelInput.from_ints" in caught.value.hint


@pytest.mark.parametrize("inputs", [None, [("weights", [1.0])], [1.0], "weights"])
def test_loss_inputs_without_names_are_refused(inputs):
    with pytest.raises(InvalidInputError, match="loss_fn_inputs"):
        Datum(TEXT, inputs)


def test_later_changes_to_an_array_have_no_effect():
    buffer = np.ones(3, np.float32)
    datums = []
    for value in (1, 2):
        buffer[:] = value
        datums.append(Datum(TEXT, {"weights": buffer}))
    assert [datum.loss_fn_inputs["weights"].data for datum in datums] == [[1] * 3, [2] * 3]


def test_inputs_assigned_later_are_converted_in_a_snapshot():
    datum = Datum(TEXT, {"target_tokens": [2, 3, 4]})
    advantages = [1, 2, 3]
    datum.loss_fn_inputs["advantages"] = advantages
    datum.loss_fn_inputs["mine"] = np.arange(3)
    sent = datum._snapshot()
    advantages[0] = datum.loss_fn_inputs["mine"][0] = 9
    datum.loss_fn_inputs["target_tokens"] = [0, 0, 0]
    want = {"target_tokens": [2, 3, 4], "advantages": [1.0, 2.0, 3.0], "mine": np.arange(3)}
    assert sent == Datum(TEXT, want)


def test_a_snapshot_keeps_the_provenance():
    datum = Datum(TEXT, {}, [PromptProvenanceSpan("q", length=3)], [])
    assert datum._snapshot() == datum


def test_an_input_assigned_later_that_cannot_be_sent_is_refused_by_name():
    datum = Datum(TEXT, {})
    datum.loss_fn_inputs["weights"] = "abc"
    with pytest.raises(InvalidInputError, match="weights"):
        datum._snapshot()


def test_arrays_of_other_libraries_are_converted():
    class Series:  # like pandas'
        def __array__(self, dtype=None, copy=None):
            return np.float64([1.0, 0.5])

    assert converted("weights", Series()).tolist() == [1.0, 0.5]
