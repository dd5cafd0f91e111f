"""Sample requests for the same weights, in batches that advance slice by slice.

Pure bookkeeping around the engine's iterators: no thread, no lock.  Queues and samplers are guarded
by the scheduler's lock; live batches belong to the engine thread alone, since the engine reads them
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

#: Most requests of one batch in its lifetime: those that are done stay in its list.
MAX_BATCH_REQUESTS = 4096


@dataclasses.dataclass(eq=False)
class SampleJob:
    """One sample request.

    Attributes:
        cost: its cache in tokens.
        arrived: in clock seconds.
        began: when it joined a batch, in clock seconds.
        dropped: set, under the scheduler's lock, when it is cancelled or its sampler closed.
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
        folder: holds the adapter, and belongs to the scheduler from then on; None is the base
            model.
        name: of the weights, for display: a base model, a ``tinker://`` path, or the id of a run.
        newest: from now on they take the place of the earlier weights with this key.
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
        self.batches = 0  # engine thread only, like the next two
        self.loaded = False
        self.retired = False  # no lane uses them any more


class Batch:
    """Requests that the engine works on together; more may join while it runs."""

    def __init__(self, weights: SamplerWeights) -> None:
        self.weights = weights
        self.jobs: List[SampleJob] = []
        self.requests: List[SampleRequest] = []  # of the jobs; the engine looks at it
        self.slices: Iterator[List[Finished]] = iter(())
        self.unfinished: Set[int] = set()
        self.dropped: Set[int] = set()  # cancelled while it ran; the engine looks at it
        self.sequences = 0  # of the requests that are not finished

    def add(self, job: SampleJob) -> None:
        """Add a request."""
        self.unfinished.add(len(self.jobs))
        self.jobs.append(job)
        # The engine reads this list with its next slice, so joining a running batch takes no more.
        self.requests.append(job.request)
        self.sequences += job.request.num_samples

    def remove(self, index: int) -> SampleJob:
        """Note that a request is finished, or dropped, and return its job."""
        # It stays in the lists: the engine identifies requests by their index.
        self.unfinished.remove(index)
        job = self.jobs[index]
        self.sequences -= job.request.num_samples
        return job


class SamplerLane:
    """The queue of all samplers that draw from the same weights, and their live batches.

    *key* identifies what they draw from.
    """

    def __init__(self, key: Hashable, weights: SamplerWeights) -> None:
        self.key = key
        self.weights = weights
        self.samplers = 0
        self.queued: Deque[SampleJob] = deque()
        self.wanted = True  # the weights are to be loaded although nothing is queued yet
        self.live: Deque[Batch] = deque()  # engine thread only

    @property
    def is_over(self) -> bool:
        """True if no sampler uses it, and none of its batches is live."""
        return not self.samplers and not self.live

    @property
    def has_work(self) -> bool:
        """True if requests are queued, or being sampled."""
        return bool(self.live or self.queued)

    def drop(self, jobs: Iterable[SampleJob]) -> int:
        """Drop requests, and return how many of them were queued."""
        # The mark is for those in a live batch: that is the engine thread's, which takes them out
        # between two slices.
        for job in jobs:
            job.dropped = True
        # One pass for all of them: a session may end with thousands queued.
        before = len(self.queued)
        self.queued = deque(job for job in self.queued if not job.dropped)
        return before - len(self.queued)

    def starts_at(self, limits: SamplingLimits) -> float:
        """The instant from which the queued requests may form a batch; there must be some."""
        # A pause in the arrivals ends a burst, which is to be one batch; the bound on the first
        # one's wait keeps a steady stream from delaying it forever.
        first, last = self.queued[0].arrived, self.queued[-1].arrived
        return min(first + limits.gather_most_s, last + limits.gather_s)

    def may_start(self, limits: SamplingLimits, live_tokens: int, now: float) -> bool:
        """True if a new batch should start now; *live_tokens* is the cache in use by all."""
        if not self.queued or len(self.live) >= limits.max_live_batches:
            return False
        # A request that is larger than the limit runs, too, when it has the engine for itself.
        room = live_tokens == 0 or live_tokens + self.queued[0].cost <= limits.max_live_tokens
        return room and now >= self.starts_at(limits)

    def fill(self, batch: Batch, limits: SamplingLimits, live_tokens: int) -> List[SampleJob]:
        """Move queued requests into *batch* as long as they fit; return them.

        The first one of a new batch fits always.
        """
        added: List[SampleJob] = []
        while self.queued and len(batch.jobs) < MAX_BATCH_REQUESTS:
            job = self.queued[0]
            live_tokens += job.cost
            fits = (
                live_tokens <= limits.max_live_tokens
                and batch.sequences + job.request.num_samples <= limits.max_batch_sequences
            )
            # In order of arrival, without a look behind it: a stream of small requests would
            # otherwise keep a large one waiting forever.
            if not fits and batch.jobs:
                break
            batch.add(self.queued.popleft())
            added.append(job)
        return added


class Sampler:
    """A sampler that clients know by its id, and its requests that are not done."""

    def __init__(self, sampler_id: str, session_id: str, lane: SamplerLane) -> None:
        self.sampler_id = sampler_id
        self.session_id = session_id
        self.lane = lane
        self.jobs: Dict[str, SampleJob] = {}  # by request id
        # A retry keeps its seq_id, and is the same sample (docs/protocol.md, "Sample requests").
        self.seen = SeenIds(sampler_id)
        self.clones = 0  # clients that joined after the first one
