"""Runs sample requests as one batch, a slice at a time.

A SampleRun is a state machine that the engine advances; each advance is about 8 tokens of every
row, or one piece of prefill.  What a row draws depends on its own request, seed and sample number
only, not on what else is in the batch (up to float rounding of the matrix products).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Container, Dict, Generator, List, Optional, Sequence, Tuple

import numpy as np
import torch

from tinkex.local.engines.engine import (
    EngineError,
    EngineInfo,
    Finished,
    SampledToken,
    StreamingRequest,
)
from tinkex.local.engines.torch_engine.decoding import DecodeBatch, PrefillPiece, prefill
from tinkex.local.engines.torch_engine.drawing import draw
from tinkex.local.engines.torch_engine.generated_text import GeneratedText
from tinkex.local.engines.torch_engine.network import Network
from tinkex.local.engines.torch_engine.sample_jobs import (
    Job,
    Vocabulary,
    check_request,
    response_of,
)
from tinkex.types import SampledSequence, SampleRequest, TopkLogprobs

#: Decode steps of one slice.
SLICE_STEPS = 8

#: Most tokens (prompt and longest continuation, all rows) of one decode batch; more wait.
WAVE_TOKENS = 131072

# Rows that ended leave the batch once this share of it is idle: leaving copies the cache.
_IDLE_SHARE = 0.25


@dataclasses.dataclass(eq=False)
class _Sequence:
    """One continuation in the making."""

    job: Job
    number: int
    random: np.random.Generator
    text: Optional[GeneratedText]
    tokens: List[int] = dataclasses.field(default_factory=list)
    logprobs: List[float] = dataclasses.field(default_factory=list)
    top_tokens: List[List[int]] = dataclasses.field(default_factory=list)
    top_logprobs: List[List[float]] = dataclasses.field(default_factory=list)
    stop_reason: str = ""

    def report(self) -> None:
        """Report the newest token, if the request follows them."""
        request = self.job.request
        if not isinstance(request, StreamingRequest) or request.on_token is None:
            return
        top: List[Tuple[int, float]] = []
        if self.top_tokens:
            top = list(zip(self.top_tokens[-1], self.top_logprobs[-1]))
        reason = self.stop_reason or None
        request.on_token(SampledToken(self.number, self.tokens[-1], self.logprobs[-1], top, reason))

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
        self._context_length = info.context_length
        self._finished: List[Finished] = []
        self._jobs: Dict[int, Job] = {}
        for index, request in enumerate(requests):
            try:
                self._jobs[index] = check_request(index, request, vocabulary, info)
            except EngineError as error:
                self._finished.append((index, error))
        self._waves = _plan_waves(list(self._jobs.values()), vocabulary)
        self._steps = self._run()
        self.done = False

    def advance(self) -> List[Finished]:
        """Do one slice of work; return the requests it finished."""
        if next(self._steps, None) is None:
            self.done = True
        finished, self._finished = self._finished, []
        return finished

    def drop(self, dropped: Container[int]) -> None:
        """End the requests whose index is in *dropped*, without a result."""
        gone = [index for index in self._jobs if index in dropped]
        if not gone:
            return
        for index in gone:
            del self._jobs[index]
        for wave in self._waves:
            for sequence in wave:
                if sequence.job.index in gone and not sequence.stop_reason:
                    sequence.stop_reason = "dropped"

    def abandon(self, error: EngineError) -> List[Finished]:
        """Give up; return what is finished, and *error* for every request that is not."""
        self.done = True
        self._steps.close()
        return self._finished + [(index, error) for index in self._jobs]

    def _run(self) -> Generator[bool, None, None]:
        """Do all the work, yielding True after each slice."""
        for planned in self._waves:
            wave = [sequence for sequence in planned if not sequence.stop_reason]
            if not wave:  # all of them were dropped
                continue
            jobs: List[Job] = []
            for sequence in wave:
                if not jobs or jobs[-1] is not sequence.job:
                    jobs.append(sequence.job)
            sources: Dict[int, Tuple[Any, int, int]] = {}
            ends: Dict[int, torch.Tensor] = {}
            for piece in prefill(self._network, [job.prompt for job in jobs]):
                for row, number in enumerate(piece.prompts):
                    self._take(piece, row, jobs[number], sources, ends)
                del piece  # before the next one is computed
                yield True
            batch = DecodeBatch(
                self._network, [sources[s.job.index] for s in wave], self._context_length
            )
            # One pass through the output layer for all prompts: it is the largest matrix.
            scores = self._network.logits(torch.stack([ends[job.index] for job in jobs]))
            numbers = {job.index: number for number, job in enumerate(jobs)}
            logits = scores[[numbers[sequence.job.index] for sequence in wave]]
            del sources, ends  # the prefill's cache is as large as the prompts
            yield from self._decode(wave, batch, logits)

    def _take(
        self,
        piece: PrefillPiece,
        row: int,
        job: Job,
        sources: Dict[int, Tuple[Any, int, int]],
        ends: Dict[int, torch.Tensor],
    ) -> None:
        """Note the results of *piece* for *job*: prompt scores; at its end, the features."""
        if job.prompt_scores is not None:
            features = piece.features[row, : max(0, job.prompt.size - piece.start)]
            job.prompt_scores.add(self._network, piece.start, features)
        end = piece.end_of(row, job.prompt.size)
        if end is not None:
            sources[job.index] = (piece.cache, row, job.prompt.size)
            ends[job.index] = end

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
            yield from self._update(rows, batch)
            # A row that was dropped before its first token is carried along with any token.
            logits = batch.step([row.tokens[-1] if row.tokens else 0 for row in rows])

    def _update(self, rows: List[_Sequence], batch: DecodeBatch) -> Generator[bool, None, None]:
        """Compute again the rows that grow into a length with other rotary frequencies."""
        outdated = [row for row in batch.outdated() if not rows[row].stop_reason]
        texts = [
            np.append(rows[row].job.prompt, rows[row].tokens[:-1]).astype(np.int32)
            for row in outdated
        ]
        for piece in prefill(self._network, texts, more_tokens=1):
            for source, index in enumerate(piece.prompts):
                if piece.end_of(source, texts[index].size) is not None:
                    batch.replace(outdated[index], piece.cache, source)
            del piece
            yield True

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
            if sequence.job.stop.reached(tokens[row], sequence.text):
                sequence.stop_reason = "stop"
            elif len(sequence.tokens) >= sequence.job.limit:
                sequence.stop_reason = "length"
            sequence.report()
            if not sequence.stop_reason:
                continue
            sequence.finish()
            if sequence.job.open_sequences == 0:
                self._finished.append((sequence.job.index, response_of(sequence.job)))
                del self._jobs[sequence.job.index]


def _plan_waves(jobs: Sequence[Job], vocabulary: Vocabulary) -> List[List[_Sequence]]:
    """Lay the sequences of *jobs* out in batches that fit into memory together."""
    waves: List[List[_Sequence]] = []
    room = 0
    for job in jobs:
        needed = job.prompt.size + job.limit
        seed = job.request.sampling_params.seed
        entropy = None if seed is None else seed & 0xFFFFFFFFFFFFFFFF
        for number in range(job.request.num_samples):
            words = None if entropy is None else [entropy, number]
            text = job.stop.follow(job.prompt, vocabulary)
            sequence = _Sequence(job, number, np.random.default_rng(words), text)
            if not waves or needed > room:
                waves.append([])
                room = WAVE_TOKENS
            waves[-1].append(sequence)
            room -= needed
    return waves
