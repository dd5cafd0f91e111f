"""Checks a freshly loaded model: the engine must compute what the model's own forward does.

Architectures differ in what they cache, in how they count positions and in what they do with
padding.  Two rows of different lengths, prefilled in two pieces and continued by one token, show
in a fraction of a second what would otherwise make every sample fail or, worse, be wrong.
"""

from __future__ import annotations

from typing import Any, List, Optional

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer

from tinkex.local.engines.torch_engine.decoding import DecodeBatch, Source, prefill
from tinkex.local.engines.torch_engine.network import Network

# Tokens of the two rows.  The second row is the beginning of the first.
_LENGTHS = (5, 3)
_PIECE = 2

# Largest relative error of a token's logits that passes for rounding.  In half precision rounding
# amounts to some percent (more where it changes an expert); a wrong computation is off by about
# the size of the logits.
_TOLERANCE = 0.01
_TOLERANCE_HALF = 0.3


def find_difference(network: Network) -> Optional[str]:
    """Return how *network* differs from its model's own forward pass; None if it does not.

    Exceptions of the model's code pass through.
    """
    tokens = (torch.arange(_LENGTHS[0]) * 37 + 11) % network.vocab_size
    rows = torch.stack([tokens, tokens])
    rows[1, _LENGTHS[1] :] = 0
    expected = network.model(input_ids=rows.to(network.device), use_cache=False).logits
    half = expected.dtype in (torch.float16, torch.bfloat16)
    tolerance = _TOLERANCE_HALF if half else _TOLERANCE
    common = slice(0, _LENGTHS[1])
    if _error(expected[1, common], expected[0, common]) > tolerance:
        return "a token's logits depend on the tokens after it (it is an encoder)"

    prompts = [tokens[: length - 1].numpy().astype(np.int32) for length in _LENGTHS]
    sources: List[Source] = []
    for piece in prefill(network, prompts, piece_tokens=_PIECE):
        end = piece.start + piece.features.shape[1]
        odd = _odd_layer(piece.cache, end)
        if odd is not None:
            return odd
        error = _error(network.logits(piece.features[0]), expected[0, piece.start : end])
        if error > tolerance:
            return f"a prompt computed with a key-value cache has other logits (by {error:.2g})"
        sources = [Source(piece.cache, row, prompts[row].size) for row in range(len(prompts))]

    batch = DecodeBatch(network, max(_LENGTHS))
    batch.regroup([], sources)
    logits = batch.step([int(tokens[length - 1]) for length in _LENGTHS])
    for row, length in enumerate(_LENGTHS):
        error = _error(logits[row], expected[row, length - 1])
        if error > tolerance:
            return f"a token added to a key-value cache has other logits (by {error:.2g})"
    return None


def _odd_layer(cache: Any, length: int) -> Optional[str]:
    """Return what *cache* holds besides one key and one value per head and token."""
    filled = [layer for layer in cache.layers if layer.keys is not None]
    if not filled:
        return "it keeps no keys and values of earlier tokens"
    for layer in cache.layers:
        if type(layer) is not DynamicLayer:
            return f"its cache has a {type(layer).__name__}, not keys and values alone"
    for layer in filled:
        if any(half.dim() != 4 or half.shape[2] != length for half in (layer.keys, layer.values)):
            return "its cache does not hold one key and one value per token"
    return None


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative error over tokens, of logits (..., vocabulary).

    Logits matter up to a constant, so they are centered first.
    """
    found, expected = (
        logits.float() - logits.float().mean(-1, True) for logits in (found, expected)
    )
    size = expected.norm(dim=-1).clamp(min=1e-6)
    error = ((found - expected).norm(dim=-1) / size).max()
    return float("inf") if error.isnan() else float(error)
