"""AdamW for one adapter (Kingma & Ba, arXiv 1412.6980; decoupled decay: arXiv 1711.05101).

Written here rather than taken from torch.optim, because the hyperparameters come with each step,
and because constructing a torch optimizer imports torch._dynamo (1-2 s at the first step).
"""

from __future__ import annotations

import math
from typing import Dict, List, Mapping

import torch

from tinkex.types import AdamParams


class Adam:
    """The optimizer state of one adapter: a step count and two running averages per parameter.

    Gradients are read from ``parameter.grad``.  A missing gradient counts as zero, so a step
    without a pass before it still moves the parameters by momentum and decay.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._names = list(parameters)
        self._parameters: List[torch.Tensor] = list(parameters.values())
        self.step_count = 0
        self._mean = [torch.zeros_like(p, requires_grad=False) for p in self._parameters]
        self._square = [torch.zeros_like(p, requires_grad=False) for p in self._parameters]

    def step(self, params: AdamParams) -> Dict[str, float]:
        """Update the parameters once and clear the gradients.

        Return ``grad_norm`` (the global 2-norm before clipping) and ``step`` (the number of steps
        so far, including this one).
        """
        rate, beta1, beta2 = params.learning_rate, params.beta1, params.beta2
        # The _foreach functions take all parameters in one call: an adapter has hundreds of small
        # matrices, and a call for each would cost more than its arithmetic.
        with torch.no_grad():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
            norm = global_norm(grads)
            # 0 turns clipping off (docs/protocol.md, "Optimizer steps").  Exact, unlike torch's
            # clip_grad_norm_, which adds 1e-6 to the norm; in place, since the gradients are
            # dropped below.
            if 0 < params.grad_clip_norm < norm:
                torch._foreach_mul_(grads, params.grad_clip_norm / norm)
            self.step_count += 1
            # Decoupled: the decay acts on the parameters before the update, and stays out of the
            # averages.  The operations run in torch.optim.AdamW's order, so that the results equal
            # torch's.
            if params.weight_decay:
                torch._foreach_mul_(self._parameters, 1 - rate * params.weight_decay)
            torch._foreach_lerp_(self._mean, grads, 1 - beta1)
            torch._foreach_mul_(self._square, beta2)
            torch._foreach_addcmul_(self._square, grads, grads, 1 - beta2)
            # The averages start at zero; dividing by 1 - beta**t removes that bias.  eps is added
            # to the root of the corrected average, as in the paper, so that it is not magnified.
            denominator = torch._foreach_sqrt(self._square)
            torch._foreach_div_(denominator, math.sqrt(1 - beta2**self.step_count))
            torch._foreach_add_(denominator, params.eps)
            step_size = rate / (1 - beta1**self.step_count)
            torch._foreach_addcdiv_(self._parameters, self._mean, denominator, -step_size)
            # None rather than zeros: this frees the memory, and the next pass can assign its
            # gradient.
            for parameter in self._parameters:
                parameter.grad = None
        return {"grad_norm": norm, "step": float(self.step_count)}

    def tensors(self) -> Dict[str, torch.Tensor]:
        """Return the running averages: ``exp_avg.<parameter>`` and ``exp_avg_sq.<parameter>``."""
        named = {f"exp_avg.{name}": value for name, value in zip(self._names, self._mean)}
        named.update({f"exp_avg_sq.{name}": v for name, v in zip(self._names, self._square)})
        return named

    def restore(self, tensors: Mapping[str, torch.Tensor], step_count: int) -> None:
        """Restore the state that `tensors` returned (same names and shapes)."""
        for name, value in self.tensors().items():
            value.copy_(tensors[name])
        self.step_count = step_count


def global_norm(tensors: List[torch.Tensor]) -> float:
    """Return the 2-norm of all *tensors* taken together."""
    if not tensors:  # torch.stack takes no empty list
        return 0.0
    # The norm of the tensors' norms, which needs no concatenation.
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))))
