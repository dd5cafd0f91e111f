"""Draws tokens from logits with temperature, top-k and top-p, by one uniform number per row."""

from __future__ import annotations

from typing import List, Sequence, Tuple

import torch

from tinkex.types import SamplingParams

# The temperatures that float32 can hold: dividing logits by 0 or infinity would make 0/0 or
# infinity/infinity, which is NaN.
_LOWEST_TEMPERATURE = torch.finfo(torch.float32).tiny
_HIGHEST_TEMPERATURE = torch.finfo(torch.float32).max


def draw(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> Tuple[List[int], List[float]]:
    """Draw one token per row of float32 *logits* (n, v).

    ``uniforms[i]`` in [0, 1) decides row i, by inverting the cumulative distribution, so a row
    depends only on its own logits, parameters and number.  Temperature 0, or one too small for
    float32, takes the likeliest token.  Returns the tokens, and their log-probabilities under the
    original logits: at temperature 1, with nothing cut off.
    """
    normalizer = torch.logsumexp(logits, -1, keepdim=True)
    # A batch mixes requests of all kinds; each kind is computed only for its own rows.
    greedy = [row for row, p in enumerate(params) if p.temperature < _LOWEST_TEMPERATURE]
    # Most requests ask for the model's own distribution, which takes only the normalizer.
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
    # Log-probabilities of the model itself, not of the distribution drawn from (docs/protocol.md,
    # "Sample results"): training needs them as q.
    logprobs = (logits.gather(-1, tokens[:, None]) - normalizer).squeeze(-1)
    return tokens.tolist(), logprobs.tolist()


def _cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _rows(values: torch.Tensor, rows: List[int]) -> torch.Tensor:
    # Indexing copies a (rows, vocabulary) tensor; skip that if all rows are wanted.
    return values if len(rows) == len(values) else values[rows]


def _shaped(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Return the probabilities after temperature, then top-k, then top-p; not renormalized."""
    temperatures = torch.tensor(
        [min(p.temperature, _HIGHEST_TEMPERATURE) for p in params], device=logits.device
    )
    # Shifted first: the largest logit is then 0 at any temperature, and cannot overflow.  This also
    # makes a copy, which top-k below may write to.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperatures[:, None]
    for row, p in enumerate(params):
        if 0 < p.top_k < scaled.shape[-1]:
            # Chosen by index, not by a threshold, which would keep more than k if logits are equal.
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
    # The nucleus is nearly always small, and sorting the entire vocabulary is slow.
    for count in (min(256, size), size):
        values, where = torch.topk(probabilities, count)
        # The mass of all likelier tokens: the token that reaches top_p is kept, so at least one is
        # left whatever top_p is.  In float64, since rounding errors add up over a vocabulary.
        before = values.double().cumsum(0) - values
        if count == size or float(before[-1]) >= top_p:
            break
    kept = torch.where(before < top_p, values, torch.zeros_like(values))
    return torch.zeros_like(probabilities).scatter(0, where, kept)


def _invert(probabilities: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """Return the token (n,) at which the cumulative distribution of each row passes its uniform."""
    # In float64: in float32, a small probability would not change the sum, and its token would
    # never be drawn.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=probabilities.device)
    # Scale the uniforms by the sum, which is below 1 after top-p, instead of normalizing the
    # probabilities.
    total = cumulative[:, -1:].contiguous()
    # right=True finds the first entry above the target, which never has probability zero.
    drawn = torch.searchsorted(cumulative, numbers[:, None] * total, right=True)
    # Rounding may push a target onto the total; it then means the last token of nonzero
    # probability, the first whose sum reaches the total.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(drawn, last).squeeze(-1)
