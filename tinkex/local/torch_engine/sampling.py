"""Answers sample requests: checks them, runs them as one batch, a slice at a time.

A SampleRun is a state machine that the engine advances; each advance is about 8 tokens of every
row, or one piece of prefill.  What a row draws depends on its own request, seed and sample number
only, not on what else is in the batch (up to float rounding of the matrix products).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, FrozenSet, Generator, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt
import torch

from tinkex.errors import InvalidInputError
from tinkex.local.engine import EngineError, EngineInfo, Finished
from tinkex.local.torch_engine.batching import check_tokens
from tinkex.local.torch_engine.decoding import DecodeBatch, PrefillPiece, prefill
from tinkex.local.torch_engine.drawing import draw
from tinkex.local.torch_engine.network import LOGITS_ROWS, Network
from tinkex.types import SampledSequence, SampleRequest, SampleResponse, TensorData, TopkLogprobs

#: Decode steps of one slice.
SLICE_STEPS = 8

#: Most tokens (prompt and longest continuation, all rows) of one decode batch; more wait.
WAVE_TOKENS = 131072

# Rows that ended leave the batch once this share of it is idle: leaving copies the cache.
_IDLE_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What sampling needs to know of the tokenizer."""

    tokenizer: Any
    eos_tokens: FrozenSet[int]

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Vocabulary:
        """Collect the end-of-sequence tokens of model and tokenizer."""
        eos = getattr(model.generation_config, "eos_token_id", None)
        if eos is None:
            eos = tokenizer.eos_token_id
        listed = [] if eos is None else eos if isinstance(eos, (list, tuple)) else [eos]
        return cls(tokenizer, frozenset(int(token) for token in listed))

    def text(self, tokens: Sequence[int]) -> str:
        """Decode *tokens*, special ones included, nothing cleaned up."""
        decoded: str = self.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return decoded


@dataclasses.dataclass(frozen=True)
class StopRule:
    """When a sequence ends: at a token, or as soon as its text holds a string."""

    tokens: FrozenSet[int]
    strings: Tuple[str, ...] = ()
    window: int = 0

    @classmethod
    def of(cls, stop: Any, vocabulary: Vocabulary) -> StopRule:
        """Read ``SamplingParams.stop``."""
        if stop is None:
            return cls(vocabulary.eos_tokens)
        items = [stop] if isinstance(stop, str) else list(stop)
        strings = tuple(item for item in items if isinstance(item, str))
        if any(not item for item in strings):
            raise EngineError("stop holds an empty string; leave it out")
        # Every token but an oddity adds a byte or more, so a stop string that ends with the
        # newest token lies within this many tokens; the rest is for cut UTF-8 at the seam.
        window = max((len(item.encode()) for item in strings), default=0) + 8
        return cls(frozenset(int(i) for i in items if not isinstance(i, str)), strings, window)

    def reached(self, tokens: List[int], vocabulary: Vocabulary) -> bool:
        """True if the newest of *tokens* ends the sequence."""
        if tokens[-1] in self.tokens:
            return True
        if not self.strings:
            return False
        text = vocabulary.text(tokens[-self.window :])
        return any(string in text for string in self.strings)


@dataclasses.dataclass(eq=False)
class _Job:
    """A checked request and what is known of its answer so far."""

    index: int
    request: SampleRequest
    prompt: npt.NDArray[np.int32]
    stop: StopRule
    limit: int
    open_sequences: int
    sequences: List[Optional[SampledSequence]]
    prompt_scores: Optional[_PromptScores]


@dataclasses.dataclass(eq=False)
class _Sequence:
    """One continuation in the making."""

    job: _Job
    number: int
    random: np.random.Generator
    tokens: List[int] = dataclasses.field(default_factory=list)
    logprobs: List[float] = dataclasses.field(default_factory=list)
    top_tokens: List[List[int]] = dataclasses.field(default_factory=list)
    top_logprobs: List[List[float]] = dataclasses.field(default_factory=list)
    stop_reason: str = ""

    def finish(self) -> None:
        """Hand the sequence over to its job."""
        topk: Optional[TopkLogprobs] = None
        if self.job.request.topk_sample_logprobs:
            topk = TopkLogprobs(
                np.array(self.top_tokens, dtype=np.int32),
                np.array(self.top_logprobs, dtype=np.float32),
            )
        self.job.sequences[self.number] = SampledSequence(
            self.stop_reason,
            np.array(self.tokens, dtype=np.int32),
            np.array(self.logprobs, dtype=np.float32),
            topk_logprobs_np=topk,
        )
        self.job.open_sequences -= 1


class _PromptScores:
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


class SampleRun:
    """One batch of requests on its way; `advance` does a slice of it.

    Call `advance` under ``torch.inference_mode`` and with the sampler's adapter active, until
    `done`.
    """

    def __init__(
        self,
        network: Network,
        vocabulary: Vocabulary,
        info: EngineInfo,
        requests: Sequence[SampleRequest],
    ) -> None:
        self._network = network
        self._vocabulary = vocabulary
        self._finished: List[Finished] = []
        self._jobs: Dict[int, _Job] = {}
        for index, request in enumerate(requests):
            try:
                self._jobs[index] = _check_request(index, request, vocabulary, info)
            except EngineError as error:
                self._finished.append((index, error))
        self._waves = _plan_waves(list(self._jobs.values()))
        self._steps = self._run()
        self.done = False

    def advance(self) -> List[Finished]:
        """Do one slice of work; return the requests it finished."""
        if next(self._steps, None) is None:
            self.done = True
        finished, self._finished = self._finished, []
        return finished

    def abandon(self, error: EngineError) -> List[Finished]:
        """Give up; return what is finished, and *error* for every request that is not."""
        self.done = True
        self._steps.close()
        return self._finished + [(index, error) for index in self._jobs]

    def _run(self) -> Generator[bool, None, None]:
        """The whole work, yielding True after each slice."""
        for wave in self._waves:
            jobs: List[_Job] = []
            for sequence in wave:
                if not jobs or jobs[-1] is not sequence.job:
                    jobs.append(sequence.job)
            sources: Dict[int, Tuple[Any, int, int]] = {}
            first: Dict[int, torch.Tensor] = {}
            for piece in prefill(self._network, [job.prompt for job in jobs]):
                for row, number in enumerate(piece.prompts):
                    self._take(piece, row, jobs[number], sources, first)
                yield True
            batch = DecodeBatch(self._network, [sources[s.job.index] for s in wave])
            logits = torch.stack([first[sequence.job.index] for sequence in wave])
            del piece, sources, first  # the prefill's cache is as large as the prompts
            yield from self._decode(wave, batch, logits)

    def _take(
        self,
        piece: PrefillPiece,
        row: int,
        job: _Job,
        sources: Dict[int, Tuple[Any, int, int]],
        first: Dict[int, torch.Tensor],
    ) -> None:
        """Note what *piece* says of *job*: prompt scores; at its end, the first logits."""
        features = piece.features[row, : max(0, job.prompt.size - piece.start)]
        if job.prompt_scores is not None:
            job.prompt_scores.add(self._network, piece.start, features)
        last = job.prompt.size - 1 - piece.start
        if 0 <= last < len(features):
            sources[job.index] = (piece.cache, row, job.prompt.size)
            first[job.index] = self._network.logits(features[last])

    def _decode(
        self, wave: List[_Sequence], batch: DecodeBatch, logits: torch.Tensor
    ) -> Generator[bool, None, None]:
        rows: List[_Sequence] = list(wave)
        for step in range(1, 1 << 62):
            self._extend(rows, logits)
            alive = [row for row, sequence in enumerate(rows) if not sequence.stop_reason]
            if not alive:
                yield True
                return
            if len(rows) - len(alive) >= max(1, _IDLE_SHARE * len(rows)):
                batch.keep(alive)
                rows = [rows[row] for row in alive]
            if step % SLICE_STEPS == 0:
                yield True
            logits = batch.step([sequence.tokens[-1] for sequence in rows])

    def _extend(self, rows: List[_Sequence], logits: torch.Tensor) -> None:
        """Draw the next token of each row that has not ended."""
        params = [sequence.job.request.sampling_params for sequence in rows]
        uniforms = [0.0 if sequence.stop_reason else sequence.random.random() for sequence in rows]
        tokens, logprobs = draw(logits, params, uniforms)
        for row, sequence in enumerate(rows):
            if sequence.stop_reason:
                continue
            sequence.tokens.append(tokens[row])
            sequence.logprobs.append(logprobs[row])
            k = sequence.job.request.topk_sample_logprobs
            if k:
                top = torch.topk(torch.log_softmax(logits[row], -1), k)
                sequence.top_tokens.append(top.indices.tolist())
                sequence.top_logprobs.append(top.values.tolist())
            if sequence.job.stop.reached(sequence.tokens, self._vocabulary):
                sequence.stop_reason = "stop"
            elif len(sequence.tokens) >= sequence.job.limit:
                sequence.stop_reason = "length"
            else:
                continue
            sequence.finish()
            if sequence.job.open_sequences == 0:
                self._finished.append((sequence.job.index, _answer(sequence.job)))
                del self._jobs[sequence.job.index]


def _answer(job: _Job) -> SampleResponse:
    sequences = [sequence for sequence in job.sequences if sequence is not None]
    scores, request = job.prompt_scores, job.request
    if scores is None:
        return SampleResponse(sequences)
    topk: Optional[TopkLogprobs] = None
    if request.topk_prompt_logprobs:
        topk = TopkLogprobs(scores.top_tokens, scores.top_logprobs)
    targets: Optional[TensorData] = None
    if scores.target_logprobs is not None and request.target_prompt_logprobs is not None:
        targets = _like(request.target_prompt_logprobs, scores.target_logprobs)
    return SampleResponse(
        sequences,
        prompt_logprobs_np=scores.logprobs if request.prompt_logprobs else None,
        topk_prompt_logprobs_np=topk,
        target_prompt_logprobs=targets,
    )


def _like(asked: TensorData, values: npt.NDArray[np.float32]) -> TensorData:
    """*values* in the shape and sparsity of *asked*."""
    if asked.crow_indices is None or asked.col_indices is None:
        return TensorData.from_numpy(values)
    rows = np.repeat(np.arange(asked.shape[0]), np.diff(asked.crow_indices))
    listed = values[rows, asked.col_indices]
    return TensorData(listed, "float32", asked.shape, asked.crow_indices, asked.col_indices)


def _plan_waves(jobs: Sequence[_Job]) -> List[List[_Sequence]]:
    """Lay the sequences of *jobs* out in batches that fit into memory together."""
    waves: List[List[_Sequence]] = []
    room = 0
    for job in jobs:
        needed = job.prompt.size + job.limit
        seed = job.request.sampling_params.seed
        entropy = None if seed is None else seed & 0xFFFFFFFFFFFFFFFF
        for number in range(job.request.num_samples):
            words = None if entropy is None else [entropy, number]
            sequence = _Sequence(job, number, np.random.default_rng(words))
            if not waves or needed > room:
                waves.append([])
                room = WAVE_TOKENS
            waves[-1].append(sequence)
            room -= needed
    return waves


def _check_request(
    index: int, request: SampleRequest, vocabulary: Vocabulary, info: EngineInfo
) -> _Job:
    prompt = check_tokens(request.prompt, info)
    params = request.sampling_params
    try:
        params.check()
    except InvalidInputError as error:
        raise EngineError(error.message) from error
    if request.num_samples < 1:
        raise EngineError(f"num_samples is {request.num_samples}; it must be at least 1")
    room = info.context_length - prompt.size
    limit = room if params.max_tokens is None else params.max_tokens
    if limit > room or room < 1:
        asked = "" if params.max_tokens is None else f" and max_tokens {params.max_tokens}"
        raise EngineError(
            f"a prompt of {prompt.size} tokens{asked}: the context of {info.model_name} holds "
            f"{info.context_length} tokens. Shorten the prompt or lower max_tokens"
        )
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if not 0 <= getattr(request, name) <= info.vocab_size:
            raise EngineError(f"{name} must lie in 0 to {info.vocab_size}")
    last = request.prompt_logprobs_last_n
    if last is not None and not 1 <= last <= max(1, prompt.size - 1):
        raise EngineError(
            f"prompt_logprobs_last_n is {last}; a prompt of {prompt.size} tokens has "
            f"{prompt.size - 1} logprobs"
        )
    if request.prompt_alt_tokens_k:
        raise EngineError("prompt_alt_tokens_k is not supported by this server; leave it at 0")
    targets = _check_target_prompt(request.target_prompt_logprobs, prompt.size, info)
    scores: Optional[_PromptScores] = None
    if request.prompt_logprobs or request.topk_prompt_logprobs or targets is not None:
        scores = _PromptScores(request, prompt, targets)
    stop = StopRule.of(params.stop, vocabulary)
    count = request.num_samples
    return _Job(index, request, prompt, stop, limit, count, [None] * count, scores)


def _check_target_prompt(
    tensor: Optional[TensorData], length: int, info: EngineInfo
) -> Optional[npt.NDArray[np.int64]]:
    """Token ids (length - 1, k) to score at each prompt position; -1 is none."""
    if tensor is None:
        return None
    targets = tensor.to_numpy(pad_value=-1)
    if tensor.dtype != "int64" or targets.ndim != 2 or targets.shape[0] != length - 1:
        raise EngineError(
            f"target_prompt_logprobs is {tensor.dtype} of shape {targets.shape}; it must be int64 "
            f"of shape ({length - 1}, k): one row per prompt token except the first"
        )
    if targets.size and not -1 <= int(targets.min()) <= int(targets.max()) < info.vocab_size:
        raise EngineError(
            f"target_prompt_logprobs holds a token outside -1 to {info.vocab_size - 1}"
        )
    return targets.astype(np.int64, copy=False)
