"""What the engine thread does for samplers: load weights; start, advance and end batches.

Used by the scheduler's thread only, hence without a lock of its own; the scheduler's lock, which
guards the queues, is borrowed for looking into them.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections import OrderedDict
from typing import Callable, List, Optional

from tinkex.local.engines.engine import Engine, EngineError
from tinkex.local.errors import HTTPError
from tinkex.local.scheduling.batches import Batch, SampleJob, SamplerLane, SamplerWeights
from tinkex.local.settings import SamplingLimits
from tinkex.local.state.futures import Failure, FutureTable, Success

_log = logging.getLogger(__name__)


class SamplingWorker:
    """The samplers' share of the engine.

    Args:
        engine: does the work.
        futures: gets the results.
        limits: how sampling shares the engine.
        lock: guards the lanes' queues; taken for moments, never while the engine works.
        count_dequeued: called under the lock with the number of requests that left a queue.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        futures: FutureTable,
        limits: SamplingLimits,
        lock: threading.Lock,
        count_dequeued: Callable[[int], None],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._futures = futures
        self._limits = limits
        self._lock = lock
        self._count_dequeued = count_dequeued
        self._clock = clock
        self._loaded: OrderedDict[str, SamplerWeights] = OrderedDict()  # least recently used first
        self._live_tokens = 0

    def runnable(self, lane: SamplerLane, now: float) -> bool:
        """True if `serve` would have something to do for *lane* now."""
        return bool(
            lane.live
            or lane.closed is not None
            or lane.wanted
            or lane.may_start(self._limits, self._live_tokens, now)
        )

    def serve(self, lane: SamplerLane) -> None:
        """Start a batch of an open lane if it may, and do one slice of one of its batches."""
        with self._lock:
            weights = lane.weights
        if self._load(lane, weights):
            batch: Optional[Batch] = None
            with self._lock:
                if lane.may_start(self._limits, self._live_tokens, self._clock()):
                    batch = Batch(lane.take_batch(self._limits, self._live_tokens), weights)
                    self._count_dequeued(len(batch.jobs))
            if batch is not None:
                self._start(lane, batch)
            if lane.live:
                self._advance(lane)
        if not lane.live:
            with self._lock:
                lane.cancelled.clear()  # those that had finished when they were cancelled

    def end(self, lane: SamplerLane, why: str) -> None:
        """Abandon the batches of a closed lane and release its weights."""
        while lane.live:
            self._end_batch(lane.live.popleft(), why, "user")
        with self._lock:
            lane.weights.samplers -= 1
        self.release(lane.weights)

    def release(self, weights: SamplerWeights) -> None:
        """Remove *weights* unless a sampler or a batch uses them."""
        with self._lock:
            used = weights.samplers > 0
        if used or weights.batches:
            return
        if weights.loaded:
            self._unload(weights)
        if weights.folder is not None:
            shutil.rmtree(weights.folder, ignore_errors=True)

    def _load(self, lane: SamplerLane, weights: SamplerWeights) -> bool:
        """Have the engine hold the weights; False if that failed, with what was queued."""
        lane.wanted = False
        if not weights.loaded:
            for other in list(self._loaded.values()):
                if len(self._loaded) < self._limits.max_loaded:
                    break
                if not other.batches:
                    self._unload(other)
            try:
                self._engine.create_sampler(weights.engine_id, weights.folder)
            except Exception as error:
                failure = failure_of(error, lane.sampler_id)
                with self._lock:
                    failed = [job.request_id for job in lane.queued]
                    self._count_dequeued(len(failed))
                    lane.queued.clear()
                for request_id in failed:
                    self._futures.complete(request_id, failure)
                return False
            weights.loaded = True
            self._loaded[weights.engine_id] = weights
        self._loaded.move_to_end(weights.engine_id)
        return True

    def _start(self, lane: SamplerLane, batch: Batch) -> None:
        requests = [job.request for job in batch.jobs]
        try:
            batch.slices = self._engine.sample(batch.weights.engine_id, requests, batch.dropped)
        except Exception as error:
            failure = failure_of(error, lane.sampler_id)
            self._fail(batch.jobs, failure.message, failure.category)
            return
        self._live_tokens += batch.cost
        batch.weights.batches += 1
        lane.live.append(batch)

    def _advance(self, lane: SamplerLane) -> None:
        """Do one slice of the next batch."""
        batch = lane.live.popleft()
        self._drop_cancelled(lane, batch)
        if not batch.unfinished:
            self._end_batch(batch, "", "server")
            return
        try:
            for index, outcome in next(batch.slices):
                batch.unfinished.discard(index)
                self._futures.complete(
                    batch.jobs[index].request_id,
                    Failure(str(outcome), outcome.category)
                    if isinstance(outcome, EngineError)
                    else Success(outcome),
                )
        except StopIteration:
            self._end_batch(batch, "the engine ended without a result", "server")
        except Exception as error:
            failure = failure_of(error, lane.sampler_id)
            self._end_batch(batch, failure.message, failure.category)
        else:
            if batch.unfinished:
                lane.live.append(batch)
            else:
                self._end_batch(batch, "", "server")

    def _drop_cancelled(self, lane: SamplerLane, batch: Batch) -> None:
        with self._lock:
            if not lane.cancelled:
                return
            gone = {
                index
                for index in batch.unfinished
                if batch.jobs[index].request_id in lane.cancelled
            }
            lane.cancelled -= {batch.jobs[index].request_id for index in gone}
        batch.dropped |= gone
        batch.unfinished -= gone

    def _end_batch(self, batch: Batch, why: str, category: str) -> None:
        self._live_tokens -= batch.cost
        self._fail([batch.jobs[index] for index in sorted(batch.unfinished)], why, category)
        close = getattr(batch.slices, "close", None)  # a generator has it, a plain iterator not
        if close is not None:
            log_failure("abandon a batch", close)
        batch.weights.batches -= 1
        self.release(batch.weights)

    def _unload(self, weights: SamplerWeights) -> None:
        weights.loaded = False
        del self._loaded[weights.engine_id]
        name = weights.engine_id
        log_failure(f"unload {name}", self._engine.unload_sampler, name)

    def _fail(self, jobs: List[SampleJob], why: str, category: str) -> None:
        for job in jobs:
            self._futures.complete(job.request_id, Failure(why, category))


def log_failure(what: str, action: Callable[..., object], *args: object) -> None:
    """Do engine work that no request waits for; an exception is logged."""
    try:
        action(*args)
    except Exception:
        _log.exception("the engine failed to %s", what)


def failure_of(error: Exception, what: str) -> Failure:
    """Return what a request fails with whose work raised *error*.

    An EngineError knows whose fault it is; anything unexpected is the server's, and logged.
    """
    if isinstance(error, EngineError):
        return Failure(str(error), error.category)
    if isinstance(error, HTTPError):
        return Failure(error.detail, "user", 422 if error.status == 400 else error.status)
    _log.error("%s failed", what, exc_info=error)
    return Failure(f"the engine failed: {type(error).__name__}: {error}", "server")
