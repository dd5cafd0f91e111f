"""Groups the sample requests of one sampler into batches that advance slice by slice.

Pure bookkeeping around the engine's iterators: no thread, no lock.  The queue is guarded by
the scheduler's lock; the live batches belong to the engine thread alone.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from pathlib import Path
from typing import Deque, Iterator, List, Optional

from tinkex.local.engine import Finished
from tinkex.local.lanes import SeenIds
from tinkex.types import SampleRequest


@dataclasses.dataclass(frozen=True)
class SamplingLimits:
    """How sampling shares the engine.

    Args:
        max_live_tokens: key-value cache of all live batches together, in tokens of prompt and
            continuation.  A single request may exceed it; it then runs alone.
        max_batch_sequences: most continuations in one batch.
        max_live_batches: most batches of one sampler that advance in turn.
        gather_s: a batch starts when no new request came for this long, ...
        gather_most_s: ... or the first one has waited for this long.
        max_loaded: most samplers the engine holds; the one unused longest makes room.
        max_queued: most sample requests that wait; beyond it submissions answer 429.
    """

    max_live_tokens: int = 65_536
    max_batch_sequences: int = 64
    max_live_batches: int = 4
    gather_s: float = 0.008
    gather_most_s: float = 0.05
    max_loaded: int = 16
    max_queued: int = 10_000


@dataclasses.dataclass(frozen=True)
class SampleJob:
    """One sample request in a queue.  *cost* is its cache in tokens, *arrived* monotonic."""

    request_id: str
    seq_id: int
    request: SampleRequest
    cost: int
    arrived: float


class Batch:
    """Requests that the engine works on together."""

    def __init__(self, jobs: List[SampleJob], slices: Iterator[List[Finished]]) -> None:
        self.jobs = jobs
        self.slices = slices
        self.unfinished = set(range(len(jobs)))
        self.cost = sum(job.cost for job in jobs)


class SamplerLane:
    """The queue of one sampler, and its live batches."""

    def __init__(self, sampler_id: str, session_id: str, folder: Optional[Path]) -> None:
        self.sampler_id = sampler_id
        self.session_id = session_id
        self.folder = folder  # frozen adapter, or None for the base model
        self.queued: Deque[SampleJob] = deque()
        self.closed: Optional[str] = None
        self.loaded = False  # engine thread only
        self.wanted = True  # it is to be loaded although nothing is queued yet
        self.live: Deque[Batch] = deque()  # engine thread only
        self.seen = SeenIds(sampler_id)

    def starts_at(self, limits: SamplingLimits) -> float:
        """The instant from which the queued requests may form a batch; there must be some."""
        first, last = self.queued[0].arrived, self.queued[-1].arrived
        return min(first + limits.gather_most_s, last + limits.gather_s)

    def may_start(self, limits: SamplingLimits, live_tokens: int, now: float) -> bool:
        """True if a new batch should start now; *live_tokens* is the cache in use by all."""
        if not self.queued or len(self.live) >= limits.max_live_batches:
            return False
        room = live_tokens == 0 or live_tokens + self.queued[0].cost <= limits.max_live_tokens
        return room and now >= self.starts_at(limits)

    def take_batch(self, limits: SamplingLimits, live_tokens: int) -> List[SampleJob]:
        """Remove and return the next batch: the first request always, more while they fit."""
        jobs = [self.queued.popleft()]
        sequences = jobs[0].request.num_samples
        tokens = live_tokens + jobs[0].cost
        while self.queued:
            job = self.queued[0]
            sequences += job.request.num_samples
            tokens += job.cost
            if sequences > limits.max_batch_sequences or tokens > limits.max_live_tokens:
                break
            jobs.append(self.queued.popleft())
        return jobs
