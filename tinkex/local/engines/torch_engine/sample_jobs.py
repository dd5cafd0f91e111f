"""Checked sample requests: what each one needs, and its results so far."""

from __future__ import annotations

import dataclasses
from typing import Any, List, Optional

import numpy as np
import numpy.typing as npt
import torch

from tinkex.local.engines.engine import EngineError, EngineInfo, StreamingRequest
from tinkex.local.engines.inputs import check_sample, check_values, prompt_targets
from tinkex.local.engines.torch_engine.network import LOGITS_ROWS, Network
from tinkex.local.engines.torch_engine.stopping import StopRule, Vocabulary
from tinkex.types import SampledSequence, SampleRequest, SampleResponse, TensorData, TopkLogprobs
from tinkex.types.sampling import TOPK_SENTINEL


class PromptScores:
    """Log-probabilities of a prompt's tokens, filled in as prefill computes each piece."""

    def __init__(self, request: SampleRequest, prompt: npt.NDArray[np.int32], targets: Any) -> None:
        length = prompt.size
        self._prompt = torch.from_numpy(prompt.astype(np.int64))
        self._first = 1
        if request.prompt_logprobs_last_n is not None:
            self._first = length - request.prompt_logprobs_last_n
        # Nothing precedes the first token: its logprob stays NaN and its rows stay empty, like
        # those of the tokens before the last prompt_logprobs_last_n (docs/protocol.md, "Sample
        # results").
        self.logprobs = np.full(length, np.nan, dtype=np.float32)
        self._k = request.topk_prompt_logprobs
        self.top_tokens = np.zeros((length, self._k), dtype=np.int32)
        self.top_logprobs = np.full((length, self._k), TOPK_SENTINEL, dtype=np.float32)
        self._targets: Optional[npt.NDArray[np.int64]] = targets
        self.target_logprobs = None if targets is None else np.zeros(targets.shape, np.float32)

    def add(self, network: Network, start: int, features: torch.Tensor) -> None:
        """Score the tokens after prompt positions start .. start + t - 1, by *features* (t, d)."""
        # Position i predicts token i + 1, and the prompt's last position predicts no prompt token.
        # Compute logits only for requested positions: for an entire prompt, they would be the
        # largest tensor by far.
        first = start if self._targets is not None else max(start, self._first - 1)
        end = min(start + len(features), len(self._prompt) - 1)
        for low in range(first, end, LOGITS_ROWS):
            high = min(low + LOGITS_ROWS, end)
            logprobs = torch.log_softmax(network.logits(features[low - start : high - start]), -1)
            self._fill(low, high, logprobs)

    def _fill(self, low: int, high: int, logprobs: torch.Tensor) -> None:
        """Fill in scores from *logprobs* (high - low, vocabulary) of positions low .. high - 1."""
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
            # -1 marks a cell to skip, whose result is 0; gather takes no negative index.
            index = torch.from_numpy(np.maximum(wanted, 0)).to(logprobs.device)
            found = logprobs.gather(-1, index).cpu().numpy()
            self.target_logprobs[low:high] = np.where(wanted >= 0, found, 0.0)


@dataclasses.dataclass(eq=False)
class Job:
    """A checked request and its results so far; once it is *dropped*, no result is needed."""

    index: int
    request: SampleRequest
    prompt: npt.NDArray[np.int32]
    stop: StopRule
    limit: int
    sequences: List[Optional[SampledSequence]]  # None until the sequence has ended
    prompt_scores: Optional[PromptScores]
    dropped: bool = False

    @property
    def length(self) -> int:
        """Tokens of the prompt and its longest possible continuation."""
        return self.prompt.size + self.limit


def check_request(
    index: int, request: SampleRequest, vocabulary: Vocabulary, info: EngineInfo
) -> Job:
    check_values(request)
    prompt, room = check_sample(request, info)
    params = request.sampling_params
    limit = room if params.max_tokens is None else params.max_tokens
    if limit > room:
        raise EngineError(
            f"a prompt of {prompt.size} tokens and max_tokens {limit}: the context of "
            f"{info.model_name} holds {info.context_length} tokens. Shorten the prompt or lower "
            "max_tokens"
        )
    if request.prompt_alt_tokens_k:
        raise EngineError("prompt_alt_tokens_k is not supported by this server; leave it at 0")
    targets = prompt_targets(request, info)
    scores: Optional[PromptScores] = None
    if request.prompt_logprobs or request.topk_prompt_logprobs or targets is not None:
        scores = PromptScores(request, prompt, targets)
    stop = StopRule.of(params.stop, vocabulary)
    if isinstance(request, StreamingRequest) and request.stop_at_eos:
        stop = dataclasses.replace(stop, tokens=stop.tokens | vocabulary.eos_tokens)
    return Job(index, request, prompt, stop, limit, [None] * request.num_samples, scores)


def response_of(job: Job) -> SampleResponse:
    sequences = [sequence for sequence in job.sequences if sequence is not None]
    scores, request = job.prompt_scores, job.request
    if scores is None:
        return SampleResponse(sequences)
    topk: Optional[TopkLogprobs] = None
    if request.topk_prompt_logprobs:
        topk = TopkLogprobs(scores.top_tokens, scores.top_logprobs)
    targets: Optional[TensorData] = None
    if scores.target_logprobs is not None and request.target_prompt_logprobs is not None:
        targets = _shaped_like(request.target_prompt_logprobs, scores.target_logprobs)
    return SampleResponse(
        sequences,
        prompt_logprobs_np=scores.logprobs if request.prompt_logprobs else None,
        topk_prompt_logprobs_np=topk,
        target_prompt_logprobs=targets,
    )


def _shaped_like(template: TensorData, values: npt.NDArray[np.float32]) -> TensorData:
    """Return *values* in the shape and sparsity of *template* (docs/protocol.md, "Tensors")."""
    if template.crow_indices is None or template.col_indices is None:
        return TensorData.from_numpy(values)
    rows = np.repeat(np.arange(template.shape[0]), np.diff(template.crow_indices))
    listed = values[rows, template.col_indices]
    return TensorData(
        listed, "float32", template.shape, template.crow_indices, template.col_indices
    )
