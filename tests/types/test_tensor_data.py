from __future__ import annotations

import array
import math
import pickle

import numpy as np
import pytest

from tinkex.errors import InvalidInputError
from tinkex.types import TensorData
from tinkex.types.tensor_data import first_where


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.float16([1.5]), "float32"),
        (np.float32([1.5]), "float32"),
        (np.float64([1.5]), "float32"),
        (np.int8([-1]), "int64"),
        (np.int32([-1]), "int64"),
        (np.int64([-1]), "int64"),
    ],
)
def test_floats_become_float32_and_signed_integers_int64(array, dtype):
    tensor = TensorData.from_numpy(array)
    assert tensor.dtype == dtype
    assert tensor.values.dtype == np.dtype(dtype)
    assert tensor.tolist() == array.tolist()


@pytest.mark.parametrize(
    "array", [np.uint8([1]), np.array([True]), np.array(["a"]), np.array(None)]
)
def test_other_arrays_are_refused_with_the_remedy(array):
    with pytest.raises(InvalidInputError) as caught:
        TensorData.from_numpy(array)
    assert "astype" in caught.value.hint


@pytest.mark.parametrize("dtype", ["int64", "float32", "int32", "float64"])
@pytest.mark.parametrize("make", [TensorData, TensorData.from_numpy])
def test_later_changes_to_the_array_have_no_effect(make, dtype):
    buffer = np.arange(4, dtype=dtype)
    tensor = make(buffer)
    buffer[:] = 9
    assert tensor.data == [0, 1, 2, 3]


def test_an_array_is_copied_from_any_buffer():
    torch = pytest.importorskip("torch")
    buffer = array.array("f", [1.0, 2.0])
    shared = torch.tensor([1.0, 2.0])
    tensors = [TensorData(buffer), TensorData(memoryview(buffer)), TensorData.from_torch(shared)]
    tensors += [TensorData(shared), TensorData(shared.numpy())]
    indices = np.int64([0, 1]), np.int64([1])
    sparse = TensorData([5.0], "float32", (1, 2), *indices)
    buffer[0] = shared[0] = indices[0][1] = indices[1][0] = 0
    assert [tensor.data for tensor in tensors] == [[1.0, 2.0]] * 5
    assert sparse.tolist() == [[0.0, 5.0]]


def test_the_array_of_a_tensor_is_a_copy():
    torch = pytest.importorskip("torch")
    for tensor in (TensorData([1.0, 2.0]), sparse(data=[1.0, 2.0], dtype="float32")):
        before = tensor.tolist()
        tensor.to_numpy()[:] = 9
        tensor.to_torch()[:] = 9
        assert tensor.tolist() == before
    assert tensor.to_torch().dtype == torch.float32


def test_a_strided_array_is_made_contiguous():
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    tensor = TensorData.from_numpy(array)
    assert tensor.shape == (3, 2)
    assert tensor.values.flags.c_contiguous
    assert tensor.data == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("rows", [[[1, 2], [3]], [[1], 2], [1, [2]]])
def test_ragged_rows_are_refused_with_the_remedy(rows):
    with pytest.raises(InvalidInputError) as caught:
        TensorData(rows, "int64")
    assert "pad" in caught.value.hint


@pytest.mark.parametrize("values", [[1.5], [math.nan], [math.inf], [1e30], [2**63], [2**70], ["1"]])
def test_values_that_are_not_int64_are_not_truncated(values):
    with pytest.raises(InvalidInputError):
        TensorData(values, "int64")


def test_whole_floats_and_the_empty_list_are_integers():
    assert TensorData([1.0, 2.0], "int64").data == [1, 2]
    assert TensorData([], "int64").shape == (0,)


def test_lists_take_the_given_dtype():
    assert TensorData([1, 0], "float32").data == [1.0, 0.0]
    assert TensorData([True, False], "float32").data == [1.0, 0.0]
    with pytest.raises(InvalidInputError, match="float16"):
        TensorData([1], "float16")


def test_an_overflow_of_float32_is_infinite_without_a_warning():
    assert TensorData([1e300], "float32").data == [math.inf]


def test_the_shape_may_be_given_with_flat_data():
    tensor = TensorData([1, 2, 3, 4], "int64", (2, 2))
    assert tensor.tolist() == [[1, 2], [3, 4]]
    assert len(tensor) == 2


@pytest.mark.parametrize("shape", [(3,), (1,), (-1,), (-1, -2), (2, 2**62), (1.0, 2), "ab", 2])
def test_a_shape_that_does_not_fit_is_refused(shape):
    with pytest.raises(InvalidInputError):
        TensorData([1, 2], "int64", shape)


def test_a_product_of_sides_beyond_64_bits_is_not_taken_for_zero():
    with pytest.raises(InvalidInputError):
        TensorData([], "int64", (2**32, 2**32))


# ---- Sparse ----


def sparse(**changes) -> TensorData:
    facts = {
        "data": [5, 6],
        "dtype": "int64",
        "shape": (2, 3),
        "sparse_crow_indices": [0, 1, 2],
        "sparse_col_indices": [0, 2],
    }
    return TensorData(**{**facts, **changes})


def test_unlisted_cells_take_the_pad_value():
    assert sparse().is_sparse
    assert sparse().tolist() == [[5, 0, 0], [0, 0, 6]]
    assert sparse().tolist(pad_value=-1) == [[5, -1, -1], [-1, -1, 6]]


def test_an_empty_row_and_no_rows_are_sparse_too():
    tensor = sparse(sparse_crow_indices=[0, 0, 2])
    assert tensor.tolist() == [[0, 0, 0], [5, 0, 6]]
    nothing = sparse(data=[], shape=(0, 3), sparse_crow_indices=[0], sparse_col_indices=[])
    assert nothing.to_numpy().shape == (0, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"sparse_crow_indices": None},
        {"sparse_col_indices": None},
        {"shape": None},
        {"shape": (6,)},
        {"shape": (-1, 3), "data": [], "sparse_crow_indices": [], "sparse_col_indices": []},
        {"sparse_crow_indices": [0, 2]},
        {"sparse_crow_indices": [1, 1, 2]},
        {"sparse_crow_indices": [0, 3, 2]},
        {"sparse_crow_indices": [0, 1, 3]},
        {"sparse_col_indices": [0]},
        {"sparse_col_indices": [0, 3]},
        {"sparse_col_indices": [-1, 0]},
        {"sparse_col_indices": [0.5, 1]},
        {"sparse_col_indices": ["a", "b"]},
    ],
    ids=str,
)
def test_indices_that_do_not_fit_are_refused(changes):
    with pytest.raises(InvalidInputError):
        sparse(**changes)


# ---- As a value ----


def test_bytes_are_counted_as_the_protocol_counts_them():
    assert TensorData([1.0, 2.0]).nbytes == 8
    assert TensorData([1, 2]).nbytes == 16
    assert sparse().nbytes == 16 + 8 * 3 + 8 * 2


def test_equality_is_by_value_and_a_nan_equals_itself():
    assert TensorData([math.nan, 1.0]) == TensorData([math.nan, 1.0])
    assert TensorData([1.0]) != TensorData([1])
    assert TensorData([1, 2]) != TensorData([1, 2], shape=(2, 1))
    assert sparse() == sparse()
    assert sparse() != TensorData(sparse().to_numpy())
    assert TensorData([1]) != [1]


def test_equal_tensors_have_equal_hashes():
    assert TensorData([0.0]) == TensorData([-0.0])
    assert hash(TensorData([0.0])) == hash(TensorData([-0.0]))


def test_a_tensor_is_frozen_and_pickles():
    tensor = sparse()
    with pytest.raises(AttributeError):
        tensor.dtype = "float32"
    assert pickle.loads(pickle.dumps(tensor)) == tensor
    assert repr(tensor) == "TensorData(sparse int64, shape=(2, 3))"


# ---- torch, where it is installed ----


def test_torch_tensors_are_converted_both_ways_and_copied():
    torch = pytest.importorskip("torch")
    source = torch.tensor([[1.5, 2.0]], requires_grad=True)
    tensor = TensorData.from_torch(source)
    with torch.no_grad():
        source.zero_()
    assert tensor.tolist() == [[1.5, 2.0]]
    back = tensor.to_torch()
    assert back.dtype == torch.float32
    back.zero_()
    assert tensor.tolist() == [[1.5, 2.0]]


def test_torch_dtypes_and_layouts():
    torch = pytest.importorskip("torch")
    assert TensorData.from_torch(torch.tensor([1.5], dtype=torch.bfloat16)).tolist() == [1.5]
    assert TensorData.from_torch(torch.tensor([7], dtype=torch.int32)).dtype == "int64"
    assert TensorData.from_torch(torch.eye(2).to_sparse()).tolist() == [[1, 0], [0, 1]]
    with pytest.raises(InvalidInputError):
        TensorData.from_torch(torch.tensor([True]))


def test_a_torch_table_becomes_sparse_if_that_is_smaller():
    torch = pytest.importorskip("torch")
    table = torch.full((4, 10), 7, dtype=torch.int64)
    table[0, 3], table[2, 0], table[2, 9] = 1, 2, 3
    sparse = TensorData.from_torch_sparse(table, pad_value=7)
    assert sparse.is_sparse
    assert sparse.data == [1, 2, 3]
    assert sparse.to_numpy(pad_value=7).tolist() == table.tolist()
    small = TensorData.from_torch_sparse(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    assert not small.is_sparse  # 2 + 1 + 2 * 2 numbers are no fewer than 4
    assert small.tolist() == [[0.0, 1.0], [2.0, 0.0]]
    for bad, pad in ((torch.zeros(3), 0), (torch.zeros(2, 2), 0.5), (torch.zeros(2, 2), True)):
        with pytest.raises(InvalidInputError):
            TensorData.from_torch_sparse(bad, pad)


@pytest.mark.parametrize("length", [0, 1, 1000, 40_000])
@pytest.mark.parametrize("at", [None, 0, 1, 31, 32, 33, 79])
def test_first_where_finds_the_first_array_with_such_an_element(length, at):
    arrays = [np.zeros(length + 1, np.float32) for _ in range(80)]
    if at is not None:
        arrays[at][-1] = np.nan
        arrays[79][0] = np.nan
    assert first_where(np.isnan, arrays) == at


def test_first_where_finds_nothing_in_empty_arrays():
    assert first_where(np.isnan, []) is None
    assert first_where(np.isnan, [np.float32([])] * 3) is None
