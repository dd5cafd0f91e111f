"""Custom losses: computed here with torch; only their gradients go to the server.

The gradient of any function of the logprobs equals the gradient of sum(-weights * logprobs) with
weights = -d loss / d logprobs, and that sum is the loss cross_entropy (docs/protocol.md, "Custom
losses").  torch is imported when a loss is computed.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from tinkex._runtime.late_import import np
from tinkex._training.batch import Loss
from tinkex.errors import ConfigError, InvalidInputError, ResponseDecodeError, a_type
from tinkex.futures import APIFuture
from tinkex.types import Datum, ForwardBackwardOutput, TensorData
from tinkex.wire.chunking import combine

if TYPE_CHECKING:
    import torch

    from tinkex._training.loss_tracing import LossGraph
    from tinkex._training.run import TrainingRun

#: ``loss(data, logprobs)`` -> a scalar tensor and metrics; logprobs[i] is float32, with the shape
#: of data[i]'s target_tokens.
CustomLoss = Callable[
    [Sequence[Datum], "List[torch.Tensor]"], "Tuple[torch.Tensor, Optional[Mapping[str, Any]]]"
]

#: ``loss(logprobs, ...)`` of one datum -> a scalar tensor and metrics; the other parameters are
#: loss inputs of the datum, by name.  For `ServiceClient.create_custom_loss`.
PerDatumLossFn = Callable[..., "Tuple[torch.Tensor, Mapping[str, Any]]"]


class LossHandle:
    """A traced loss: made by `ServiceClient.create_custom_loss`, for `forward_backward_custom`.

    If the server has accepted the loss, the entire pass runs there; otherwise the loss is computed
    here.  Thread-safe if its function is.

    Attributes:
        name: the name of the function.
        inputs: the parameters of the function, with the ranks given for them.
        graph: the trace, as it is sent.
        loss_id: the server's id of the loss, or None if the server has not accepted it.
        session_id: the session that the id belongs to.
    """

    def __init__(
        self,
        fn: PerDatumLossFn,
        graph: LossGraph,
        session_id: str,
        loss_id: Optional[str] = None,
    ) -> None:
        self._fn = fn
        self.name = graph.name
        self.inputs = graph.inputs
        self.graph = graph.graph
        self.session_id = session_id
        self.loss_id = loss_id

    def result(self, timeout: Optional[float] = None) -> LossHandle:
        """Return this handle itself; *timeout* has no effect."""
        return self

    def is_at_server(self, session_id: str) -> bool:
        """Whether the server computes this loss for runs of session *session_id*."""
        return self.loss_id is not None and self.session_id == session_id

    def check(self, data: Sequence[Datum]) -> None:
        """Raise InvalidInputError unless every datum has the inputs, of the ranks given."""
        for index, datum in enumerate(data):
            for entry in self.inputs:
                # The logprobs have the same rank as the target tokens.
                name = "target_tokens" if entry.name == "logprobs" else entry.name
                tensor = datum.loss_fn_inputs.get(name)
                if tensor is None:
                    raise InvalidInputError(f"data[{index}] has no loss input {name!r}")
                # A scalar may be given as a tensor of one element: `_one` reshapes it.
                single = entry.rank == 0 and tensor.values.size == 1
                if len(tensor.shape) != entry.rank and not single:
                    raise InvalidInputError(
                        f"data[{index}]: loss input {name!r} has {len(tensor.shape)} dimensions; "
                        f"the loss {self.name!r} was created for {entry.rank}"
                    )

    def __call__(
        self, data: Sequence[Datum], logprobs: Sequence[torch.Tensor]
    ) -> Tuple[torch.Tensor, Dict[str, float]]:
        """Compute the loss here: summed over the datums, with metrics summed or averaged."""
        if not data or len(data) != len(logprobs):
            raise InvalidInputError(f"{len(data)} data with {len(logprobs)} rows of logprobs")
        results = [self._one(datum, row) for datum, row in zip(data, logprobs)]
        total = results[0][0]
        for loss, _ in results[1:]:
            total = total + loss
        sums: Dict[str, float] = {}
        for _, metrics in results:
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + _number(value)
        count = len(results)
        return total, {n: v / count if n.endswith(":mean") else v for n, v in sums.items()}

    def _one(self, datum: Datum, row: torch.Tensor) -> Tuple[torch.Tensor, Mapping[str, Any]]:
        tensors = []
        # *row* is the argument for the first parameter, `logprobs`.
        for entry in self.inputs[1:]:
            tensor = datum.loss_fn_inputs[entry.name].to_torch()
            tensors.append(tensor.reshape(()) if entry.rank == 0 else tensor)
        loss, metrics = self._fn(row, *tensors)
        shape = getattr(loss, "shape", None)
        if shape is None or math.prod(shape) != 1:
            what = type(loss).__name__ if shape is None else f"tensor of shape {tuple(shape)}"
            raise InvalidInputError(
                f"the loss {self.name!r} returned a {what}; it must be a scalar tensor"
            )
        return loss.reshape(()), metrics

    def __repr__(self) -> str:
        where = f"at the server as {self.loss_id}" if self.loss_id else "computed here"
        return f"<LossHandle {self.name}, {where}>"


def require_torch(what: str) -> None:
    """Raise ConfigError if torch is not installed; the message names *what* needs it."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{what} needs torch, which is not installed",
            hint='python -m pip install "tinkex[torch]"',
        ) from error


def check_custom_batch(data: Sequence[Datum], loss_fn: CustomLoss) -> None:
    """Raise unless *loss_fn* can be computed here for *data*.

    Raises:
        ConfigError: torch is not installed.
        InvalidInputError: a datum lacks target tokens, or an input that a `LossHandle` needs.
    """
    if not callable(loss_fn):
        raise InvalidInputError(
            f"the custom loss is {a_type(loss_fn)}, not a function",
            hint="forward_backward takes the name of a loss of the server.",
        )
    require_torch("forward_backward_custom")
    for index, datum in enumerate(data):
        if "target_tokens" not in datum.loss_fn_inputs:
            raise InvalidInputError(f"data[{index}] has no loss input 'target_tokens'")
    if isinstance(loss_fn, LossHandle):
        loss_fn.check(data)


def forward_data(data: Sequence[Datum]) -> List[Datum]:
    """Return the batch of the first pass, for the logprobs: only target tokens and weights."""
    forward: List[Datum] = []
    for datum in data:
        weights = datum.loss_fn_inputs.get("weights")
        if weights is None:  # zeros, because the loss of this pass is not used
            shape = datum.loss_fn_inputs["target_tokens"].shape
            weights = TensorData(np.zeros(shape, np.float32))
        forward.append(_weighted(datum, weights))
    return forward


def gradient_data(
    data: Sequence[Datum], output: ForwardBackwardOutput, loss_fn: CustomLoss
) -> Tuple[List[Datum], Dict[str, Any]]:
    """Compute the loss; return the batch of the second pass, and the user's metrics.

    Raises:
        InvalidInputError: the loss is not a scalar or does not depend on the logprobs, its gradient
            is not finite, or *loss_fn* tries to end the program.
    """
    import torch

    # Copied, because the rows are views of the result, and a loss might change them in place.
    leaves = [torch.from_numpy(row.copy()).requires_grad_() for row in _logprobs(data, output)]
    try:
        returned = loss_fn(data, leaves)
    except Exception:
        raise
    except BaseException as error:  # e.g. SystemExit, which would end the queue's thread
        raise InvalidInputError(f"the custom loss raised {error!r}") from error
    loss, metrics = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise InvalidInputError(
            "a custom loss must return a scalar tensor computed from the logprobs, and metrics",
            hint="Do not detach the logprobs or convert them to numbers on the way.",
        )
    # Converted before anything is added to the run's gradient, because the conversion may fail.
    reported = {**_metrics(metrics or {}), "loss:sum": float(loss.detach())}
    # Only with respect to the leaves: backward() would also fill .grad of the user's own tensors.
    gradients = torch.autograd.grad(loss.reshape(()), leaves, allow_unused=True)
    weighted: List[Datum] = []
    for datum, leaf, gradient in zip(data, leaves, gradients):
        # cross_entropy minimizes -sum(weights * logprobs), hence the minus sign.  The gradient is
        # None if the loss does not depend on the datum.
        weights = np.zeros(leaf.shape) if gradient is None else -gradient.numpy()
        if not np.isfinite(weights).all():
            raise InvalidInputError(
                "the gradient of the custom loss is not finite",
                hint=None
                if bool(torch.isfinite(leaf).all())
                else "The server's logprobs are not: are there token ids beyond the vocabulary?",
            )
        weighted.append(_weighted(datum, TensorData.from_numpy(weights.astype(np.float32))))
    return weighted, reported


def run_custom_pass(
    future: APIFuture[ForwardBackwardOutput],
    run: TrainingRun,
    data: List[Datum],
    loss_fn: CustomLoss,
    breaks: Sequence[int] = (),
) -> None:
    """Compute *loss_fn* of *data*, and settle *future*; a task for the queue of *run*.

    *breaks* are the indices, in ascending order, at which a new part of the batch begins.  Each
    part has its own requests and its own call of *loss_fn*.

    If the call fails or is cancelled before the backward pass, the run is unchanged.  The backward
    pass works as for any batch: see `TrainingRun.send_gradient`.
    """
    if not future.begin():  # cancelled while it was queued
        return
    # Both passes run in one task of the queue's thread: a request between them might change the
    # weights that the logprobs were computed with.
    run.ensure_trainable()
    # The forward pass has its own future.  If *future* still counted as unsent, cancelling it
    # during that pass would use none of the budget.
    future.enter("submitting")
    surrogate = Loss("cross_entropy")
    output = run.run_pass("forward", forward_data(data), surrogate, breaks)
    weighted, metrics = _gradient_of_parts(data, output, loss_fn, breaks)
    if future.done():
        return  # cancelled: the gradient must not be added
    run.send_gradient(future, weighted, surrogate, functools.partial(_join, metrics), breaks)


def _gradient_of_parts(
    data: Sequence[Datum],
    output: ForwardBackwardOutput,
    loss_fn: CustomLoss,
    breaks: Sequence[int],
) -> Tuple[List[Datum], Dict[str, Any]]:
    """Like `gradient_data`, but call *loss_fn* once for each part, and combine the metrics."""
    if not breaks:
        return gradient_data(data, output, loss_fn)
    weighted: List[Datum] = []
    reported: List[ForwardBackwardOutput] = []
    for start, stop in zip([0, *breaks], [*breaks, len(data)]):
        outputs = output.loss_fn_outputs[start:stop]
        part, metrics = gradient_data(data[start:stop], ForwardBackwardOutput(outputs, {}), loss_fn)
        weighted += part
        # Wrapped as results of passes, so that `combine` joins the metrics by their reductions, and
        # weights means by the number of datums.
        reported.append(ForwardBackwardOutput(outputs, metrics))
    return weighted, dict(combine(reported).metrics)


def _join(
    metrics: Mapping[str, Any], outputs: List[ForwardBackwardOutput]
) -> ForwardBackwardOutput:
    """Return the server's outputs with the user's metrics; rename the server's own loss."""
    output = combine(outputs)
    merged: Dict[str, Any] = dict(output.metrics)
    # It is the surrogate's loss, which equals the user's loss in gradient but not in value.
    if "loss:sum" in merged:
        merged["surrogate_loss:sum"] = merged.pop("loss:sum")
    merged.update(metrics)
    return ForwardBackwardOutput(output.loss_fn_outputs, merged, output.loss_fn_output_type)


def _number(value: Any) -> float:
    # torch warns if a number is taken from a tensor that has a gradient.
    return float(value.detach() if hasattr(value, "detach") else value)


def _metrics(metrics: Any) -> Dict[str, Any]:
    if not isinstance(metrics, Mapping):
        raise InvalidInputError(
            f"the metrics of a custom loss are {a_type(metrics)}; they must be a dict"
        )
    return {str(name): _metric(value) for name, value in metrics.items()}


def _metric(value: Any) -> Any:
    """Return *value* as a float if it is a number or a one-element tensor; else unchanged."""
    if hasattr(value, "detach"):
        value = value.detach()  # the result must not keep the graph alive
    if isinstance(value, (str, bytes, bytearray)):  # float() would parse them
        return value
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return value


def _logprobs(data: Sequence[Datum], output: ForwardBackwardOutput) -> List[Any]:
    """Return the logprobs as float32 arrays, each with the shape of its datum's target tokens."""
    outputs = output.loss_fn_outputs
    if len(outputs) != len(data) or not all("logprobs" in fields for fields in outputs):
        raise ResponseDecodeError(
            f"the forward pass of a custom loss returned logprobs for "
            f"{sum('logprobs' in fields for fields in outputs)} of {len(data)} data"
        )
    rows = []
    for index, (datum, fields) in enumerate(zip(data, outputs)):
        row = fields["logprobs"]._dense().astype(np.float32, copy=False)
        shape = datum.loss_fn_inputs["target_tokens"].shape
        if row.size != np.prod(shape, dtype=np.int64):
            raise ResponseDecodeError(
                f"the forward pass of a custom loss returned logprobs of shape {row.shape} "
                f"for data[{index}], whose target_tokens have shape {tuple(shape)}"
            )
        rows.append(row.reshape(shape))
    return rows


def _weighted(datum: Datum, weights: TensorData) -> Datum:
    inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": weights}
    return Datum(datum.model_input, inputs, datum.model_input_spans, datum.loss_fn_input_spans)
