"""Drawing tokens from logits: temperature, top-k, top-p, by one uniform number per row."""

from __future__ import annotations

from typing import List, Sequence, Tuple

import torch

from tinkex.types import SamplingParams

# Temperatures that float32 holds: logits divided by 0 or infinity make 0/0 or infinity/infinity,
# NaN.
_LOWEST_TEMPERATURE = torch.finfo(torch.float32).tiny
_HIGHEST_TEMPERATURE = torch.finfo(torch.float32).max


def draw(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> Tuple[List[int], List[float]]:
    """Draw one token per row of float32 *logits* (n, v).

    ``uniforms[i]`` in [0, 1) decides row i, by inverting the cumulative distribution, so a row
    depends on nothing but its own logits, parameters and number.  Temperature 0, or one that is 0
    in float32, takes the likeliest.  Returns the tokens, and their log-probabilities under the
    logits as they are: temperature 1, nothing cut off.
    """
    normalizer = torch.logsumexp(logits, -1, keepdim=True)
    # A batch mixes requests of all kinds; each kind is computed for its rows alone.
    greedy = [row for row, p in enumerate(params) if p.temperature < _LOWEST_TEMPERATURE]
    # Most requests ask for the model's own distribution; the normalizer is all that takes.
    plain = [row for row, p in enumerate(params) if p.temperature == 1 and not _cuts(p)]
    shaped = sorted(set(range(len(params))) - {*greedy, *plain})
    tokens = torch.zeros(len(params), dtype=torch.long, device=logits.device)
    if greedy:
        tokens[greedy] = _rows(logits, greedy).argmax(-1)
    if plain:
        probabilities = torch.exp(_rows(logits, plain) - _rows(normalizer, plain))
        tokens[plain] = _invert(probabilities, [uniforms[row] for row in plain])
    if shaped:
        probabilities = _shaped(_rows(logits, shaped), [params[row] for row in shaped])
        tokens[shaped] = _invert(probabilities, [uniforms[row] for row in shaped])
    # Of the model itself, not of what was drawn from (docs/protocol.md, "Sample results"): training
    # needs them as q.
    logprobs = (logits.gather(-1, tokens[:, None]) - normalizer).squeeze(-1)
    return tokens.tolist(), logprobs.tolist()


def _cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _rows(values: torch.Tensor, rows: List[int]) -> torch.Tensor:
    # Indexing copies, (rows, vocabulary); all rows need none.
    return values if len(rows) == len(values) else values[rows]


def _shaped(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Probabilities after temperature, then top-k, then top-p (renormalizing is left out)."""
    temperatures = torch.tensor(
        [min(p.temperature, _HIGHEST_TEMPERATURE) for p in params], device=logits.device
    )
    # Shifted first: the largest is then 0 at any temperature, and cannot overflow.  This makes a
    # copy, in which top-k can be written.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperatures[:, None]
    for row, p in enumerate(params):
        if 0 < p.top_k < scaled.shape[-1]:
            # By places, not by a threshold, which would keep more than k where logits are equal.
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
    # The nucleus is nearly always small; sorting the entire vocabulary is the slow way.
    for count in (min(256, size), size):
        values, where = torch.topk(probabilities, count)
        # The mass of the likelier ones: the token that reaches top_p is still in, so that one is
        # left whatever top_p is.  In float64, as rounding adds up over a vocabulary.
        before = values.double().cumsum(0) - values
        if count == size or float(before[-1]) >= top_p:
            break
    kept = torch.where(before < top_p, values, torch.zeros_like(values))
    return torch.zeros_like(probabilities).scatter(0, where, kept)


def _invert(probabilities: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """Return the token (n,) at which the cumulative distribution of each row passes its uniform."""
    # float64: in float32, steps of the sum would be lost beside it, and with them rare tokens.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=probabilities.device)
    # Scaled by the sum, which is below 1 after top-p, instead of normalizing the probabilities.
    total = cumulative[:, -1:].contiguous()
    # right=True: the first entry above the target; entries of probability zero never are.
    drawn = torch.searchsorted(cumulative, numbers[:, None] * total, right=True)
    # Rounding may push a target onto the total; then the last possible token is meant, which is
    # the first to reach it.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(drawn, last).squeeze(-1)
