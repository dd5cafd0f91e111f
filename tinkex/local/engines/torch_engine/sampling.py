"""Runs sample requests as one batch, a slice at a time.

A SampleRun is a state machine that the engine advances; each advance computes about 8 tokens of
every row, or one piece of prefill, alternating if there is both.  Requests that arrive while it
runs are prefilled and join the rows; finished ones leave.  What a row draws depends only on its own
request, seed and sample number, not on what else is in the batch (up to float rounding of the
matrix products).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Container, Deque, Dict, Generator, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch

from tinkex.local.engines.engine import (
    EngineError,
    EngineInfo,
    Finished,
    SampledToken,
    StreamingRequest,
)
from tinkex.local.engines.torch_engine.decoding import DecodeBatch, PrefillPiece, Source, prefill
from tinkex.local.engines.torch_engine.drawing import draw
from tinkex.local.engines.torch_engine.network import Network
from tinkex.local.engines.torch_engine.sample_jobs import Job, check_request, response_of
from tinkex.local.engines.torch_engine.stopping import GeneratedText, Vocabulary
from tinkex.types import SampledSequence, SampleRequest, TopkLogprobs

#: Decode steps of one slice.
SLICE_STEPS = 8

#: Maximum tokens of one decode batch; further rows wait.  Each row counts as long as the longest
#: one (prompt and longest continuation), because the cache is a rectangle.  SmolLM2 keeps 46 kB per
#: token in float32, so at most 6 GB.
BATCH_TOKENS = 131072

# Ended rows leave the batch only once they make up this share of it: removing rows copies the
# cache.
_IDLE_SHARE = 0.25


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A continuation that is being generated."""

    job: Job
    number: int
    random: np.random.Generator
    text: Optional[GeneratedText]
    tokens: List[int] = dataclasses.field(default_factory=list)
    logprobs: List[float] = dataclasses.field(default_factory=list)
    top_tokens: List[List[int]] = dataclasses.field(default_factory=list)
    top_logprobs: List[List[float]] = dataclasses.field(default_factory=list)
    stop_reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether no more tokens will be drawn."""
        return bool(self.stop_reason) or self.job.dropped

    def report(self) -> None:
        """Report the newest token, if the request has a callback for tokens."""
        request = self.job.request
        if not isinstance(request, StreamingRequest) or request.on_token is None:
            return
        top: List[Tuple[int, float]] = []
        if self.top_tokens:
            top = list(zip(self.top_tokens[-1], self.top_logprobs[-1]))
        reason = self.stop_reason or None
        request.on_token(SampledToken(self.number, self.tokens[-1], self.logprobs[-1], top, reason))

    def finish(self) -> None:
        """Store the finished sequence in its job."""
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


class SampleRun:
    """A batch of requests that is being computed; `advance` does a slice of the work.

    Call `advance` under ``torch.inference_mode`` and with the sampler's adapter active, until
    `done`.

    Args:
        requests: may grow; requests that are appended join with the next slice.
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
        self._info = info
        self._requests = requests
        self._taken = 0  # requests taken so far
        self._finished: List[Finished] = []
        self._jobs: Dict[int, Job] = {}  # not finished
        self._waiting: Deque[_Sequence] = deque()
        self._rows: List[_Sequence] = []  # of the decode batch
        self._batch = DecodeBatch(network, info.context_length)
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
        for index in [index for index in self._jobs if index in dropped]:
            self._jobs.pop(index).dropped = True

    def abandon(self, error: EngineError) -> List[Finished]:
        """Stop; return the finished requests, and *error* for every unfinished one."""
        self.done = True
        self._steps.close()
        return self._finished + [(index, error) for index in self._jobs]

    def _run(self) -> Generator[bool, None, None]:
        """Do all the work, yielding True after each slice."""
        joining: Optional[Generator[bool, None, None]] = None
        while True:
            self._take_requests()
            # A piece of prefill, then a slice of decoding: long prompts do not hold up running
            # rows, nor long continuations new requests.
            if joining is None:
                admitted = self._admit()
                joining = self._join(admitted) if admitted else None
            if joining is not None:
                if next(joining, None) is None:
                    joining = None
                yield True
            if self._rows:
                yield from self._decode()
                yield True
            elif joining is None and not self._waiting and self._taken == len(self._requests):
                return

    def _take_requests(self) -> None:
        """Check the newly added requests, and queue their sequences."""
        for index in range(self._taken, len(self._requests)):
            try:
                job = check_request(index, self._requests[index], self._vocabulary, self._info)
            except EngineError as error:
                self._finished.append((index, error))
                continue
            self._jobs[index] = job
            self._waiting.extend(_sequences_of(job, self._vocabulary))
        self._taken = len(self._requests)

    def _admit(self) -> List[_Sequence]:
        """Dequeue and return the waiting sequences that fit; at least one if the batch is empty."""
        # Reserve room for the longest continuation, so that a batch never runs out of room later.
        lengths = [row.job.length for row in self._rows if not row.ended]
        count, longest = len(lengths), max(lengths, default=0)
        admitted: List[_Sequence] = []
        while self._waiting:
            sequence = self._waiting[0]
            if not sequence.ended:
                count, longest = count + 1, max(longest, sequence.job.length)
                if count > 1 and count * longest > BATCH_TOKENS:
                    break  # in order of arrival: shorter ones behind it do not overtake
                admitted.append(sequence)
            self._waiting.popleft()
        return admitted

    def _join(self, admitted: List[_Sequence]) -> Generator[bool, None, None]:
        """Prefill, draw the first tokens, and add the sequences that continue to the rows.

        Yields True between pieces of prefill.
        """
        # Once per request: its samples share the prompt.
        jobs = list(dict.fromkeys(sequence.job for sequence in admitted))
        sources: Dict[Job, Source] = {}
        ends: Dict[Job, torch.Tensor] = {}
        for piece in prefill(self._network, [job.prompt for job in jobs]):
            for row, number in enumerate(piece.prompts):
                self._take_piece(piece, row, jobs[number], sources, ends)
            is_last = piece.is_last
            del piece  # before the next one is computed
            if not is_last:
                yield True
        # One pass through the output layer for all prompts: it is the largest matrix.
        scores = self._network.logits(torch.stack([ends[job] for job in jobs]))
        numbers = {job: number for number, job in enumerate(jobs)}
        self._extend(admitted, scores[[numbers[sequence.job] for sequence in admitted]])
        going = [sequence for sequence in admitted if not sequence.ended]
        if going:
            self._regroup([sources[sequence.job] for sequence in going])
            self._rows += going

    def _take_piece(
        self,
        piece: PrefillPiece,
        row: int,
        job: Job,
        sources: Dict[Job, Source],
        ends: Dict[Job, torch.Tensor],
    ) -> None:
        """Store what *piece* gives *job*: prompt scores and, at the prompt's end, its features."""
        if job.prompt_scores is not None:
            features = piece.features[row, : max(0, job.prompt.size - piece.start)]
            job.prompt_scores.add(self._network, piece.start, features)
        end = piece.end_of(row, job.prompt.size)
        if end is not None:
            sources[job] = Source(piece.cache, row, job.prompt.size)
            ends[job] = end

    def _regroup(self, added: Sequence[Source] = ()) -> None:
        """Remove ended rows from the decode batch, and add a row for each of *added*."""
        alive = [row for row, sequence in enumerate(self._rows) if not sequence.ended]
        self._batch.regroup(alive, added)
        self._rows = [self._rows[row] for row in alive]

    def _decode(self) -> Generator[bool, None, None]:
        """Draw a slice's tokens for each row."""
        for _ in range(SLICE_STEPS):
            # Before the step, which would mix keys of the new frequencies with keys of the old
            # ones.
            yield from self._update()
            logits = self._batch.step([sequence.tokens[-1] for sequence in self._rows])
            self._extend(self._rows, logits)
            ended = sum(sequence.ended for sequence in self._rows)
            if ended >= max(1, _IDLE_SHARE * len(self._rows)):
                self._regroup()
            if not self._rows:
                return

    def _update(self) -> Generator[bool, None, None]:
        """Recompute the rows that are about to reach a length with other rotary frequencies."""
        # The newest token is not in the cache yet: the step appends it.  Hence tokens[:-1], and
        # more_tokens=1 for the length whose frequencies apply.
        rows = self._rows
        outdated = [row for row in self._batch.outdated() if not rows[row].ended]
        texts = [
            np.append(rows[row].job.prompt, rows[row].tokens[:-1]).astype(np.int32)
            for row in outdated
        ]
        # One slice per piece, as these rows may be long.
        for piece in prefill(self._network, texts, more_tokens=1):
            for source, index in enumerate(piece.prompts):
                if piece.end_of(source, texts[index].size) is not None:
                    self._batch.replace(outdated[index], piece.cache, source)
            del piece
            yield True

    def _extend(self, rows: List[_Sequence], logits: torch.Tensor) -> None:
        """Draw the next token of each row that has not ended."""
        params = [sequence.job.request.sampling_params for sequence in rows]
        # One number per token from the sequence's own generator, so that a seed gives the same
        # tokens in any batch.  Rows that have ended may still be in the batch; they draw no number.
        uniforms = [0.0 if sequence.ended else sequence.random.random() for sequence in rows]
        tokens, logprobs = draw(logits, params, uniforms)
        for row, sequence in enumerate(rows):
            if sequence.ended:
                continue
            sequence.tokens.append(tokens[row])
            sequence.logprobs.append(logprobs[row])
            # Tokens include the one that ends a sequence (docs/protocol.md, "Sample results").
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
            if all(sequence.job.sequences):
                self._finished.append((sequence.job.index, response_of(sequence.job)))
                del self._jobs[sequence.job.index]


def _sequences_of(job: Job, vocabulary: Vocabulary) -> Iterator[_Sequence]:
    """Yield the sequences of *job*, each with its own random numbers."""
    # numpy takes no negative seeds; two's complement keeps all 64-bit seeds distinct.  SeedSequence
    # mixes seed and sample number, so that neighbouring values have independent streams.
    seed = job.request.sampling_params.seed
    entropy = None if seed is None else seed & 0xFFFFFFFFFFFFFFFF
    for number in range(job.request.num_samples):
        words = None if entropy is None else [entropy, number]
        text = job.stop.follow(job.prompt, vocabulary)
        yield _Sequence(job, number, np.random.default_rng(words), text)
