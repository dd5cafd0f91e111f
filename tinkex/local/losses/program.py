"""LossProgram: a custom loss, read from a graph that is checked and never trusted.

A graph is a torch.fx trace as JSON (docs/protocol.md, "Custom losses").  Reading it needs no torch
and runs nothing: a function is a name, and only the names listed here are ever looked up.
`tinkex.local.losses.evaluation` evaluates it.  Pure; no threads.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Set, Tuple

from tinkex.local.errors import HTTPError
from tinkex.local.fields import required

_MAX_INPUTS = 16
_MAX_NODES = 1000  # all are computed for each datum, on the engine thread
_MAX_DEPTH = 8  # of arguments, which are read recursively

_INPUT = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")

# Only listed functions can be called.  Left out are in-place functions, random numbers, files, and
# functions that make a tensor of any size from numbers alone.
_ELEMENTWISE = """
    abs exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square pow neg negative reciprocal sign sin
    cos tan asin acos atan atan2 sinh cosh tanh sigmoid logit erf erfc relu clamp clip clamp_min
    clamp_max minimum maximum fmin fmax where add sub subtract mul multiply div divide true_divide
    floor_divide remainder fmod floor ceil round trunc frac eq ne lt le gt ge greater greater_equal
    less less_equal not_equal logical_and logical_or logical_not logical_xor isnan isinf isfinite
    nan_to_num logaddexp logaddexp2 lerp addcmul addcdiv xlogy masked_fill
"""
_REDUCING = """
    sum nansum mean nanmean prod std var median amin amax min max logsumexp softmax log_softmax
    cumsum cumprod logcumsumexp any all argmax argmin count_nonzero norm dot diff topk sort argsort
"""
_SHAPING = """
    unsqueeze squeeze reshape flatten transpose t permute movedim
    flip roll gather index_select masked_select take narrow select broadcast_to detach clone numel
    matmul mm mv tril triu
"""


def _names(text: str) -> FrozenSet[str]:
    return frozenset(text.split())


_SHARED = _names(_ELEMENTWISE + _REDUCING + _SHAPING)

#: Functions of torch, which are also those of ``torch.functional``.
TORCH = _SHARED | _names("stack cat concat zeros_like ones_like full_like")

#: Functions of torch.nn.functional.
NEURAL = _names(
    """
    relu softplus logsigmoid sigmoid tanh softmax log_softmax gelu elu leaky_relu silu huber_loss
    smooth_l1_loss mse_loss l1_loss kl_div binary_cross_entropy_with_logits
    """
)

OPERATOR = _names(
    """
    add sub mul truediv floordiv mod pow neg pos abs lt le eq ne gt ge and_ or_ xor invert inv not_
    matmul getitem
    """
)

MATH = _names("sqrt exp expm1 log log1p log2 log10 pow fabs floor ceil tanh")

#: Methods of tensors.
METHODS = _SHARED | _names(
    """
    size dim float double half bfloat16 long int bool to type_as contiguous view view_as reshape_as
    expand expand_as
    """
)

#: Attributes of tensors, and of the pairs that some functions return.
ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "T", "values", "indices"})

# Traces name some functions of torch by the module that implements them: torch.functional (norm),
# torch._C._nn (gelu).
_MODULES = {
    "torch": TORCH,
    "torch.functional": TORCH,
    "torch.nn.functional": NEURAL,
    "torch._C._nn": NEURAL,
    "operator": OPERATOR,
    "math": MATH,
}

_VALUE_KEYS = frozenset({"dtype", "device", "layout", "memory_format"})


@dataclasses.dataclass(frozen=True)
class Node:
    """One step: a function and its arguments as JSON; *module* may be "method" or "getattr"."""

    name: str
    module: str
    function: str
    args: Tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LossProgram:
    """A loss of one datum.

    Attributes:
        name: what the client calls it.
        inputs: name and rank of each parameter; the first is ``logprobs``.
        parameters: the names that the nodes use for the inputs, in the same order.
        nodes: the steps, in order.
        loss: the node that is the loss.
        metrics: name -> value, in the form of a node's arguments.
    """

    name: str
    inputs: Tuple[Tuple[str, int], ...]
    parameters: Tuple[str, ...]
    nodes: Tuple[Node, ...]
    loss: str
    metrics: Mapping[str, Any]


def read_program(body: Dict[str, Any]) -> LossProgram:
    """Read the body of ``create_custom_loss``; HTTPError 400 says what is wrong with it."""
    inputs = _read_inputs(required(body, "inputs", list))
    graph = required(body, "graph", dict)
    if graph.get("format") != 1:
        raise HTTPError(
            400, f"graph format {graph.get('format')!r} is unknown; this server reads 1"
        )
    listed = required(graph, "nodes", list)
    if not 1 <= len(listed) <= _MAX_NODES:
        raise HTTPError(400, f"the graph has {len(listed)} nodes; it may have 1 to {_MAX_NODES}")
    # Nodes are in execution order, so a reference to a later node is an error, and there can be no
    # cycle.
    known: Set[str] = set()
    parameters: List[str] = []
    nodes: List[Node] = []
    output: Optional[Any] = None
    for raw in listed:
        if not isinstance(raw, dict) or output is not None:
            raise HTTPError(400, "the graph's nodes must be objects, and its output the last one")
        name, op, target = (required(raw, field, str) for field in ("name", "op", "target"))
        args, kwargs = _arguments(raw)
        _check_value(args, known)
        _check_value(list(kwargs.values()), known)
        if name in known:
            raise HTTPError(400, f"the graph has two nodes {name!r}")
        known.add(name)
        if op == "placeholder":
            parameters.append(name)
        elif op == "output":
            output = args[0] if len(args) == 1 else ()
        else:
            module, function = _function(op, target, args)
            nodes.append(Node(name, module, function, tuple(args), kwargs))
    if len(parameters) != len(inputs):
        raise HTTPError(400, f"the graph has {len(parameters)} parameters for {len(inputs)} inputs")
    loss, metrics = _read_output(output)
    name = required(body, "name", str)
    return LossProgram(name, inputs, tuple(parameters), tuple(nodes), loss, metrics)


def _arguments(raw: Dict[str, Any]) -> Tuple[List[Any], Dict[str, Any]]:
    """Return the arguments of a node, positional and by name."""
    args, kwargs = raw.get("args") or [], raw.get("kwargs") or {}
    # A node of torch.fx has a tuple of arguments.
    if isinstance(args, dict) and list(args) == ["tuple"]:
        args = args["tuple"]
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise HTTPError(400, f"node {raw.get('name')!r}: args must be a list, and kwargs an object")
    return args, kwargs


def _read_inputs(listed: List[Any]) -> Tuple[Tuple[str, int], ...]:
    inputs = []
    for raw in listed:
        name = raw.get("name") if isinstance(raw, dict) else None
        rank = raw.get("rank") if isinstance(raw, dict) else None
        if not isinstance(name, str) or not _INPUT.fullmatch(name):
            raise HTTPError(400, f"{name!r:.100} is not a valid name for a loss input")
        # The type itself, because True is an int, too.
        if type(rank) is not int or rank not in ((1, 2) if name == "logprobs" else (0, 1, 2)):
            raise HTTPError(400, f"the rank of the loss input {name!r} is {rank!r}")
        inputs.append((name, rank))
    names = [name for name, _ in inputs]
    if names[:1] != ["logprobs"] or len(set(names)) != len(names) or len(names) > _MAX_INPUTS:
        raise HTTPError(
            400,
            f"the inputs are {names}; the first must be logprobs, none may occur twice, and there "
            f"may be at most {_MAX_INPUTS}",
        )
    return tuple(inputs)


def _function(op: str, target: str, args: List[Any]) -> Tuple[str, str]:
    if op == "call_method":
        if target in METHODS:
            return "method", target
    elif op == "call_function":
        if target in ("getattr", "builtins.getattr"):
            if len(args) == 2 and isinstance(args[1], str) and args[1] in ATTRIBUTES:
                return "getattr", args[1]
            raise HTTPError(400, f"a custom loss cannot use the attribute {args[1:]!r:.100}")
        module, _, function = target.rpartition(".")
        if function in _MODULES.get(module, ()):
            return {"torch.functional": "torch", "torch._C._nn": "torch.nn.functional"}.get(
                module, module
            ), function
    raise HTTPError(400, f"a custom loss cannot use {op} {target!r:.100} on this server")


def _check_value(value: Any, known: Set[str], depth: int = 0) -> None:
    """Check an argument, however nested; a reference must be to an earlier node."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    if depth > _MAX_DEPTH:
        raise HTTPError(400, "the arguments of a node are nested too deeply")
    if isinstance(value, list):
        for item in value:
            _check_value(item, known, depth + 1)
        return
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "ref" and isinstance(content, str) and content in known:
            return
        if kind in ("tuple", "slice") and isinstance(content, list):
            if kind == "slice" and len(content) != 3:
                raise HTTPError(400, "a slice has a start, a stop and a step")
            _check_value(content, known, depth + 1)
            return
        if kind == "dict" and isinstance(content, dict):
            _check_value(list(content.values()), known, depth + 1)
            return
        if kind == "ellipsis" or (kind == "float" and content in ("inf", "-inf", "nan")):
            return
        if kind in _VALUE_KEYS and isinstance(content, str):
            return
    raise HTTPError(400, f"{value!r:.100} is not a valid argument of a node")


def _read_output(output: Any) -> Tuple[str, Dict[str, Any]]:
    pair = output.get("tuple") if isinstance(output, dict) else output
    loss, metrics = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
    loss = loss.get("ref") if isinstance(loss, dict) else None
    if isinstance(metrics, dict) and list(metrics) == ["dict"]:
        metrics = metrics["dict"]
    if not isinstance(loss, str) or not isinstance(metrics, dict):
        raise HTTPError(400, "the graph's output must be a pair: a tensor, and a dict of metrics")
    for name, value in metrics.items():
        if not _METRIC.fullmatch(name):
            raise HTTPError(400, f"{name!r:.100} is not the name of a metric, such as custom/x:sum")
        number = isinstance(value, (int, float))
        if not number and not (isinstance(value, dict) and "ref" in value):
            raise HTTPError(400, f"the metric {name} is {value!r:.100}; it must be a tensor")
    return loss, metrics
