"""TensorData: a small dense or CSR-sparse tensor, kept in numpy arrays."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Sequence, Tuple, Union

from tinkex._runtime.late_import import np
from tinkex._runtime.numeric import to_int
from tinkex.errors import InvalidInputError, a_type

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    Array = npt.NDArray[Any]
else:
    Array = Any

#: The two dtypes of the protocol (docs/protocol.md, "Tensors").
DTYPES = ("int64", "float32")


def _as_wire_array(values: Any, dtype: Optional[str], what: str) -> Array:
    """Return *values* as a C-contiguous array of *dtype*, or of the dtype that fits them.

    The array never shares memory with *values*: callers reuse buffers, and a batch is encoded long
    after its tensors were created.
    """
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise InvalidInputError(
            f"{what} is not a rectangular array of numbers: {error}",
            hint="Every row must have the same length; pad the short ones.",
        ) from error
    # An explicit dtype also allows bools, and the unsigned integers that numpy chooses for Python
    # lists with very large numbers.
    if array.dtype.kind not in ("if" if dtype is None else "ifbu"):
        raise InvalidInputError(
            f"{what} has dtype {array.dtype}; only signed integers and floats can be sent",
            hint="Convert it first, e.g. array.astype(np.int64) or array.astype(np.float32).",
        )
    target = dtype or ("float32" if array.dtype.kind == "f" else "int64")
    is_fresh = isinstance(values, (list, tuple))  # numpy has just created a new array
    # Values beyond float32 become infinity, which `check_batch` refuses where it matters.
    with np.errstate(invalid="ignore", over="ignore"):
        converted = array.astype(target, order="C", copy=not is_fresh)
    # Compared by value, not by dtype, because numpy turns an empty list into an array of floats.
    if target == "int64" and array.dtype.kind in "fu" and not np.array_equal(converted, array):
        raise InvalidInputError(
            f"{what} has dtype int64, but holds values that are not 64-bit integers"
        )
    return converted


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class TensorData:
    """A tensor of dtype ``int64`` or ``float32``, row-major, dense or CSR-sparse.

    Args:
        data: the values, as a nested sequence or flattened row-major; for a sparse tensor, only the
            listed values.
        dtype: ``"int64"`` or ``"float32"``; by default the one that fits *data*.
        shape: the shape; by default that of *data*.  Required for a sparse tensor.
        sparse_crow_indices: CSR row pointers, one more than there are rows; only together with
            *sparse_col_indices*.
        sparse_col_indices: CSR column of each listed value.

    Raises:
        InvalidInputError: *dtype* is unknown, *data* cannot be converted, or the sizes contradict
            each other.

    The values are copied, so later writes to *data* have no effect.  A tensor is immutable, so
    threads may share it; do not write to ``values`` or the indices.
    """

    values: Array
    dtype: str
    shape: Tuple[int, ...]
    crow_indices: Optional[Array]
    col_indices: Optional[Array]

    def __init__(
        self,
        data: Any,
        dtype: Optional[str] = None,
        shape: Optional[Sequence[int]] = None,
        sparse_crow_indices: Any = None,
        sparse_col_indices: Any = None,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise InvalidInputError(
                f"tensor dtype {dtype!r} is unknown; it must be one of {DTYPES}"
            )
        self._set(
            _as_wire_array(data, dtype, "tensor data"),
            shape,
            index_array(sparse_crow_indices),
            index_array(sparse_col_indices),
        )

    def _set(
        self,
        values: Array,
        shape: Optional[Sequence[int]],
        crow: Optional[Array],
        col: Optional[Array],
    ) -> None:
        shape = _as_shape(shape) if shape is not None else values.shape
        values = values.reshape(-1)
        if (crow is None) != (col is None):
            raise InvalidInputError("a sparse tensor needs both crow and col indices")
        if crow is not None and col is not None:
            _check_csr(values, shape, crow, col)
        # math.prod, because numpy's product would wrap around for a huge shape.  Negative
        # dimensions are checked separately, because two of them have a positive product.
        elif math.prod(shape) != values.size or any(n < 0 for n in shape):
            raise InvalidInputError(f"tensor shape {shape} does not hold {values.size} values")
        set_field = object.__setattr__
        set_field(self, "values", values)
        set_field(self, "dtype", str(values.dtype))
        set_field(self, "shape", shape)
        set_field(self, "crow_indices", crow)
        set_field(self, "col_indices", col)

    @classmethod
    def _adopt(
        cls,
        values: Array,
        shape: Optional[Sequence[int]] = None,
        crow: Optional[Array] = None,
        col: Optional[Array] = None,
    ) -> TensorData:
        """Like the constructor, but without copying; for decoders.

        *values* must be a contiguous array of one of the two dtypes, the indices must be int64, and
        nothing else may refer to them.
        """
        tensor = object.__new__(cls)
        tensor._set(values, shape, crow, col)
        return tensor

    @classmethod
    def _of(cls, values: Array, dtype: str, shape: Tuple[int, ...]) -> TensorData:
        """Wrap flat, contiguous *values* of *dtype* that are known to fill *shape*.

        For decoders, which check one field of many tensors at once: the constructor's checks would
        take most of the time of reading a result of a thousand tensors.
        """
        tensor = object.__new__(cls)
        # The class is frozen, and object.__setattr__ would cost a call per field.
        fields = tensor.__dict__
        fields["values"], fields["dtype"], fields["shape"] = values, dtype, shape
        fields["crow_indices"] = fields["col_indices"] = None
        return tensor

    @classmethod
    def from_numpy(cls, array: Array) -> TensorData:
        """Copy *array*: floats become float32, signed integers int64; others are refused."""
        return cls._adopt(_as_wire_array(array, None, "array"))

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Copy a torch tensor from any device; bfloat16 and float16 are widened to float32."""
        if not hasattr(tensor, "detach"):
            raise InvalidInputError(
                f"from_torch was given {a_type(tensor)}, not a torch tensor",
                hint="TensorData(...) takes lists and numpy arrays.",
            )
        # numpy supports neither sparse layouts nor bfloat16.
        detached = tensor.detach().cpu()
        if str(detached.layout) != "torch.strided":
            detached = detached.to_dense()
        if detached.is_floating_point():
            detached = detached.float()
        return cls.from_numpy(detached.numpy())

    @classmethod
    def from_torch_sparse(cls, tensor: torch.Tensor, pad_value: int = 0) -> TensorData:
        """Copy a two-dimensional torch tensor, as CSR if that is smaller.

        Cells equal to *pad_value* are not listed; pass the same *pad_value* to `to_torch`.
        """
        pad_value = to_int(pad_value)
        if type(pad_value) is not int:
            raise InvalidInputError(f"pad_value is {pad_value!r}; it must be an integer")
        dense = cls.from_torch(tensor)
        if len(dense.shape) != 2:
            raise InvalidInputError(f"a sparse tensor has two dimensions, not shape {dense.shape}")
        # CSR stores an index for each listed value, one for each row, and one for the end.
        table = dense._dense()
        listed = table != pad_value
        if len(table) + 1 + 2 * int(np.count_nonzero(listed)) >= table.size:
            return dense
        crow = np.concatenate([[0], np.cumsum(np.count_nonzero(listed, axis=1))])
        return cls(table[listed], dense.dtype, dense.shape, crow, np.nonzero(listed)[1])

    @property
    def sparse_crow_indices(self) -> Optional[Array]:
        """The same as ``crow_indices``, under the constructor's and the official SDK's name."""
        return self.crow_indices

    @property
    def sparse_col_indices(self) -> Optional[Array]:
        """The same as ``col_indices``, under the constructor's and the official SDK's name."""
        return self.col_indices

    @property
    def is_sparse(self) -> bool:
        """Whether only the listed values are stored (CSR)."""
        return self.crow_indices is not None

    @property
    def data(self) -> List[Union[int, float]]:
        """The stored values as a flat Python list (a new one on each access)."""
        values: List[Union[int, float]] = self.values.tolist()
        return values

    @property
    def nbytes(self) -> int:
        """Bytes of the stored values and indices: 4 per float32, 8 per int64 and index."""
        if self.crow_indices is None or self.col_indices is None:
            return self.values.nbytes
        return self.values.nbytes + self.crow_indices.nbytes + self.col_indices.nbytes

    def to_numpy(self, pad_value: float = 0) -> Array:
        """Return a new array of ``shape``; the unlisted cells of a sparse tensor are *pad_value*.

        Writing to the array does not change the tensor, which requests in progress may still use.
        """
        dense = self._dense(pad_value)
        return dense if self.is_sparse else dense.copy()

    def _dense(self, pad_value: float = 0) -> Array:
        """Like `to_numpy`, but for reading only: a dense tensor returns a view of its values."""
        if self.crow_indices is None or self.col_indices is None:
            return self.values.reshape(self.shape)
        dense = np.full(self.shape, pad_value, dtype=self.values.dtype)
        # The row of each listed value: row r has crow[r + 1] - crow[r] values.
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.crow_indices))
        dense[rows, self.col_indices] = self.values
        return dense

    def to_torch(self, pad_value: float = 0) -> torch.Tensor:
        """Return a new torch tensor of ``shape`` (needs torch)."""
        import torch

        # The result shares the memory of the new array, which nothing else refers to.
        return torch.from_numpy(self.to_numpy(pad_value))

    def tolist(self, pad_value: float = 0) -> List[Any]:
        """Return nested Python lists of ``shape``."""
        nested: List[Any] = self._dense(pad_value).tolist()
        return nested

    def __len__(self) -> int:
        """Length of the first dimension."""
        return self.shape[0] if self.shape else 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return (
            self.dtype == other.dtype
            and self.shape == other.shape
            # NaN stands for an unknown value: tensors with the same unknowns are equal.
            and np.array_equal(self.values, other.values, equal_nan=self.dtype == "float32")
            and _same_indices(self.crow_indices, other.crow_indices)
            and _same_indices(self.col_indices, other.col_indices)
        )

    def __hash__(self) -> int:
        # Without the values: equal values may differ in their bytes (0.0 and -0.0, NaN payloads).
        return hash((self.dtype, self.shape))

    def __repr__(self) -> str:
        kind = "sparse " if self.is_sparse else ""
        return f"TensorData({kind}{self.dtype}, shape={self.shape})"


def first_where(test: Callable[[Array], Array], arrays: Sequence[Array]) -> Optional[int]:
    """Return the index of the first of the flat *arrays* with an element that passes *test*.

    Short arrays are tested in groups: one by one would take four times as long, and all at once
    would double the memory.
    """
    start = 0
    while start < len(arrays):
        group_size = min(32, 1 + (1 << 15) // max(1, arrays[start].size))
        group = arrays[start : start + group_size]
        if test(np.concatenate(group)).any():
            return start + next(i for i, array in enumerate(group) if test(array).any())
        start += group_size
    return None


def _as_shape(shape: Sequence[int]) -> Tuple[int, ...]:
    try:
        return tuple(operator.index(n) for n in shape)
    except TypeError as error:
        raise InvalidInputError(f"tensor shape {shape!r} is not a sequence of integers") from error


def index_array(indices: Any) -> Optional[Array]:
    """Return CSR *indices* as a flat array of int64, or None for None."""
    if indices is None:
        return None
    return _as_wire_array(indices, "int64", "an index list of the sparse tensor").reshape(-1)


def _same_indices(left: Optional[Array], right: Optional[Array]) -> bool:
    if left is None or right is None:
        return left is right
    return np.array_equal(left, right)


def _check_csr(values: Array, shape: Sequence[int], crow: Array, col: Array) -> None:
    if len(shape) != 2:
        raise InvalidInputError(f"a sparse tensor has two dimensions, not shape {tuple(shape)}")
    rows, columns = shape
    # In this order, because later tests read elements that earlier ones have shown to exist.
    fits = (
        rows >= 0
        and crow.size == rows + 1
        and col.size == values.size
        and crow[0] == 0
        and crow[-1] == values.size
        and bool(np.all(np.diff(crow) >= 0))
        and (col.size == 0 or (int(col.min()) >= 0 and int(col.max()) < columns))
    )
    if not fits:
        raise InvalidInputError(
            f"CSR indices do not fit shape {tuple(shape)} with {values.size} values"
        )
