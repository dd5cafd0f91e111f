"""The losses of the Tinker API (docs/protocol.md, "Losses"), per token, as tensor expressions.

Elementwise over the tokens of a batch: ``lp`` is the log-probability that the trained model gives
to the target token, ``q`` the one that the sampler recorded (input ``logprobs``), ``A`` the
advantage, ``r = exp(lp - q)``.  A loss is the plain sum over tokens: nothing is averaged, so that
gradients of several calls add up.  A token of weight 0, or of advantage 0 (except in dro, whose
second term stays), adds no loss and no gradient, whatever its log-probabilities are.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Mapping, Tuple

import torch

from tinkex.local.engines.inputs import CLIP_HIGH, CLIP_LOW, LOSSES

Inputs = Mapping[str, torch.Tensor]
Config = Mapping[str, float]

#: A further input of losses that read the ratio of the sequence: log s of the token's sequence.
SEQUENCE_LOG_RATIO = "sequence_log_ratio"

# The largest exponent whose exponential float32 can hold.
_LARGEST_EXPONENT = 88.0


def _ratio(exponent: torch.Tensor, bounded: torch.Tensor) -> torch.Tensor:
    """Return exp(exponent), kept finite where *bounded*.

    If a factor of 0 or a clip removes a ratio from the loss, its gradient is 0, but backward
    computes it as 0 times the ratio, which is NaN if the ratio is infinite.
    """
    return torch.exp(torch.where(bounded, exponent.clamp(max=_LARGEST_EXPONENT), exponent))


def _cross_entropy(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    return -lp * inputs["weights"]


# The policy gradient (Williams 1992, REINFORCE), with the correction for tokens that were sampled
# from another policy: -r * A.
def _importance_sampling(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    advantages = inputs["advantages"]
    return -_ratio(lp - inputs["logprobs"], advantages == 0) * advantages


# The clipped surrogate of Schulman et al. (arXiv 1707.06347, eq. 7): -min(r * A, clip(r) * A).
def _ppo(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    return _clipped(lp - inputs["logprobs"], inputs)


# Group Sequence Policy Optimization (arXiv 2507.18071) in its token form, GSPO-token: the same
# surrogate with the ratio of the sequence in place of the token's, s = exp(sum(m * (lp - q)) /
# sum(m)), where m is the sequence_ratio_mask.  If all tokens have the same advantage, the gradient
# equals the sequence form's gradient times the number of tokens.
def _gspo(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    # log s is a constant here.  lp - lp.detach() is 0 but has the gradient of lp, so the ratio is s
    # and its gradient with respect to lp is s (GSPO-token: sg[s] * pi / sg[pi]).
    return _clipped(inputs[SEQUENCE_LOG_RATIO] + (lp - lp.detach()), inputs)


def _clipped(exponent: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Return the clipped surrogate of the ratio exp(exponent)."""
    advantages = inputs["advantages"]
    # If the advantage is negative, the minimum is the unclipped term, however large: an infinite
    # loss is then right, and the engine refuses the batch.  Otherwise the clip bounds the loss.
    ratio = _ratio(exponent, advantages >= 0)
    clipped = torch.clamp(ratio, inputs[CLIP_LOW], inputs[CLIP_HIGH])
    return -torch.minimum(ratio * advantages, clipped * advantages)


# MiniMax-M1's (arXiv 2506.13585, eq. 4): -stopgrad(clip(r)) * A * lp.
def _cispo(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    # Detached: the clipped ratio only weights the policy gradient, which flows through lp alone.
    # An infinite ratio needs no bound, since no gradient flows through it.
    ratio = torch.exp(lp.detach() - inputs["logprobs"])
    clipped = torch.clamp(ratio, inputs[CLIP_LOW], inputs[CLIP_HIGH])
    return -clipped * inputs["advantages"] * lp


# Direct Reward Optimisation (Richemond et al., arXiv 2405.19107), per token.
def _dro(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    drift = lp - inputs["logprobs"]
    return -(lp * inputs["advantages"] - 0.5 * config["beta"] * drift * drift)


_PER_TOKEN: Dict[str, Callable[[torch.Tensor, Inputs, Config], torch.Tensor]] = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "gspo": _gspo,
    "dro": _dro,
}


def token_losses(loss_fn: str, lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """Return the loss of each token, float32, in the shape of *lp* and of all *inputs*."""
    losses = _PER_TOKEN[loss_fn](lp, inputs, config)
    gate = LOSSES[loss_fn].gate
    # Filled, not multiplied: 0 times an infinite log-probability is NaN.
    return losses if gate is None else losses.masked_fill(inputs[gate] == 0, 0.0)


class _TargetLogprobs(torch.autograd.Function):  # type: ignore[misc]  # torch is Any to mypy
    """log_softmax and gather in one, with a single logits-sized buffer that becomes the gradient.

    torch's own two functions would need three: the output of the first, and a gradient for each.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logprobs = torch.log_softmax(logits, dim=-1)
        ctx.logprobs, ctx.targets = logprobs, targets
        return logprobs.gather(-1, targets)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Tuple[torch.Tensor, None]:
        # d lp_k / d logits = onehot(target_k) - softmax, summed over the k targets of a row.
        # In place: log_softmax becomes softmax, then the gradient.
        (grad,) = grads
        gradient = ctx.logprobs.exp_().mul_(-grad.sum(-1, keepdim=True))
        # Added, not assigned, because the k targets of a row may name one token twice.
        gradient.scatter_add_(-1, ctx.targets, grad)
        ctx.logprobs = ctx.targets = None
        return gradient, None


def target_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities (n, k) of int64 *targets* (n, k) under *logits* (n, v).

    Differentiable once: the backward pass uses up the buffer it keeps.
    """
    if not torch.is_grad_enabled():
        # This way needs no buffer of normalized logits.
        return logits.gather(-1, targets) - torch.logsumexp(logits, -1, keepdim=True)
    result: torch.Tensor = _TargetLogprobs.apply(logits, targets)
    return result
