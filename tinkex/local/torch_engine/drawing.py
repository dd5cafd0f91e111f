"""Drawing tokens from logits: temperature, top-k, top-p, by one uniform number per row."""

from __future__ import annotations

from typing import List, Sequence, Tuple

import torch

from tinkex.types import SamplingParams


def draw(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> Tuple[List[int], List[float]]:
    """Draw one token per row of float32 *logits* (n, v).

    ``uniforms[i]`` in [0, 1) decides row i, by inverting the cumulative distribution, so a row
    depends on nothing but its own logits, parameters and number.  Temperature 0 takes the
    likeliest.  Returns the tokens, and their log-probabilities under the logits as they are:
    temperature 1, nothing cut off.
    """
    tokens = logits.argmax(-1)
    random_rows = [row for row, p in enumerate(params) if p.temperature > 0]
    if random_rows:
        index = torch.tensor(random_rows, device=logits.device)
        chosen = [params[row] for row in random_rows]
        numbers = [uniforms[row] for row in random_rows]
        scaled = logits if len(index) == len(logits) else logits[index]
        tokens[index] = _invert(_truncated(scaled, chosen), numbers)
    picked = logits.gather(-1, tokens[:, None]).squeeze(-1)
    logprobs = picked - torch.logsumexp(logits, -1)
    return tokens.tolist(), logprobs.tolist()


def _truncated(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Probabilities after temperature, then top-k, then top-p (renormalizing is left out)."""
    temperatures = torch.tensor([p.temperature for p in params], device=logits.device)
    # Shifted first, so that a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperatures[:, None]
    for row, p in enumerate(params):
        if 0 < p.top_k < scaled.shape[-1]:
            kept, where = torch.topk(scaled[row], p.top_k)
            scaled[row] = torch.full_like(scaled[row], -torch.inf).scatter(0, where, kept)
    probabilities = torch.softmax(scaled, -1)
    for row, p in enumerate(params):
        if p.top_p < 1:
            probabilities[row] = _nucleus(probabilities[row], p.top_p)
    return probabilities


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the smallest set of likeliest tokens whose probability reaches *top_p*."""
    size = len(probabilities)
    # The nucleus is nearly always small; sorting the whole vocabulary is the slow way.
    for count in (min(256, size), size):
        values, where = torch.topk(probabilities, count)
        before = values.double().cumsum(0) - values  # mass of the likelier ones
        if count == size or float(before[-1]) >= top_p:
            break
    kept = torch.where(before < top_p, values, torch.zeros_like(values))
    return torch.zeros_like(probabilities).scatter(0, where, kept)


def _invert(probabilities: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=probabilities.device)
    targets = numbers[:, None] * cumulative[:, -1:]
    # right=True: the first entry above the target; entries of probability zero never are.
    drawn = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    # Rounding may push a target onto the total; then the last possible token is meant.
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum(drawn, last)
