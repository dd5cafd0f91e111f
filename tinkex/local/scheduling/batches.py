"""Sample requests for the same weights, in batches that advance slice by slice.

Pure bookkeeping around the engine's iterators: no thread, no lock.  The scheduler's lock guards
queues and samplers; live batches belong to the engine thread alone, since the engine reads them
while it works.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import deque
from pathlib import Path
from typing import Deque, Dict, Hashable, Iterable, Iterator, List, NamedTuple, Optional, Set

from tinkex.local.engines.engine import Finished
from tinkex.local.settings import SamplingLimits
from tinkex.local.state.deduplication import SeenIds
from tinkex.types import SampleRequest

#: Most requests of one batch in its lifetime: finished requests stay in its lists.
MAX_BATCH_REQUESTS = 4096


@dataclasses.dataclass(eq=False)
class SampleJob:
    """One sample request.

    Attributes:
        cost: most tokens of key-value cache that it may take.
        arrived: when it was submitted, in clock seconds.
        began: when it joined a batch, in clock seconds.
        dropped: set under the scheduler's lock, once it is cancelled or its sampler closed.
    """

    sampler: Sampler
    request_id: str
    seq_id: int
    request: SampleRequest
    cost: int
    arrived: float
    began: float = 0.0
    dropped: bool = False


class WeightsSource(NamedTuple):
    """The weights that a sampler draws from.

    Attributes:
        key: samplers with equal keys have the same weights, and share batches.
        folder: folder of the adapter, which the scheduler owns from `Scheduler.add_sampler` on;
            None for the base model.
        name: for display: the name of a base model, a ``tinker://`` path, or the id of a run.
        newest: True if these weights replace the earlier weights with the same key.
    """

    key: Hashable
    folder: Optional[Path]
    name: str
    newest: bool = False

    def remove(self) -> None:
        """Remove the files."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class SamplerWeights:
    """Frozen weights to draw from, and the engine's name for them.

    They are removed, with their source, once they are retired and no batch uses them any more.
    """

    def __init__(self, engine_id: str, source: WeightsSource) -> None:
        self.engine_id = engine_id
        self.source = source
        self.batches = 0  # live batches; engine thread only, like the next two
        self.loaded = False
        self.retired = False  # True once no lane uses the weights any more


class Batch:
    """Requests that the engine works on together; more may join while it runs."""

    def __init__(self, weights: SamplerWeights) -> None:
        self.weights = weights
        self.jobs: List[SampleJob] = []
        self.requests: List[SampleRequest] = []  # of the jobs; read by the engine
        self.slices: Iterator[List[Finished]] = iter(())
        self.unfinished: Set[int] = set()  # indices of jobs, as in `dropped`
        self.dropped: Set[int] = set()  # cancelled while the batch runs; read by the engine
        self.sequences = 0  # continuations of the unfinished requests

    def add(self, job: SampleJob) -> None:
        """Add a request."""
        self.unfinished.add(len(self.jobs))
        self.jobs.append(job)
        # The engine reads this list with each slice, so this is all it takes to join a running one.
        self.requests.append(job.request)
        self.sequences += job.request.num_samples

    def remove(self, index: int) -> SampleJob:
        """Note that a request is finished, or dropped, and return its job."""
        # The request stays in the lists: the engine identifies requests by index.
        self.unfinished.remove(index)
        job = self.jobs[index]
        self.sequences -= job.request.num_samples
        return job


class SamplerLane:
    """The queue of all samplers that draw from the same weights, and their live batches.

    *key* identifies the weights.
    """

    def __init__(self, key: Hashable, weights: SamplerWeights) -> None:
        self.key = key
        self.weights = weights
        self.samplers = 0
        self.queued: Deque[SampleJob] = deque()
        self.wanted = True  # load the weights even if no request is queued yet
        self.live: Deque[Batch] = deque()  # engine thread only

    @property
    def is_over(self) -> bool:
        """True if no sampler uses the lane, and it has no live batch."""
        return not self.samplers and not self.live

    @property
    def has_work(self) -> bool:
        """True if requests are queued, or being sampled."""
        return bool(self.live or self.queued)

    def drop(self, jobs: Iterable[SampleJob]) -> int:
        """Drop requests, and return how many of them were queued."""
        # Jobs in a live batch are only marked: it belongs to the engine thread, which removes them
        # between two slices.
        for job in jobs:
            job.dropped = True
        # One pass for all: a session may end with thousands of queued requests.
        before = len(self.queued)
        self.queued = deque(job for job in self.queued if not job.dropped)
        return before - len(self.queued)

    def starts_at(self, limits: SamplingLimits) -> float:
        """Return when the queued requests, at least one, may form a batch, in clock seconds."""
        # A pause in the arrivals ends a burst, which should become one batch.  The bound on the
        # first request's wait keeps a steady stream from delaying the batch forever.
        first, last = self.queued[0].arrived, self.queued[-1].arrived
        return min(first + limits.gather_most_s, last + limits.gather_s)

    def may_start(self, limits: SamplingLimits, live_tokens: int, now: float) -> bool:
        """True if a new batch should start now; *live_tokens* is the cache of all live batches."""
        if not self.queued or len(self.live) >= limits.max_live_batches:
            return False
        # A request larger than the limit runs alone.
        room = live_tokens == 0 or live_tokens + self.queued[0].cost <= limits.max_live_tokens
        return room and now >= self.starts_at(limits)

    def fill(self, batch: Batch, limits: SamplingLimits, live_tokens: int) -> List[SampleJob]:
        """Move queued requests into *batch* as long as they fit; return them.

        The first request of a new batch always fits.
        """
        added: List[SampleJob] = []
        while self.queued and len(batch.jobs) < MAX_BATCH_REQUESTS:
            job = self.queued[0]
            live_tokens += job.cost
            fits = (
                live_tokens <= limits.max_live_tokens
                and batch.sequences + job.request.num_samples <= limits.max_batch_sequences
            )
            # Don't overtake a request that does not fit: a stream of small requests would keep a
            # large one waiting forever.
            if not fits and batch.jobs:
                break
            batch.add(self.queued.popleft())
            added.append(job)
        return added


class Sampler:
    """A sampler that clients know by its id, and its unfinished requests."""

    def __init__(self, sampler_id: str, session_id: str, lane: SamplerLane) -> None:
        self.sampler_id = sampler_id
        self.session_id = session_id
        self.lane = lane
        self.jobs: Dict[str, SampleJob] = {}  # by request id
        # A retry has the same seq_id, and gets the same sample (docs/protocol.md, "Sample
        # requests").
        self.seen = SeenIds(sampler_id)
        self.clones = 0  # clients that joined after the first one
