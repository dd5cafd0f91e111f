"""Cuts a batch into passes of like length."""

from __future__ import annotations

from typing import List, Sequence

#: Tokens (with padding) of one pass: bounds the activations kept (SmolLM2: about 2 MB each).
TOKENS_PER_PASS = 2048

# Shorter rows than this share of the longest one go into another pass, if that pass is not tiny.
_LIKE_LENGTH = 0.8
_WORTH_A_PASS = 512


def plan_passes(lengths: Sequence[int], budget: int = TOKENS_PER_PASS) -> List[List[int]]:
    """Group the indices of *lengths* into passes, longest first.

    A pass holds rows of like length, and at most *budget* tokens with padding (a single longer
    row has a pass for itself).  The plan depends on the lengths only.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    passes: List[List[int]] = []
    current: List[int] = []
    for index in order:
        longest = lengths[current[0]] if current else 0
        full = (len(current) + 1) * longest > budget
        unlike = lengths[index] < _LIKE_LENGTH * longest and len(current) * longest >= _WORTH_A_PASS
        if current and (full or unlike):
            passes.append(current)
            current = []
        current.append(index)
    if current:
        passes.append(current)
    return passes
