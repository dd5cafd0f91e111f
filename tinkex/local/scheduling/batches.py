"""Groups the sample requests of one sampler into batches that advance slice by slice.

Pure bookkeeping around the engine's iterators: no thread, no lock.  The queue is guarded by
the scheduler's lock; the live batches belong to the engine thread alone.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from pathlib import Path
from typing import Deque, Iterator, List, Optional, Set

from tinkex.local.engines.engine import Finished
from tinkex.local.scheduling.lanes import SeenIds
from tinkex.local.settings import SamplingLimits
from tinkex.types import SampleRequest


@dataclasses.dataclass(frozen=True)
class SampleJob:
    """One sample request in a queue.  *cost* is its cache in tokens, *arrived* monotonic."""

    request_id: str
    seq_id: int
    request: SampleRequest
    cost: int
    arrived: float


class SamplerWeights:
    """Frozen weights that one or more samplers draw from, and the engine's name for them.

    They are released when no sampler and no batch uses them any more.

    Args:
        engine_id: the engine's name for them.
        folder: holds the adapter, and is removed with the weights; None is the base model.
    """

    def __init__(self, engine_id: str, folder: Optional[Path]) -> None:
        self.engine_id = engine_id
        self.folder = folder
        self.samplers = 0  # guarded by the scheduler's lock
        self.batches = 0  # engine thread only, like the next one
        self.loaded = False


class Batch:
    """Requests that the engine works on together."""

    def __init__(self, jobs: List[SampleJob], weights: SamplerWeights) -> None:
        self.jobs = jobs
        self.weights = weights
        self.slices: Iterator[List[Finished]] = iter(())
        self.unfinished = set(range(len(jobs)))
        self.dropped: Set[int] = set()  # cancelled while it ran; the engine looks at it
        self.cost = sum(job.cost for job in jobs)


class SamplerLane:
    """The queue of one sampler, and its live batches.

    *follows* is the training run whose newest weights it draws from, if it is an inflight one.
    """

    def __init__(
        self,
        sampler_id: str,
        session_id: str,
        weights: SamplerWeights,
        follows: Optional[str] = None,
    ) -> None:
        self.sampler_id = sampler_id
        self.session_id = session_id
        self.weights = weights
        self.follows = follows
        self.queued: Deque[SampleJob] = deque()
        self.cancelled: Set[str] = set()  # request ids that were not queued any more
        self.closed: Optional[str] = None
        self.wanted = True  # it is to be loaded although nothing is queued yet
        self.live: Deque[Batch] = deque()  # engine thread only
        self.seen = SeenIds(sampler_id)
        self.clones = 0  # clients that joined after the first one

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
