"""Computes a custom loss from its checked graph, with torch, which is imported on first use.

A small interpreter: each node is one call of a listed function on tensors and numbers, whose result
is bounded in size before it is computed.  Runs on the engine thread.
"""

from __future__ import annotations

import importlib.util
import math
import operator
from typing import Any, Callable, Dict, Mapping, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from tinkex.local.engines.engine import EngineError
from tinkex.local.losses.program import LossProgram, Node
from tinkex.types import TensorData

#: Most elements of a tensor within a graph: 256 MiB of float32.
_MOST_ELEMENTS = 1 << 26

F32 = npt.NDArray[np.float32]


def has_torch() -> bool:
    """True if this server can compute custom losses."""
    return importlib.util.find_spec("torch") is not None


def loss_of_datum(
    program: LossProgram, logprobs: F32, inputs: Mapping[str, TensorData], *, backward: bool
) -> Tuple[float, F32, Dict[str, float]]:
    """Return the loss of one datum, its gradient by the logprobs, and the metrics.

    Without *backward* the gradient is all zeros.

    Raises:
        EngineError: the graph does not fit the inputs, or the loss or its gradient is not finite.
    """
    import torch

    # Copied, since an argument ``out`` could write into the tensor, and the client gets the array.
    leaf = torch.from_numpy(logprobs.copy()).requires_grad_(backward)
    values: Dict[str, Any] = {program.parameters[0]: leaf}
    for parameter, (name, rank) in list(zip(program.parameters, program.inputs))[1:]:
        values[parameter] = _input(name, rank, inputs[name])
    with torch.set_grad_enabled(backward):
        for node in program.nodes:
            values[node.name] = _step(node, values)
    loss = values[program.loss]
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise EngineError(f"the custom loss {program.name} is not a scalar tensor: {loss!r:.80}")
    if not bool(torch.isfinite(loss).all()):
        raise EngineError(f"the custom loss {program.name} is {float(loss.detach())}")
    metrics = {
        name: _number(name, _decode(value, values)) for name, value in program.metrics.items()
    }
    gradient = torch.zeros_like(leaf)
    if backward and loss.requires_grad:
        # A loss need not depend on the logprobs: its gradient is None then.
        gradient = torch.autograd.grad(loss.reshape(()), leaf, allow_unused=True)[0]
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        if not bool(torch.isfinite(gradient).all()):
            raise EngineError(f"the gradient of the custom loss {program.name} is not finite")
    found: F32 = gradient.numpy().astype(np.float32)
    return float(loss.detach()), found, metrics


def _input(name: str, rank: int, tensor: TensorData) -> Any:
    import torch

    values = torch.from_numpy(tensor.to_numpy().copy())
    # A scalar may have shape (1,).
    if rank == 0 and values.numel() == 1:
        return values.reshape(())
    if values.dim() != rank:
        raise EngineError(
            f"loss input {name!r} has {values.dim()} dimensions; the loss was made for {rank}"
        )
    return values


def _step(node: Node, values: Mapping[str, Any]) -> Any:
    args = [_decode(arg, values) for arg in node.args]
    kwargs = {name: _decode(value, values) for name, value in node.kwargs.items()}
    try:
        _check_size(node, [*args, *kwargs.values()])
        result = _callable(node, args)(*args, **kwargs)
    except EngineError:
        raise
    except Exception as error:  # torch raises many types for arguments that do not fit
        raise EngineError(
            f"the custom loss failed at {node.name} ({node.function}): "
            f"{type(error).__name__}: {error}"
        ) from error
    # Python's integers have no limit: a thousand multiplications could make a number that fills the
    # memory.
    if isinstance(result, int) and abs(result) > 1 << 62:
        raise EngineError(f"the custom loss computed too large a number at {node.name}")
    return result


def _callable(node: Node, args: Sequence[Any]) -> Callable[..., Any]:
    """Return the function of *node*, whose name was checked against the lists when it was read."""
    import torch

    if node.module in ("method", "getattr"):
        if not args or not isinstance(args[0], (torch.Tensor, tuple)):
            raise EngineError(f"{node.name}: {node.function} needs a tensor")
        if node.module == "getattr":
            return getattr
        if not isinstance(args[0], torch.Tensor):
            raise EngineError(f"{node.name}: {node.function} needs a tensor")
    if node.module == "operator":
        return _operator(node.function)
    places = {"method": torch.Tensor, "math": math, "torch": torch}
    # The only other module that `program` lets pass is torch.nn.functional.
    place = places.get(node.module, torch.nn.functional)
    function: Callable[..., Any] = getattr(place, node.function)
    return function


def _operator(name: str) -> Callable[..., Any]:
    import torch

    function: Callable[..., Any] = getattr(operator, name)
    if name == "getitem":
        return function

    def call(*args: Any) -> Any:
        # Numbers and tensors only: lists and strings can be multiplied to any size.
        if not all(isinstance(arg, (torch.Tensor, int, float)) for arg in args):
            raise TypeError(f"{name} takes tensors and numbers only")
        if name == "pow" and not any(isinstance(arg, torch.Tensor) for arg in args):
            return math.pow(*args)  # in floats: an integer power could fill the memory
        return function(*args)

    return call


def _check_size(node: Node, args: Sequence[Any]) -> None:
    """Raise EngineError if the result could be too large: by broadcasting, joining, indexing."""
    import torch

    # Before the call: all sessions share this process, and a graph of a few nodes could fill its
    # memory.  An upper bound is enough.
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    joined = sum(
        item.numel()
        for arg in args
        if isinstance(arg, (list, tuple))
        for item in arg
        if isinstance(item, torch.Tensor)
    )
    size = joined
    if node.function in ("getitem", "index_select", "take", "gather") and tensors:
        # Each index picks one row at most.
        picked = max((one.numel() for one in tensors[1:]), default=0) + joined
        rows = max(1, tensors[0].shape[0] if tensors[0].dim() else 1)
        size = tensors[0].numel() // rows * max(1, picked)
    elif len(tensors) > 1:
        # Broadcasting aligns the last dimensions and takes the larger size of each; so does an
        # outer product by matmul.
        size += math.prod(
            max(one.shape[-place] for one in tensors if one.dim() >= place)
            for place in range(1, max(one.dim() for one in tensors) + 1)
        )
    if node.function in ("expand", "broadcast_to", "view", "reshape"):
        # Sizes are separate arguments or a list; -1 keeps a size.
        listed = [n for arg in args for n in (arg if isinstance(arg, (list, tuple)) else [arg])]
        size = math.prod(max(1, abs(n)) for n in listed if isinstance(n, int))
    if size > _MOST_ELEMENTS:
        raise EngineError(
            f"the custom loss is too large at {node.name} ({node.function}): {size} elements; "
            f"at most {_MOST_ELEMENTS}"
        )


def _decode(value: Any, values: Mapping[str, Any]) -> Any:
    """Return the value of an argument: plain JSON, a reference to a node, or a tagged form."""
    import torch

    if isinstance(value, list):
        return [_decode(item, values) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "ref":
        return values[content]
    if kind == "tuple":
        return tuple(_decode(item, values) for item in content)
    if kind == "slice":
        return slice(*(_decode(item, values) for item in content))
    if kind == "dict":
        return {name: _decode(item, values) for name, item in content.items()}
    if kind == "ellipsis":
        return Ellipsis
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device("cpu")  # logprobs and inputs are there
    expected = {
        "dtype": torch.dtype,
        "layout": torch.layout,
        "memory_format": torch.memory_format,
    }[kind]
    found = getattr(torch, content, None)
    if not isinstance(found, expected):
        raise EngineError(f"{content!r:.80} is not a {kind} of torch")
    return found


def _number(name: str, value: Any) -> float:
    size = getattr(value, "numel", lambda: 1)()
    if size != 1:
        raise EngineError(f"the metric {name} has {size} elements; it must be one number")
    return float(value.detach() if hasattr(value, "detach") else value)
