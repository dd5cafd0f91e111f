"""Prompts in, one token per row and step out: prefill and decode with a KV cache.

Prefill runs prompts of like length together, padded on the right, where causal attention keeps
padding out of every real position, so it needs no mask.  The keys and values are then copied into
a decode cache whose rows all *end* in the same column (padding on the left), so that each step
writes one column.  A prompt's n samples share its prefill.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tinkex.local.torch_engine.batching import plan_passes
from tinkex.local.torch_engine.network import Network

Tokens = npt.NDArray[np.int32]

#: Tokens of prompt (with padding) in one slice of prefill; also the longest piece of a prompt.
PREFILL_TOKENS = 1024

# Columns a decode cache has to spare when it is made or grown.
_SPARE_COLUMNS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class PrefillPiece:
    """A piece of some prompts, just computed.

    Attributes:
        prompts: indices of the prompts, one per row.
        start: position of the first column; column c is position start + c.
        features: the network's features, shape (rows, columns, d); padding is garbage.
        cache: keys and values of these prompts so far.
    """

    prompts: List[int]
    start: int
    features: torch.Tensor
    cache: Any


def prefill(network: Network, prompts: Sequence[Tokens]) -> Iterator[PrefillPiece]:
    """Run *prompts* through the network, piece by piece; pieces of a group share one cache."""
    for group in plan_passes([prompt.size for prompt in prompts], PREFILL_TOKENS):
        longest = max(prompts[index].size for index in group)
        padded = np.zeros((len(group), longest), dtype=np.int64)
        for row, index in enumerate(group):
            padded[row, : prompts[index].size] = prompts[index]
        tokens = torch.from_numpy(padded).to(network.device)
        cache = DynamicCache()
        for start in range(0, longest, PREFILL_TOKENS):
            piece = tokens[:, start : start + PREFILL_TOKENS]
            positions = torch.arange(start, start + piece.shape[1], device=network.device)
            features = network.features(
                piece,
                cache=cache,
                position_ids=positions.expand(len(group), -1),
            )
            yield PrefillPiece(group, start, features, cache)


class _Columns(DynamicLayer):  # type: ignore[misc]  # transformers is Any to mypy
    """One layer's keys and values in a buffer with room to grow, so that a step copies nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, filled: int) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._keys, self._values, self._filled = keys, values, filled
        self._show()

    def _show(self) -> None:
        self.keys = self._keys[:, :, : self._filled]
        self.values = self._values[:, :, : self._filled]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        end = self._filled + key_states.shape[-2]
        if end > self._keys.shape[2]:
            self._keys, self._values = _widened(self._keys, end), _widened(self._values, end)
        self._keys[:, :, self._filled : end] = key_states
        self._values[:, :, self._filled : end] = value_states
        self._filled = end
        self._show()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._filled

    def keep(self, rows: torch.Tensor, first_column: int) -> None:
        self._keys = self._keys[rows, :, first_column:]
        self._values = self._values[rows, :, first_column:]
        self._filled -= first_column
        self._show()


def _widened(buffer: torch.Tensor, columns: int) -> torch.Tensor:
    rows, heads, old, size = buffer.shape
    wide = buffer.new_empty((rows, heads, columns + columns // 2 + _SPARE_COLUMNS, size))
    wide[:, :, :old] = buffer
    return wide


class DecodeBatch:
    """Rows that are continued one token at a time.

    *sources* says for each row which (cache, row of it, prompt length) it starts from.  A row may
    go on after it has ended, beyond *context_length* even; its logits mean nothing then.
    """

    def __init__(
        self, network: Network, sources: Sequence[Tuple[Any, int, int]], context_length: int
    ) -> None:
        self._network = network
        self._last_position = context_length - 1
        width = max(length for _, _, length in sources)
        self._filled = width
        # First real column of each row; what is left of it is padding.
        self._starts = torch.tensor([width - n for _, _, n in sources], device=network.device)
        self._cache = Cache(
            layers=[self._gather(layer, sources, width) for layer in range(network.layer_count)]
        )

    def _gather(self, layer: int, sources: Sequence[Tuple[Any, int, int]], width: int) -> _Columns:
        halves = []
        for name in ("keys", "values"):
            some = getattr(sources[0][0].layers[layer], name)
            shape = (len(sources), some.shape[1], width + _SPARE_COLUMNS, some.shape[3])
            # Zeros, because what is masked out is still multiplied by zero, and 0 * NaN is NaN.
            buffer = some.new_zeros(shape)
            for row, (cache, source, length) in enumerate(sources):
                held = getattr(cache.layers[layer], name)
                buffer[row, :, width - length : width] = held[source, :, :length]
            halves.append(buffer)
        return _Columns(halves[0], halves[1], width)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._starts)

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each row; return float32 logits (rows, vocabulary) of the next."""
        device = self._network.device
        columns = torch.arange(self._filled + 1, device=device)
        mask: Optional[torch.Tensor] = None
        if bool(self._starts.any()):
            mask = (columns >= self._starts[:, None]).to(torch.long)
        features = self._network.features(
            torch.tensor(tokens, device=device)[:, None],
            cache=self._cache,
            attention_mask=mask,
            position_ids=(self._filled - self._starts).clamp(max=self._last_position)[:, None],
        )
        self._filled += 1
        return self._network.logits(features[:, -1])

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and the columns that only the dropped ones used."""
        chosen = torch.tensor(rows, device=self._network.device)
        self._starts = self._starts[chosen]
        first = int(self._starts.min())
        self._starts = self._starts - first
        self._filled -= first
        for layer in self._cache.layers:
            layer.keep(chosen, first)
