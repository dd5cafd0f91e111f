"""Log-probabilities of a prompt's own tokens."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import numpy.typing as npt
import torch

from tinkex.local.engines.torch_engine.network import LOGITS_ROWS, Network
from tinkex.types import SampleRequest, TensorData


class PromptScores:
    """Log-probabilities of a prompt's tokens, filled in piece by piece of prefill."""

    def __init__(self, request: SampleRequest, prompt: npt.NDArray[np.int32], targets: Any) -> None:
        length = prompt.size
        self._prompt = torch.from_numpy(prompt.astype(np.int64))
        self._first = 1
        if request.prompt_logprobs_last_n is not None:
            self._first = length - request.prompt_logprobs_last_n
        self.logprobs = np.full(length, np.nan, dtype=np.float32)
        self._k = request.topk_prompt_logprobs
        self.top_tokens = np.zeros((length, self._k), dtype=np.int32)
        self.top_logprobs = np.full((length, self._k), -99999.0, dtype=np.float32)
        self._targets: Optional[npt.NDArray[np.int64]] = targets
        self.target_logprobs = None if targets is None else np.zeros(targets.shape, np.float32)

    def add(self, network: Network, start: int, features: torch.Tensor) -> None:
        """Take features (t, d) of prompt positions start .. start + t - 1 into account.

        Position i predicts token i + 1; the prompt's last position predicts no prompt token.
        """
        first = start if self._targets is not None else max(start, self._first - 1)
        end = min(start + len(features), len(self._prompt) - 1)
        for low in range(first, end, LOGITS_ROWS):
            high = min(low + LOGITS_ROWS, end)
            logprobs = torch.log_softmax(network.logits(features[low - start : high - start]), -1)
            self._fill(low, high, logprobs)

    def _fill(self, low: int, high: int, logprobs: torch.Tensor) -> None:
        following = self._prompt[low + 1 : high + 1, None].to(logprobs.device)
        own = logprobs.gather(-1, following).squeeze(-1).cpu().numpy()
        known = slice(max(low + 1, self._first), high + 1)
        skipped = known.start - (low + 1)
        if skipped < high - low:
            self.logprobs[known] = own[skipped:]
            if self._k:
                top = torch.topk(logprobs[skipped:], self._k)
                self.top_tokens[known] = top.indices.cpu().numpy()
                self.top_logprobs[known] = top.values.cpu().numpy()
        if self._targets is not None and self.target_logprobs is not None:
            wanted = self._targets[low:high]
            index = torch.from_numpy(np.maximum(wanted, 0)).to(logprobs.device)
            found = logprobs.gather(-1, index).cpu().numpy()
            self.target_logprobs[low:high] = np.where(wanted >= 0, found, 0.0)


def as_asked(asked: TensorData, values: npt.NDArray[np.float32]) -> TensorData:
    """*values* in the shape and sparsity of *asked*."""
    if asked.crow_indices is None or asked.col_indices is None:
        return TensorData.from_numpy(values)
    rows = np.repeat(np.arange(asked.shape[0]), np.diff(asked.crow_indices))
    listed = values[rows, asked.col_indices]
    return TensorData(listed, "float32", asked.shape, asked.crow_indices, asked.col_indices)
