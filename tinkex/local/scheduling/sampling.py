"""What the engine thread does for samplers: load weights; start, advance and end batches.

Used by that thread only, so it needs no lock of its own; the scheduler's lock guards the queues.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Callable, Optional, cast

from tinkex.local.engines.engine import Engine, EngineError
from tinkex.local.errors import HTTPError
from tinkex.local.scheduling.batches import Batch, SampleJob, SamplerLane, SamplerWeights
from tinkex.local.scheduling.scheduler import Scheduler
from tinkex.local.settings import SamplingLimits
from tinkex.local.state.futures import Failure, FutureTable, Outcome, Success
from tinkex.types import SampleRequest, SampleResponse

_log = logging.getLogger(__name__)

#: Called with the name of the weights, a request, its response, and when the request joined a batch
#: (monotonic).
OnSampled = Callable[[str, SampleRequest, SampleResponse, float], None]


class SamplingWorker:
    """The samplers' share of the engine.

    Args:
        engine: does the work.
        scheduler: has the queues; its lock is taken only briefly, never while the engine works.
        futures: gets the results.
        limits: how sampling shares the engine.
        clock: returns monotonic seconds.
        on_sampled: called for each successful request, with no lock held.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        futures: FutureTable,
        limits: SamplingLimits,
        clock: Callable[[], float],
        on_sampled: OnSampled,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._lock = scheduler.rotation.lock
        self._futures = futures
        self._limits = limits
        self._clock = clock
        self._on_sampled = on_sampled
        self._loaded: OrderedDict[str, SamplerWeights] = OrderedDict()  # least recently used first
        self._live_tokens = 0

    def runnable(self, lane: SamplerLane, now: float) -> bool:
        """True if `serve` would have something to do for *lane* now."""
        # A lane without samplers gets a turn, too: its batches must end before it is removed.
        return bool(
            lane.live
            or lane.wanted
            or not lane.samplers
            or lane.may_start(self._limits, self._live_tokens, now)
        )

    def serve(self, lane: SamplerLane) -> None:
        """Move queued requests of a lane into batches, then do one slice of one of its batches."""
        # A lane without samplers only has batches to end: their requests have been dropped.
        with self._lock:
            weights = lane.weights if lane.samplers else None
        if weights is not None and self._load(lane, weights):
            self._take(lane, weights)
        if lane.live:
            self._advance(lane)

    def end(self, lane: SamplerLane) -> None:
        """Abandon the batches of a lane whose requests have failed already; remove its weights."""
        while lane.live:
            self._end_batch(lane.live.popleft())
        self.remove(lane.weights)

    def remove(self, weights: SamplerWeights) -> None:
        """Remove *weights*, which no lane uses any more, once no batch uses them either."""
        weights.retired = True
        if weights.batches:
            return
        if weights.loaded:
            self._unload(weights)
        weights.source.remove()

    def _load(self, lane: SamplerLane, weights: SamplerWeights) -> bool:
        """Load *weights* into the engine; if that fails, fail the queued requests, return False."""
        # Even if loading fails: the next request tries again, not the engine thread in a loop.
        lane.wanted = False
        if not weights.loaded:
            # Weights that batches draw from have to stay, even if more than *max_loaded* do.
            for other in list(self._loaded.values()):
                if len(self._loaded) < self._limits.max_loaded:
                    break
                if not other.batches:
                    self._unload(other)
            try:
                self._engine.create_sampler(weights.engine_id, weights.source.folder)
            except Exception as error:
                failure = failure_of(error, weights.engine_id)
                with self._lock:
                    jobs = list(lane.queued)
                    self._scheduler.count_dequeued_locked(lane.drop(jobs))
                # Outside the lock, which `_complete` takes.
                for job in jobs:
                    self._complete(job, failure)
                return False
            weights.loaded = True
            self._loaded[weights.engine_id] = weights
        self._loaded.move_to_end(weights.engine_id)
        return True

    def _take(self, lane: SamplerLane, weights: SamplerWeights) -> None:
        """Have queued requests join the live batches that have room, or start another one."""
        started = Batch(weights)
        with self._lock:
            # A batch keeps its weights to its end, even if its lane has newer ones.  Requests join
            # a running batch at once: only a new batch waits for requests to gather.
            for batch in lane.live:
                if batch.weights is weights:
                    self._fill(lane, batch)
            if lane.may_start(self._limits, self._live_tokens, self._clock()):
                self._fill(lane, started)
        if not started.jobs:
            return
        # Before the engine draws from them: weights with a batch are neither unloaded nor removed.
        weights.batches += 1
        lane.live.append(started)
        # Outside the lock: the engine may work for long, while HTTP threads submit and cancel.
        try:
            # The engine reads `requests` and `dropped` again with each slice: requests join the
            # batch, or are cancelled, while it runs.
            started.slices = self._engine.sample(
                weights.engine_id, started.requests, started.dropped
            )
        except Exception as error:
            lane.live.remove(started)
            self._end_batch(started, failure_of(error, weights.engine_id))

    def _fill(self, lane: SamplerLane, batch: Batch) -> None:
        added = lane.fill(batch, self._limits, self._live_tokens)
        self._live_tokens += sum(job.cost for job in added)
        now = self._clock()
        for job in added:
            job.began = now
        self._scheduler.count_dequeued_locked(len(added))

    def _advance(self, lane: SamplerLane) -> None:
        """Do one slice of the next batch."""
        # The lane's batches take turns: taken from the front here, put back at the end below.
        batch = lane.live.popleft()
        # Other threads only mark a job as dropped; what the engine reads is changed here, between
        # two slices.
        for index in [index for index in batch.unfinished if batch.jobs[index].dropped]:
            batch.dropped.add(index)
            self._remove(batch, index)
        failure: Optional[Failure] = None
        # If all requests were cancelled, a slice would be wasted work.
        if batch.unfinished:
            try:
                for index, outcome in next(batch.slices):
                    self._complete(
                        self._remove(batch, index),
                        Failure(str(outcome), outcome.category)
                        if isinstance(outcome, EngineError)
                        else Success(outcome),
                    )
            # The remaining requests must fail, or they would stay pending forever.
            except StopIteration:
                failure = Failure("the engine ended without a result", "server")
            except Exception as error:
                failure = failure_of(error, batch.weights.engine_id)
        if batch.unfinished and failure is None:
            lane.live.append(batch)
        else:
            self._end_batch(batch, failure)

    def _end_batch(self, batch: Batch, failure: Optional[Failure] = None) -> None:
        """End a batch; its unfinished requests fail with *failure*, if they have not yet failed."""
        for index in sorted(batch.unfinished):
            job = self._remove(batch, index)
            if failure is not None:
                self._complete(job, failure)
        # Frees the batch's cache in the engine.  Only generators can be closed, not all iterators.
        close = getattr(batch.slices, "close", None)
        if close is not None:
            log_failure("abandon a batch", close)
        batch.weights.batches -= 1
        # Weights that were retired while batches drew from them are left for the last batch to
        # remove.
        if batch.weights.retired:
            self.remove(batch.weights)

    def _remove(self, batch: Batch, index: int) -> SampleJob:
        job = batch.remove(index)
        self._live_tokens -= job.cost
        return job

    def _complete(self, job: SampleJob, outcome: Outcome) -> None:
        with self._lock:
            # The entry is gone if the client cancelled the sample, or its session ended, during the
            # slice: its future has failed already, and keeps that outcome.
            job.sampler.jobs.pop(job.request_id, None)
            name = job.sampler.lane.weights.source.name
        # Before the future completes: a client that has its sample must find it on the page.
        if isinstance(outcome, Success):
            response = cast(SampleResponse, outcome.value)
            log_failure("note a sample", self._on_sampled, name, job.request, response, job.began)
        self._futures.complete(job.request_id, outcome)

    def _unload(self, weights: SamplerWeights) -> None:
        weights.loaded = False
        del self._loaded[weights.engine_id]
        name = weights.engine_id
        log_failure(f"unload {name}", self._engine.unload_sampler, name)


def log_failure(what: str, action: Callable[..., object], *args: object) -> None:
    """Call *action*, which no request waits for, and log its exception; *what* names it."""
    try:
        action(*args)
    except Exception:
        _log.exception("failed to %s", what)


def failure_of(error: Exception, what: str) -> Failure:
    """Return the failure of a request whose work raised *error*; *what* names it in the log.

    An EngineError has its category; an unexpected error is the server's, and is logged with its
    traceback.  An OSError, as on a full disk, is logged without one, since its message says enough.
    """
    if isinstance(error, EngineError):
        return Failure(str(error), error.category)
    if isinstance(error, HTTPError):
        category = "user" if error.status < 500 else "server"
        return Failure(error.detail, category, 422 if error.status == 400 else error.status)
    if isinstance(error, OSError):
        _log.error("%s failed: %s", what, error)
        return Failure(f"the server cannot use its files: {error}", "server")
    _log.error("%s failed", what, exc_info=error)
    return Failure(f"the engine failed: {type(error).__name__}: {error}", "server")
