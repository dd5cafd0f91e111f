"""The arithmetic behind the deterministic engine: a language model made of a hash.  numpy only.

Everything here is a pure function of its arguments, and safe from any thread.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping

import numpy as np
import numpy.typing as npt

from tinkex.local.engines.inputs import CLIP_HIGH, CLIP_LOW, SEQUENCE_MASK
from tinkex.types import SamplingParams, TopkLogprobs
from tinkex.types.sampling import TOPK_SENTINEL

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Inputs = Dict[str, npt.NDArray[Any]]

END_OF_SEQUENCE = 0
_WEIGHTS = np.array([32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 1.0, 0.5])
_WEIGHTS = 0.95 * _WEIGHTS / _WEIGHTS.sum()
_SPREAD = 0.05  # shared by the entire vocabulary, so that no log-probability is infinite


def mix(values: U64) -> U64:
    """Scramble 64-bit integers (the finalizer of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def digest(tokens: npt.NDArray[np.int32]) -> int:
    """Return a number that depends on every token and its position."""
    places = np.arange(tokens.size, dtype=np.uint64) << np.uint64(32)
    return int(np.bitwise_xor.reduce(mix(tokens.astype(np.uint64) | places)))


class HashModel:
    """The language model: a hash of a token and its position decides what follows."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def candidates(self, previous: I64, positions: I64, top_k: int = 8) -> I64:
        """Return the candidate tokens (n, up to 8) after each token, likeliest first."""
        count = min(top_k, len(_WEIGHTS))
        seeds = mix(previous.astype(np.uint64) * np.uint64(1_000_003) + positions.astype(np.uint64))
        rank = np.arange(count, dtype=np.uint64)
        # Ranks step as far as splitmix64 does: 2**64 divided by the golden ratio.
        hashes = mix(seeds[:, None] + rank[None, :] * np.uint64(0x9E3779B97F4A7C15))
        # Only the last and least likely candidate is the end token.
        tokens = 1 + (hashes % np.uint64(self.vocab_size - 1)).astype(np.int64)
        if count == len(_WEIGHTS):
            tokens[:, -1] = END_OF_SEQUENCE
        return tokens

    def logprobs(self, previous: I64, positions: I64, targets: I64, steps: int) -> F32:
        """Return the log-probabilities of *targets*; the arguments broadcast against each other."""
        previous, positions, targets = np.broadcast_arrays(previous, positions, targets)
        tokens = self.candidates(previous.reshape(-1), positions.reshape(-1))
        # Summed, because two candidates may be the same token.
        hit = tokens == targets.reshape(-1, 1)
        probability = (_WEIGHTS.astype(np.float32) * hit).sum(axis=1) + _SPREAD / self.vocab_size
        # Each optimizer step shrinks every log-probability, so any loss on any data falls.
        shrunk = np.log(probability) / (1.0 + 0.1 * steps)
        result: F32 = shrunk.reshape(targets.shape).astype(np.float32)
        return result

    def topk(self, previous: I64, first_position: int, k: int, steps: int) -> TopkLogprobs:
        """Return the k likeliest tokens after each of *previous*, which are consecutive."""
        positions = first_position + np.arange(previous.size, dtype=np.int64)
        tokens = self.candidates(previous, positions, k)
        logprobs = self.logprobs(previous[:, None], positions[:, None], tokens, steps)
        ids = np.zeros((previous.size, k), dtype=np.int32)
        values = np.full((previous.size, k), TOPK_SENTINEL, dtype=np.float32)
        ids[:, : tokens.shape[1]] = tokens
        values[:, : tokens.shape[1]] = logprobs
        return TopkLogprobs(ids, values)


def shares(params: SamplingParams, steps: int) -> List[float]:
    """Return the candidates' cumulative probabilities under *params*, likeliest first."""
    count = len(_WEIGHTS) if params.top_k < 1 else min(params.top_k, len(_WEIGHTS))
    if params.temperature == 0:
        return [1.0]
    # In log space; optimizer steps sharpen the choice at the rate at which they raise
    # log-probabilities.
    scores = np.log(_WEIGHTS[:count]) * (1.0 + 0.1 * steps)
    # Shifted first, so that a tiny temperature leaves only the likeliest candidate, without NaN.
    with np.errstate(over="ignore"):
        chances = np.exp((scores - scores.max()) / params.temperature)
    chances /= chances.sum()
    # The token that reaches top_p is kept, so at least one remains whatever top_p is.
    kept = np.cumsum(chances) - chances < params.top_p
    cumulative: List[float] = np.cumsum(chances[kept]).tolist()
    return cumulative


def loss(name: str, logprobs: F64, inputs: Inputs, config: Mapping[str, float]) -> float:
    """Sum a loss over the tokens of a datum (docs/protocol.md, "Losses").

    The result is infinite if float64 cannot hold the sum.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return float(_losses(name, logprobs, inputs, config).sum())


def _losses(name: str, logprobs: F64, inputs: Inputs, config: Mapping[str, float]) -> Any:
    if name == "cross_entropy":
        return -(logprobs * inputs["weights"])
    advantages = inputs["advantages"]
    difference = logprobs - inputs["logprobs"]
    # A token of advantage 0 adds nothing, and 0 times an infinite ratio would be NaN.
    ratio = np.exp(np.where(advantages == 0, 0.0, difference))
    if name == "importance_sampling":
        return -ratio * advantages
    if name == "dro":
        return -(logprobs * advantages - 0.5 * config["beta"] * difference**2)
    if name == "gspo":
        mask = inputs[SEQUENCE_MASK]
        drift = np.where(mask == 0, 0.0, mask * difference)
        # Don't divide by 0 if the mask is 0 everywhere: then no token has an advantage, and the
        # ratio is not used.
        ratio = np.exp(np.full_like(ratio, drift.sum() / max(mask.sum(), 1e-30)))
    clipped = np.clip(ratio, inputs[CLIP_LOW], inputs[CLIP_HIGH])
    if name == "cispo":
        return -clipped * advantages * logprobs
    return -np.minimum(ratio * advantages, clipped * advantages)
