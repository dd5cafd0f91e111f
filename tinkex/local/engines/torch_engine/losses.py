"""The losses of the Tinker API, per token, as plain tensor expressions.

Notation, elementwise over the tokens of a batch: ``lp`` is the log-probability the trained model
gives the target token, ``q`` the one the sampler recorded (input ``logprobs``), ``A`` the
advantage, ``w`` the weight, ``r = exp(lp - q)``.  A loss is the plain sum over tokens; nothing is
averaged, so gradients of several calls add up.

=====================  =============================================================
cross_entropy          ``-lp * w``
importance_sampling    ``-r * A``
ppo                    ``-min(r * A, clip(r, low, high) * A)``
cispo                  ``-stopgrad(clip(r, low, high)) * A * lp``
gspo                   ``-min(s * A, clip(s, low, high) * A)``
dro                    ``-(lp * A - beta / 2 * (lp - q)**2)``
=====================  =============================================================

``s`` is the ratio of the sequence, ``exp(sum(m * (lp - q)) / sum(m))`` over all tokens of the
datum, with ``m`` the input ``sequence_ratio_mask`` (1 by default).  Its gradient by ``lp`` is ``s``
(GSPO-token).

``low`` and ``high`` default to 0.8 and 1.2, for gspo to 0.9997 and 1.0004; the configuration keys
``clip_low_threshold`` and ``clip_high_threshold`` change them for a call, per-token inputs of the
same names for a token.  ``beta`` defaults to 0.05.  A token of weight 0, or of advantage 0 (except
in dro, whose second term stays), adds no loss and no gradient, whatever its log-probabilities are.

Sources: names, inputs and the token-sum form follow Tinker's documentation of its losses.
importance_sampling is the policy gradient (Williams 1992, REINFORCE) with the correction for
sampling from another policy; ppo is the clipped surrogate of Schulman et al.
(arXiv 1707.06347, eq. 7); cispo is MiniMax-M1's (arXiv 2506.13585, eq. 4); gspo is Group
Sequence Policy Optimization (arXiv 2507.18071) in its token form, GSPO-token, with the clipping
range of the paper's experiments: if all tokens have the same advantage, the gradient is that of the
sequence form times the number of tokens; dro is the per-token form of Direct Reward Optimisation
(Richemond et al., arXiv 2405.19107).
"""

from __future__ import annotations

import dataclasses
from typing import Callable, Dict, Mapping, Optional, Tuple

import torch

Inputs = Mapping[str, torch.Tensor]
Config = Mapping[str, float]

CLIP_LOW = "clip_low_threshold"
CLIP_HIGH = "clip_high_threshold"
SEQUENCE_MASK = "sequence_ratio_mask"

#: Among the inputs of a loss that is `Loss.by_sequence`: log s of the sequence that a token is in.
SEQUENCE_LOG_RATIO = "sequence_log_ratio"


@dataclasses.dataclass(frozen=True)
class Loss:
    """One loss: its formula, and what it reads.

    Attributes:
        per_token: ``(lp, inputs, config) -> loss of each token``, all of one shape, float32.
        required: per-token inputs besides ``target_tokens`` that must be given.
        defaults: per-token inputs that may be left out, and what they are then: the
            configuration key of the same name if it is given, else this value.
        config: configuration keys, and their defaults.
        gate: the input whose zeros take a token out (no loss, no gradient), if there is one;
            apply it with `Loss.of`, since 0 times an infinite log-probability is not 0.
        ranks: how many dimensions ``target_tokens`` may have.
        by_sequence: it reads SEQUENCE_LOG_RATIO, which takes the log-probabilities of all tokens
            of a datum.
    """

    per_token: Callable[[torch.Tensor, Inputs, Config], torch.Tensor]
    required: Tuple[str, ...]
    defaults: Mapping[str, float]
    config: Mapping[str, float]
    gate: Optional[str] = None
    ranks: Tuple[int, ...] = (1,)
    by_sequence: bool = False

    @property
    def inputs(self) -> Tuple[str, ...]:
        """Every per-token input besides ``target_tokens``."""
        return (*self.required, *self.defaults)

    def of(self, lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
        """Return the loss of each token, in the shape of *lp*."""
        losses = self.per_token(lp, inputs, config)
        return losses if self.gate is None else losses.masked_fill(inputs[self.gate] == 0, 0.0)


# The largest exponent whose exponential float32 can hold.
_LARGEST_EXPONENT = 88.0


def _ratio(exponent: torch.Tensor, bounded: torch.Tensor) -> torch.Tensor:
    """Return exp(exponent), kept finite where *bounded*.

    A ratio that a factor of 0 or a clip takes out of the loss has a gradient of 0, but backward
    computes it as 0 times the ratio, which is NaN if the ratio is infinite.
    """
    return torch.exp(torch.where(bounded, exponent.clamp(max=_LARGEST_EXPONENT), exponent))


def _cross_entropy(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    return -lp * inputs["weights"]


def _importance_sampling(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    advantages = inputs["advantages"]
    return -_ratio(lp - inputs["logprobs"], advantages == 0) * advantages


def _ppo(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    return _clipped(lp - inputs["logprobs"], inputs)


def _gspo(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    # lp - lp is 0 and has the gradient of lp.
    return _clipped(inputs[SEQUENCE_LOG_RATIO] + (lp - lp.detach()), inputs)


def _clipped(exponent: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Return the clipped surrogate of the ratio exp(exponent)."""
    advantages = inputs["advantages"]
    # With a negative advantage a large ratio is not clipped: there infinity is the right value.
    ratio = _ratio(exponent, advantages >= 0)
    clipped = torch.clamp(ratio, inputs[CLIP_LOW], inputs[CLIP_HIGH])
    return -torch.minimum(ratio * advantages, clipped * advantages)


def _cispo(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    ratio = torch.exp(lp.detach() - inputs["logprobs"])
    clipped = torch.clamp(ratio, inputs[CLIP_LOW], inputs[CLIP_HIGH])
    return -clipped * inputs["advantages"] * lp


def _dro(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    drift = lp - inputs["logprobs"]
    return -(lp * inputs["advantages"] - 0.5 * config["beta"] * drift * drift)


_SAMPLED = ("logprobs", "advantages")
_CLIP = {CLIP_LOW: 0.8, CLIP_HIGH: 1.2}
_SEQUENCE_CLIP = {CLIP_LOW: 1 - 3e-4, CLIP_HIGH: 1 + 4e-4}

LOSS_TABLE: Dict[str, Loss] = {
    "cross_entropy": Loss(_cross_entropy, (), {"weights": 1.0}, {}, "weights", (1, 2)),
    "importance_sampling": Loss(_importance_sampling, _SAMPLED, {}, {}, "advantages"),
    "ppo": Loss(_ppo, _SAMPLED, _CLIP, _CLIP, "advantages"),
    "cispo": Loss(_cispo, _SAMPLED, _CLIP, _CLIP, "advantages"),
    "gspo": Loss(
        _gspo,
        _SAMPLED,
        {**_SEQUENCE_CLIP, SEQUENCE_MASK: 1.0},
        _SEQUENCE_CLIP,
        "advantages",
        by_sequence=True,
    ),
    "dro": Loss(_dro, _SAMPLED, {}, {"beta": 0.05}),
}
