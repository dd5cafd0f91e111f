"""Prefill and decode with a KV cache: prompts in, one token per row and step out.

Prefill runs prompts of similar length together, padded on the right, where causal attention keeps
padding out of every real position, so no mask is needed.  The keys and values are then copied into
a decode cache whose rows all *end* in the same column (padding on the left), so that each step
writes one column.  A prompt's n samples share its prefill.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tinkex.local.engines.torch_engine.network import Network, plan_passes

Tokens = npt.NDArray[np.int32]

#: Prompt tokens (with padding) in one slice of prefill; also the longest piece of a prompt.
PREFILL_TOKENS = 1024

# Spare columns of a decode cache when it is made or grown.
_SPARE_COLUMNS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class PrefillPiece:
    """One piece of each prompt in a group, just computed.

    Attributes:
        prompts: indices of the prompts, one per row.
        start: position of the first column; column c is position start + c.
        features: the network's features, shape (rows, columns, d); padding is garbage.
        cache: keys and values of these prompts so far.
        is_last: whether all prompts are now computed.
    """

    prompts: List[int]
    start: int
    features: torch.Tensor
    cache: Any
    is_last: bool

    def end_of(self, row: int, prompt_length: int) -> Optional[torch.Tensor]:
        """Return the features (d,) of the prompt's last token; None if it is not in this piece."""
        column = prompt_length - 1 - self.start
        if not 0 <= column < self.features.shape[1]:
            return None
        # Copied: a view would keep the entire piece in memory.
        return self.features[row, column].clone()


def prefill(
    network: Network,
    prompts: Sequence[Tokens],
    *,
    more_tokens: int = 0,
    piece_tokens: int = PREFILL_TOKENS,
) -> Iterator[PrefillPiece]:
    """Run *prompts* through the network, piece by piece; pieces of a group share one cache.

    Each prompt is computed as the start of a sequence that has *more_tokens* more.  The caller must
    drop each piece before it asks for the next, so that only one is in memory at a time.
    """
    # No mask is passed, since the fast attention kernels take none: padding is on the right, where
    # causal attention keeps it out of every real position.  The features of padding are never read.
    groups = plan_passes([prompt.size for prompt in prompts], PREFILL_TOKENS)
    for number, group in enumerate(groups, 1):
        lengths = [prompts[index].size + more_tokens for index in group]
        longest = max(prompts[index].size for index in group)
        padded = np.zeros((len(group), longest), dtype=np.int64)
        for row, index in enumerate(group):
            padded[row, : prompts[index].size] = prompts[index]
        tokens = torch.from_numpy(padded).to(network.device)
        # Made without the model's configuration, which would make sliding-window layers keep only
        # their last keys: rows of the decode cache need all of them.  The model's masks apply the
        # windows.
        cache = DynamicCache()
        for start in range(0, longest, piece_tokens):
            piece = tokens[:, start : start + piece_tokens]
            positions = torch.arange(start, start + piece.shape[1], device=network.device)
            # The features get no name here: a name would keep them alive while the next are
            # computed.
            yield PrefillPiece(
                group,
                start,
                network.features(
                    piece,
                    lengths=lengths,
                    cache=cache,
                    positions=positions.repeat(len(group), 1),  # XGLM writes into it
                ),
                cache,
                is_last=number == len(groups) and start + piece_tokens >= longest,
            )


class Source(NamedTuple):
    """Where a row's keys and values come from: the first *length* columns of *row* in *cache*."""

    cache: Any
    row: int
    length: int


class _Columns(DynamicLayer):  # type: ignore[misc]  # transformers is Any to mypy
    """One layer's keys and values in a buffer with room to grow, so that a step copies nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, filled: int) -> None:
        super().__init__()
        # transformers' own update() sets these with the first keys, and other code reads them.
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
        end = self._filled + key_states.shape[-2]  # keys are (rows, heads, columns, size)
        if end > self._keys.shape[2]:
            self._keys, self._values = _widened(self._keys, end), _widened(self._values, end)
        self._keys[:, :, self._filled : end] = key_states
        self._values[:, :, self._filled : end] = value_states
        self._filled = end
        self._show()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._filled

    def put(self, row: int, first_column: int, layer: Any, source: int) -> None:
        """Replace the keys and values of *row* with those in row *source* of *layer*."""
        length = self._filled - first_column
        self.keys[row, :, first_column:] = layer.keys[source, :, :length]
        self.values[row, :, first_column:] = layer.values[source, :, :length]


def _widened(buffer: torch.Tensor, columns: int) -> torch.Tensor:
    rows, heads, old, size = buffer.shape
    # Grow by half, so that copying costs a constant per step on average.  Not zeroed: a column is
    # written before it is shown.
    wide = buffer.new_empty((rows, heads, columns + columns // 2 + _SPARE_COLUMNS, size))
    wide[:, :, :old] = buffer
    return wide


class DecodeBatch:
    """Rows that are continued one token at a time.

    A row that has ended is still computed until it is taken out, even beyond *context_length*; its
    logits are then meaningless.
    """

    def __init__(self, network: Network, context_length: int) -> None:
        self._network = network
        self._context_length = context_length
        self._filled = 0
        # The first real column of each row; columns to its left are padding.
        self._starts: List[int] = []
        self._cache = Cache(layers=[])

    def regroup(self, kept: Sequence[int], added: Sequence[Source]) -> None:
        """Keep the rows *kept*, in this order, and append a row for each of *added*.

        This copies the cache, without the columns that only dropped rows used.
        """
        lengths = [self._filled - self._starts[row] for row in kept]
        width = max([*lengths, *(source.length for source in added)], default=0)
        if not kept:  # a new batch: only a prefill's cache knows the number of layers
            layers = added[0].cache.layers if added else []
            self._cache = Cache(layers=[DynamicLayer() for _ in layers])
        # Layer by layer, so that only one layer at a time is in memory twice.
        for place in range(len(self._cache.layers)):
            self._cache.layers[place] = self._copied(kept, added, place, width)
        self._filled = width
        self._starts = [width - length for length in lengths]
        self._starts += [width - source.length for source in added]

    def _copied(
        self, kept: Sequence[int], added: Sequence[Source], place: int, width: int
    ) -> DynamicLayer:
        """Return layer *place* of the cache for these rows, *width* columns wide."""
        own = self._cache.layers[place] if kept else added[0].cache.layers[place]
        if own.keys is None:  # no attention, or it uses an earlier layer's keys (Gemma 4)
            return DynamicLayer()
        chosen = torch.tensor(kept, dtype=torch.long, device=self._network.device)
        halves = []
        for name in ("keys", "values"):
            some = getattr(own, name)
            # Keys and values may differ in size (DeepSeek V3).
            shape = (len(kept) + len(added), some.shape[1], width + _SPARE_COLUMNS, some.shape[3])
            # Zeroed, because masked-out values are still multiplied by zero, and 0 * NaN is NaN.
            buffer = some.new_zeros(shape)
            if kept:
                columns = min(width, self._filled)
                buffer[: len(kept), :, width - columns : width] = some[chosen, :, -columns:]
            for row, (cache, source, length) in enumerate(added, len(kept)):
                held = getattr(cache.layers[place], name)
                buffer[row, :, width - length : width] = held[source, :, :length]
            halves.append(buffer)
        return _Columns(halves[0], halves[1], width)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._starts)

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each row; return float32 logits (rows, vocabulary) for the next."""
        device = self._network.device
        # Capped, because rows that have ended may run past the last position that the model knows,
        # and a model with a table of positions (GPT-2) would then fail for the entire batch.
        lengths = [min(self._filled - start + 1, self._context_length) for start in self._starts]
        # A mask only if there is padding: attention kernels are faster without.
        mask: Optional[torch.Tensor] = None
        if any(self._starts):
            columns = torch.arange(self._filled + 1, device=device)
            starts = torch.tensor(self._starts, device=device)
            mask = (columns >= starts[:, None]).to(torch.long)
        features = self._network.features(
            torch.tensor(tokens, device=device)[:, None],
            lengths=lengths,
            cache=self._cache,
            attention_mask=mask,
            # Positions in each row's own sequence, whose first real token has position 0.
            positions=torch.tensor(lengths, device=device)[:, None] - 1,
        )
        self._filled += 1
        return self._network.logits(features[:, -1])

    def outdated(self) -> List[int]:
        """Return the rows whose cached keys will not fit their length after the next step.

        Keys are cached with their rotation.  If rotary frequencies depend on the length, a row that
        crosses a threshold must be recomputed and handed to `replace` before the step.
        """
        thresholds = self._network.rope.thresholds
        return [
            row for row, start in enumerate(self._starts) if self._filled - start + 1 in thresholds
        ]

    def replace(self, row: int, cache: Any, source: int) -> None:
        """Replace the keys and values of *row* with those in row *source* of a prefill *cache*."""
        for own, other in zip(self._cache.layers, cache.layers):
            if isinstance(own, _Columns):
                own.put(row, self._starts[row], other, source)
