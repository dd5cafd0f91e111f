"""One forward (and backward) pass over a checked batch, micro-batch by micro-batch.

Its form bounds memory, whatever the client sends: the tokens of a micro-batch bound the
activations, and the rows of a chunk bound the logits.
"""

from __future__ import annotations

import dataclasses
from typing import Dict, List, Mapping, Sequence, Tuple

import numpy as np
import numpy.typing as npt
import torch

from tinkex.local.engines.inputs import CLIP_HIGH, CLIP_LOW, LOSSES, SEQUENCE_MASK, Row
from tinkex.local.engines.torch_engine.losses import (
    SEQUENCE_LOG_RATIO,
    target_logprobs,
    token_losses,
)
from tinkex.local.engines.torch_engine.network import LOGITS_ROWS, Network, plan_passes

FloatArray = npt.NDArray[np.float32]

# The divisor for sequences whose mask is 0 everywhere.  They have no token with an advantage
# (`inputs` checks that), so their ratio is computed but not used.
_LEAST_MASK = 1e-30


@dataclasses.dataclass(frozen=True)
class BatchResult:
    """The results of a pass: logprobs and losses of each row, float32 (n, k), in input order."""

    logprobs: List[FloatArray]
    losses: List[FloatArray]


def run_batch(
    network: Network,
    rows: Sequence[Row],
    loss_fn: str,
    config: Mapping[str, float],
    *,
    backward: bool,
) -> BatchResult:
    """Compute logprobs and losses of *rows*; with *backward*, add the gradient of their sum.

    The gradient is added to ``.grad`` of the network's parameters that require one.
    """
    nothing: FloatArray = np.empty((0, 1), dtype=np.float32)
    result = BatchResult([nothing] * len(rows), [nothing] * len(rows))
    # Losses are sums over tokens (docs/protocol.md, "Passes"), so the gradients of the
    # micro-batches add up in .grad to the gradient of the batch, whatever their sizes.
    for indices in plan_passes([row.tokens.size for row in rows]):
        chosen = [rows[index] for index in indices]
        logprobs, losses = _run_pass(network, chosen, loss_fn, config, backward=backward)
        start = 0
        for index, row in zip(indices, chosen):
            end = start + len(row.targets)
            # Rows of a pass may differ in k; the pass is as wide as the widest.
            width = row.targets.shape[1]
            result.logprobs[index] = logprobs[start:end, :width]
            result.losses[index] = losses[start:end, :width]
            start = end
    return result


def _run_pass(
    network: Network,
    rows: Sequence[Row],
    loss_fn: str,
    config: Mapping[str, float],
    *,
    backward: bool,
) -> Tuple[FloatArray, FloatArray]:
    """Return logprobs and losses of one micro-batch, both (targets of all rows, widest k)."""
    loss, device = LOSSES[loss_fn], network.device
    # From here on, the targets of all rows are one axis: (t, k), with t the sum of their lengths.
    positions = _flat_positions(rows).to(device)
    targets = torch.from_numpy(_join([row.targets for row in rows])).to(device)
    inputs = {
        name: torch.from_numpy(_join([row.inputs[name] for row in rows])).to(device)
        for name in loss.inputs
    }
    # (t,): whether the loss depends on the token.  A gate of 0 excludes a token.
    live = torch.ones(len(targets), dtype=torch.bool, device=device)
    if loss.gate is not None:
        live = (inputs[loss.gate] != 0).any(-1)
    backward = backward and bool(live.any())  # if none is live, keep no graph
    with torch.set_grad_enabled(backward):
        # Padding is on the right, where causal attention keeps it out of every real position:
        # no mask is needed, so the fast attention kernels apply.
        lengths = [row.tokens.size for row in rows]
        features = network.features(_padded_tokens(rows).to(device), lengths=lengths)
        # (b, longest, d) -> (t, d): the output layer computes nothing for padding and prompts.
        flat = features.reshape(-1, features.shape[-1]).index_select(0, positions)
    if loss.by_sequence:
        # The ratio of a sequence needs the logprobs of all its tokens, which may lie in several
        # chunks.  So compute them first, without a gradient, since GSPO-token takes the ratio as a
        # constant; the chunks below compute them again, with a gradient.
        all_logprobs = torch.empty(targets.shape, dtype=torch.float32, device=device)
        with torch.no_grad():
            for chunk in torch.arange(len(targets), device=device).split(LOGITS_ROWS):
                all_logprobs[chunk] = target_logprobs(network.logits(flat[chunk]), targets[chunk])
        ends = np.cumsum([len(row.targets) for row in rows])[:-1]
        by_row = zip(rows, np.split(all_logprobs.cpu().numpy(), ends))
        log_ratios = np.concatenate([_sequence_log_ratio(row, found) for row, found in by_row])
        inputs[SEQUENCE_LOG_RATIO] = torch.from_numpy(log_ratios).float().to(device)[:, None]
    logprobs = torch.empty(targets.shape, dtype=torch.float32, device=device)
    losses = torch.empty_like(logprobs)
    gradient = torch.zeros_like(flat) if backward else None
    # Backpropagate each chunk of logits to the features immediately, then free it, so that only one
    # chunk is in memory at a time.  Tokens that have no gradient (weight 0) skip the backward pass.
    for wanted, part in ((True, live), (False, ~live)):
        with torch.set_grad_enabled(backward and wanted):
            for chunk in part.nonzero().squeeze(-1).split(LOGITS_ROWS):
                # A leaf, so that backward stops here and not at the bottom of the decoder, whose
                # graph is walked once, below, for all chunks.
                leaf = flat.detach()[chunk].requires_grad_(backward and wanted)
                lp = target_logprobs(network.logits(leaf), targets[chunk])
                chunk_inputs = {name: values[chunk] for name, values in inputs.items()}
                lost = token_losses(loss_fn, lp, chunk_inputs, config)
                if gradient is not None and wanted:
                    torch.autograd.backward(lost.sum())
                    gradient[chunk] = leaf.grad
                logprobs[chunk] = lp.detach()
                losses[chunk] = lost.detach()
    # If only the output layer is trained, no graph leads further back.
    if gradient is not None and flat.requires_grad:
        torch.autograd.backward(flat, gradient)
    return logprobs.cpu().numpy(), losses.cpu().numpy()


def _padded_tokens(rows: Sequence[Row]) -> torch.Tensor:
    padded = np.zeros((len(rows), max(row.tokens.size for row in rows)), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : row.tokens.size] = row.tokens
    return torch.from_numpy(padded)


def _flat_positions(rows: Sequence[Row]) -> torch.Tensor:
    """Return the indices, in the flattened (rows, longest) grid, of tokens that have targets."""
    longest = max(row.tokens.size for row in rows)
    # There may be fewer targets than tokens: they belong to the last tokens (docs/protocol.md,
    # "Losses").
    parts = [
        np.arange(row.tokens.size - len(row.targets), row.tokens.size) + i * longest
        for i, row in enumerate(rows)
    ]
    return torch.from_numpy(np.concatenate(parts))


def _sequence_log_ratio(row: Row, logprobs: FloatArray) -> npt.NDArray[np.float64]:
    """Return the mask-weighted mean of lp - q over a sequence, repeated for each token: (n,)."""
    # In float64: the loss clips the exponential of this small mean as close as 3e-4 to 1.
    mask = row.inputs[SEQUENCE_MASK].astype(np.float64)
    # Selected, not multiplied: lp may be -infinity where the mask is 0, and 0 * infinity is NaN.
    drift = np.where(mask == 0, 0.0, logprobs.astype(np.float64) - row.inputs["logprobs"])
    return np.full(mask.size, (mask * drift).sum() / max(mask.sum(), _LEAST_MASK))


def _join(parts: List[npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
    """Stack (n_i, k_i) arrays to (sum of n_i, largest k_i); pad narrow ones with zeros.

    0 is a valid token, and as the weight of padding it adds nothing to loss and gradient.
    """
    widest = max(part.shape[1] for part in parts)
    joined = np.zeros((sum(len(part) for part in parts), widest), dtype=parts[0].dtype)
    start = 0
    for part in parts:
        joined[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return joined


def metrics_of(rows: Sequence[Row], result: BatchResult, loss_fn: str) -> Dict[str, float]:
    """Return metrics of the batch, named with the reduction that joins them over several batches.

    ``loss:sum``; ``tokens:sum``, the number of target tokens; for cross_entropy ``weights:sum`` (so
    that loss:sum / weights:sum is the mean loss per token); for the others, over tokens with a
    nonzero advantage: ``active_tokens:sum``, ``ratio:sum|min|max`` (new over old probability; for
    gspo, of the sequence), ``sampler_kl:sum`` (sum of q - lp), and, if ratios are clipped,
    ``clipped_tokens:sum``.
    """
    metrics = {
        "loss:sum": float(sum(losses.sum(dtype=np.float64) for losses in result.losses)),
        "tokens:sum": float(sum(row.targets.size for row in rows)),
    }
    if loss_fn == "cross_entropy":
        weights = (row.inputs["weights"].sum(dtype=np.float64) for row in rows)
        metrics["weights:sum"] = float(sum(weights))
        return metrics
    # Tokens of advantage 0 are prompts and padding, whose q is a placeholder.
    active = np.concatenate([row.inputs["advantages"].ravel() for row in rows]) != 0
    metrics["active_tokens:sum"] = float(active.sum())
    if not active.any():
        return metrics
    new = np.concatenate([values.ravel() for values in result.logprobs])[active].astype(np.float64)
    old = np.concatenate([row.inputs["logprobs"].ravel() for row in rows])[active]
    drift = new - old
    if LOSSES[loss_fn].by_sequence:
        by_row = zip(rows, result.logprobs)
        drift = np.concatenate([_sequence_log_ratio(row, found) for row, found in by_row])[active]
    ratio = np.exp(np.clip(drift, -80, 80))  # finite, because JSON has no infinity
    metrics["ratio:sum"] = float(ratio.sum())
    metrics["ratio:min"], metrics["ratio:max"] = float(ratio.min()), float(ratio.max())
    metrics["sampler_kl:sum"] = float((old - new).sum())
    if CLIP_LOW in rows[0].inputs:
        low = np.concatenate([row.inputs[CLIP_LOW].ravel() for row in rows])[active]
        high = np.concatenate([row.inputs[CLIP_HIGH].ravel() for row in rows])[active]
        metrics["clipped_tokens:sum"] = float(((ratio < low) | (ratio > high)).sum())
    return metrics
