"""Custom losses that the server computes: traced with torch.fx, and uploaded as a graph in JSON.

See docs/protocol.md, "Custom losses".  torch is imported when a loss is traced.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import logging
import math
import re
import threading
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Set, Tuple

import orjson

from tinkex._api import training as api
from tinkex._api._optional import optional_route
from tinkex._runtime.numeric import is_int, to_int
from tinkex._training.create_run import wait_for_result
from tinkex._training.custom_loss import LossHandle, PerDatumLossFn, require_torch
from tinkex._transport.server_flags import flags_for
from tinkex.errors import APIError, InvalidInputError, RouteMissingError, a_type
from tinkex.types import CreateCustomLossResponse
from tinkex.types._wire import excerpt

if TYPE_CHECKING:
    from tinkex._sessions.runtime import Runtime

logger = logging.getLogger(__name__)

_KIND = "create_custom_loss"

#: The most parameters that a loss may have, including ``logprobs``.
MAX_INPUTS = 16

# What the protocol allows (docs/protocol.md, "Custom losses"), checked before anything is sent.
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")

#: Modules whose functions a server can look up by name.
_MODULES = ("torch.", "math.", "operator.")

#: Methods that take a value out of the graph, or work on the autograd state of this process.
_FORBIDDEN = frozenset({"backward", "item", "numpy", "tolist"})

# Held while a loss is traced, which runs the user's code: torch.fx temporarily patches functions of
# whole modules, and two threads that trace at the same time would leave them patched.
_tracing = threading.Lock()


@dataclasses.dataclass(frozen=True)
class LossInput:
    """A parameter of a loss: a loss input of the datum, of *rank* dimensions."""

    name: str
    rank: int


@dataclasses.dataclass(frozen=True)
class LossGraph:
    """A traced loss.

    Attributes:
        name: the name of the function.
        inputs: its parameters; the first is ``logprobs``.
        graph: ``{"format": 1, "nodes": [...]}``, plain JSON data.
    """

    name: str
    inputs: Tuple[LossInput, ...]
    graph: Dict[str, Any]


def trace_loss(fn: Callable[..., Any], input_ranks: Mapping[str, int]) -> LossGraph:
    """Trace *fn*, a loss of one datum.

    Args:
        fn: takes ``logprobs`` and loss inputs of the datum by name, as float32 or int64 tensors;
            returns a scalar tensor and a dict of metrics named ``custom/<name>:sum`` or ``:mean``.
        input_ranks: the number of dimensions of every parameter: 0 to 2 (1 or 2 for ``logprobs``).

    Raises:
        InvalidInputError: *fn* cannot be expressed as a graph; the message says why.
        ImportError: torch is not installed.
    """
    inputs = _inputs(fn, input_ranks)
    from torch import fx

    try:
        with _tracing:
            traced = fx.Tracer().trace(fn)
    except Exception as error:  # whatever the user's code raises on symbolic values
        raise InvalidInputError(
            f"the loss cannot be traced: {type(error).__name__}: {error}",
            hint="Use torch functions of the parameters only; no if, for, float() or print that "
            "depends on their values.",
        ) from error
    # Without the lock: torch is no longer patched, and no other thread has the graph.
    nodes = [_node(node) for node in traced.nodes]
    name = str(getattr(fn, "__name__", "custom_loss"))  # a functools.partial has none
    return LossGraph(name, inputs, {"format": 1, "nodes": nodes})


def _inputs(fn: Callable[..., Any], input_ranks: Mapping[str, int]) -> Tuple[LossInput, ...]:
    if not callable(fn):
        raise InvalidInputError(f"the loss is {a_type(fn)}, not a function")
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"the loss has no signature: {error}") from error
    for parameter in parameters:
        plain = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if not plain or parameter.default is not parameter.empty:
            raise InvalidInputError(
                f"parameter {str(parameter)!r} of the loss must be positional, without a default"
            )
        if not _NAME.fullmatch(parameter.name):
            raise InvalidInputError(
                f"parameter {parameter.name!r} of the loss must be in lower case, at most 64 long"
            )
    names = [parameter.name for parameter in parameters]
    if names[:1] != ["logprobs"] or len(names) > MAX_INPUTS:
        raise InvalidInputError(
            f"the loss takes {names}; it must take logprobs first, "
            f"and at most {MAX_INPUTS} parameters"
        )
    if not isinstance(input_ranks, Mapping) or set(input_ranks) != set(names):
        raise InvalidInputError(
            f"input_ranks is {excerpt(input_ranks)}; it must give the rank of each of {names}"
        )
    ranks = {name: to_int(input_ranks[name], text=False) for name in names}
    for name, rank in ranks.items():
        allowed = (1, 2) if name == "logprobs" else (0, 1, 2)
        if not is_int(rank) or rank not in allowed:
            raise InvalidInputError(
                f"input_ranks[{name!r}] is {input_ranks[name]!r}; it must be one of {allowed}"
            )
    return tuple(LossInput(name, rank) for name, rank in ranks.items())


def _node(node: Any) -> Dict[str, Any]:
    """Return the JSON form of a torch.fx node."""
    if node.op == "get_attr":
        raise InvalidInputError(
            "the loss uses a tensor that is not one of its parameters",
            hint="Use a Python number, torch.full_like of a parameter, or one more loss input.",
        )
    if node.op == "call_module":
        raise InvalidInputError(f"the loss calls the module {node.target}; use functions")
    if node.op == "call_method" and node.target in _FORBIDDEN:
        raise InvalidInputError(f"the loss calls .{node.target}(), which cannot be sent")
    if node.op == "output":
        _check_output(node.args[0])
    return {
        "op": node.op,
        "name": node.name,
        "target": _function(node) if node.op == "call_function" else str(node.target),
        "args": [_encode(argument) for argument in node.args],
        "kwargs": {name: _encode(argument) for name, argument in node.kwargs.items()},
    }


def _function(node: Any) -> str:
    """Return the qualified name of the function that *node* calls."""
    from torch.fx.node import _get_qualified_name

    try:
        name = str(_get_qualified_name(node.target))
    except (RuntimeError, AttributeError) as error:
        raise InvalidInputError(f"the loss calls {node.target!r}, which has no name") from error
    if name.startswith("_operator."):  # the C module that the functions of operator come from
        name = name[1:]
    known = name == "getattr" or name.startswith(_MODULES)
    if not known or name.rpartition(".")[2] in _FORBIDDEN:
        raise InvalidInputError(
            f"the loss calls {name}, which cannot be sent",
            hint="Only functions of torch, math and operator can.",
        )
    # An attribute, as in x.shape, is traced as a call of getattr.
    if name == "getattr" and node.args[1] in _FORBIDDEN:
        raise InvalidInputError(f"the loss uses .{node.args[1]}, which cannot be sent")
    return name


def _check_output(returned: Any) -> None:
    from torch import fx

    pair = returned if isinstance(returned, (tuple, list)) else ()
    if len(pair) != 2 or not isinstance(pair[0], fx.Node) or not isinstance(pair[1], dict):
        raise InvalidInputError(
            "the loss must return a scalar tensor and a dict of metrics",
            hint='For example: return -(logprobs * weights).sum(), {"custom/tokens:sum": n}',
        )
    for name in pair[1]:
        if not isinstance(name, str) or not _METRIC.fullmatch(name):
            raise InvalidInputError(
                f"metric {name!r} must be named like custom/<name>:sum or custom/<name>:mean",
                hint="The name is of lower-case letters, digits and _ . / -, at most 64.",
            )


def _encode(value: Any) -> Any:
    """Return the JSON form of an argument of a node."""
    import torch
    from torch import fx

    if isinstance(value, fx.Node):
        return {"ref": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):  # JSON has neither NaN nor infinity
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple):
        return {"tuple": _encode_all(value)}
    if isinstance(value, list):
        return _encode_all(value)
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise InvalidInputError(f"the loss uses a dict with keys {excerpt(list(value), 100)}")
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": _encode_all([value.start, value.stop, value.step])}
    if value is Ellipsis:
        return {"ellipsis": True}
    for kind in ("dtype", "device", "layout", "memory_format"):
        if isinstance(value, getattr(torch, kind)):
            return {kind: str(value).replace("torch.", "", 1)}
    raise InvalidInputError(
        f"the loss uses {a_type(value)}, which cannot be sent: {excerpt(value, 100)}"
    )


def _encode_all(values: Any) -> List[Any]:
    return [_encode(value) for value in values]


class LossRegistry:
    """Creates LossHandles for one session, only one for each loss.  Thread-safe."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        # next() of a count is atomic.  A seq_id is used even if its request fails.
        self._seq_ids = itertools.count()
        # Guards _known: the graphs of the losses that were created, or are being created.
        self._lock = threading.Lock()
        self._known: Set[bytes] = set()

    def create(self, fn: PerDatumLossFn, input_ranks: Mapping[str, int]) -> LossHandle:
        """Trace *fn*, and upload it.  Blocks.  See `ServiceClient.create_custom_loss`."""
        require_torch("create_custom_loss")
        graph = trace_loss(fn, input_ranks)
        self._runtime.ensure_open(_KIND)
        # Without the name: under two names it is still the same loss.
        key = orjson.dumps([graph.inputs, graph.graph])
        # Registered before the upload: if two threads create the same loss, one is refused.
        with self._lock:
            known = key in self._known
            self._known.add(key)
        if known:
            raise InvalidInputError(
                f"the loss {graph.name!r} was created in this session before",
                hint="Keep the LossHandle and use it for every step.",
            )
        try:
            # Without the lock: uploading and polling take time, and other threads may create
            # losses.
            loss_id = self._runtime.run(_KIND, functools.partial(self._upload, graph)).result()
        except BaseException:  # Ctrl-C too: the caller got no handle, and may try again
            with self._lock:
                self._known.discard(key)
            raise
        return LossHandle(fn, graph, self._runtime.session.session_id, loss_id)

    def _upload(self, graph: LossGraph) -> Optional[str]:
        """Return the server's id of the loss, or None if it takes no custom losses.  Blocks."""
        runtime = self._runtime
        if not self._is_wanted():
            return None
        try:
            with optional_route(
                runtime.transport, f"POST {_KIND}", names_nothing=True, ask_once=True
            ):
                accepted = api.submit(
                    runtime.transport,
                    _KIND,
                    session_id=runtime.session.session_id,
                    custom_loss_seq_id=next(self._seq_ids),
                    name=graph.name,
                    inputs=[{"name": entry.name, "rank": entry.rank} for entry in graph.inputs],
                    graph=graph.graph,
                )
        except RouteMissingError as error:
            logger.info("custom losses are computed here: %s", error.message)
            return None
        created = wait_for_result(runtime, _KIND, accepted, CreateCustomLossResponse)
        return created.loss_id

    def _is_wanted(self) -> bool:
        """Whether the server computes custom losses; False if it does not say so."""
        try:
            return flags_for(self._runtime.transport, once=True).custom_loss_server_side
        except APIError as error:
            logger.info("custom losses are computed here: %s", error)
            return False
