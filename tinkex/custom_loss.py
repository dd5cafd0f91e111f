"""Custom losses: the loss is computed here with torch, only its gradient goes to the server.

The gradient of any function of the logprobs is the gradient of sum(-weights * logprobs) with
weights = -d loss / d logprobs, which is what cross_entropy trains on (reference, section 3.5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np

from tinkex.errors import ConfigError, InvalidInputError, ResponseDecodeError
from tinkex.types import Datum, ForwardBackwardOutput, TensorData

if TYPE_CHECKING:
    import torch

#: ``loss(data, logprobs)`` -> a scalar tensor and metrics; logprobs[i] is float32 of the shape
#: of data[i]'s target_tokens.
CustomLoss = Callable[
    [Sequence[Datum], "List[torch.Tensor]"], "Tuple[torch.Tensor, Mapping[str, float]]"
]


def check_custom_batch(data: Sequence[Datum]) -> None:
    """Raise unless torch is there and every datum has ``target_tokens``.

    Raises:
        ConfigError: torch is not installed.
        InvalidInputError: a datum has no target tokens.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "forward_backward_custom needs torch, which is not installed",
            hint='python -m pip install "tinkex[torch]"',
        ) from error
    for index, datum in enumerate(data):
        if "target_tokens" not in datum.loss_fn_inputs:
            raise InvalidInputError(f"data[{index}] has no loss input 'target_tokens'")


def forward_data(data: Sequence[Datum]) -> List[Datum]:
    """The batch of the first pass, which only asks for logprobs: its weights do not matter."""
    return [
        _weighted(datum, np.zeros(datum.loss_fn_inputs["target_tokens"].shape)) for datum in data
    ]


def gradient_data(
    data: Sequence[Datum], output: ForwardBackwardOutput, loss_fn: CustomLoss
) -> Tuple[List[Datum], Dict[str, float]]:
    """Compute the loss and return the batch of the second pass, and the user's metrics.

    Raises:
        InvalidInputError: the loss is no scalar, or does not depend on the logprobs.
    """
    import torch

    outputs = output.loss_fn_outputs
    if len(outputs) != len(data) or not all("logprobs" in fields for fields in outputs):
        raise ResponseDecodeError(
            f"the forward pass of a custom loss returned logprobs for "
            f"{sum('logprobs' in fields for fields in outputs)} of {len(data)} data"
        )
    leaves = [
        torch.from_numpy(np.array(fields["logprobs"].to_numpy(), dtype=np.float32)).requires_grad_()
        for fields in outputs
    ]
    returned = loss_fn(data, leaves)
    loss, metrics = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise InvalidInputError(
            "a custom loss must return a scalar tensor computed from the logprobs, and metrics",
            hint="Do not detach the logprobs or convert them to numbers on the way.",
        )
    gradients = torch.autograd.grad(loss.reshape(()), leaves, allow_unused=True)
    weighted: List[Datum] = []
    for datum, leaf, gradient in zip(data, leaves, gradients):
        weights = np.zeros(leaf.shape) if gradient is None else -gradient.numpy()
        if not np.isfinite(weights).all():
            raise InvalidInputError("the gradient of the custom loss is not finite")
        weighted.append(_weighted(datum, weights))
    return weighted, {**(metrics or {}), "loss:sum": float(loss.detach())}


def merge_metrics(
    output: ForwardBackwardOutput, metrics: Mapping[str, float]
) -> ForwardBackwardOutput:
    """The server's output with the user's metrics; the server's loss becomes surrogate_loss."""
    merged: Dict[str, Any] = dict(output.metrics)
    if "loss:sum" in merged:
        merged["surrogate_loss:sum"] = merged.pop("loss:sum")
    merged.update({name: float(value) for name, value in metrics.items()})
    return ForwardBackwardOutput(output.loss_fn_outputs, merged, output.loss_fn_output_type)


def _weighted(datum: Datum, weights: Any) -> Datum:
    inputs = {
        "target_tokens": datum.loss_fn_inputs["target_tokens"],
        "weights": TensorData.from_numpy(np.asarray(weights, dtype=np.float32)),
    }
    return Datum(datum.model_input, inputs)
