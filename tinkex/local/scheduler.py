"""Runs all engine work on one thread, "tinkex-engine", and decides what is next.

Owned by the backend; started and closed by it.  HTTP threads submit, the engine thread works:
training runs and samplers take turns, one request or one slice of sampling at a time.  Between
turns, and when it is idle, the thread does the backend's housekeeping (there is no janitor
thread).
"""

from __future__ import annotations

import atexit
import logging
import shutil
import threading
import time
from collections import OrderedDict, deque
from pathlib import Path
from typing import Callable, Deque, Dict, List, Optional, Union

from tinkex.local.batches import Batch, SampleJob, SamplerLane, SamplingLimits
from tinkex.local.engine import Engine, EngineError
from tinkex.local.futures import Failure, FutureTable, Success
from tinkex.local.lanes import Job, Lane
from tinkex.local.problems import Problem
from tinkex.types import SampleRequest

_log = logging.getLogger(__name__)

#: The process waits at most this long at its end for an interrupted turn, in seconds.
EXIT_PATIENCE_S = 20.0

AnyLane = Union[Lane, SamplerLane]

#: Does what has become due and returns the instant (monotonic) at which to call again.
Housekeeping = Callable[[float], float]


class Scheduler:
    """The queues of all training runs and samplers, and the thread that works them off.

    Thread-safe.  Submitting never blocks on the engine.
    """

    def __init__(
        self,
        engine: Engine,
        futures: FutureTable,
        housekeeping: Housekeeping,
        *,
        limits: Optional[SamplingLimits] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._futures = futures
        self._housekeeping = housekeeping
        self._limits = limits or SamplingLimits()
        self._clock = clock
        # Guards the queues and the flags below; never held while the engine works.
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._models: Dict[str, Lane] = {}
        self._samplers: Dict[str, SamplerLane] = {}
        self._turns: Deque[AnyLane] = deque()  # lanes with something to do
        self._running: Optional[AnyLane] = None  # whose turn it is; not in _turns meanwhile
        self._queued_samples = 0
        self._poked = False
        self._closing = False
        # Engine thread only.
        self._loaded: OrderedDict[str, SamplerLane] = OrderedDict()  # least recently used first
        self._live_tokens = 0
        self._thread = threading.Thread(target=self._work, name="tinkex-engine", daemon=True)

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Fail what is queued, interrupt the engine, end the thread, and close the engine.

        Waits at most *timeout_s*; a turn that takes longer ends in the background.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._engine.interrupt()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                _log.info("the engine is still busy; thread tinkex-engine ends after its turn")
                # Python kills a daemon thread that computes in C++ by aborting the process.
                atexit.register(self._thread.join, EXIT_PATIENCE_S)

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended, but no longer than *timeout_s*."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def poke(self) -> None:
        """Have the engine thread do its housekeeping soon."""
        with self._wake:
            self._poked = True
            self._wake.notify()

    # Training runs

    def add_model(self, model_id: str, session_id: str, job: Job) -> None:
        """Open the queue of a new training run; *job* makes the model."""
        with self._wake:
            lane = self._models[model_id] = Lane(model_id, session_id)
            self._futures.create(job.request_id, model_id, 0)
            lane.ready.append(job)
            self._enqueue_locked(lane)

    def has_model(self, model_id: str) -> bool:
        """True if the run takes requests."""
        with self._lock:
            lane = self._models.get(model_id)
            return lane is not None and lane.closed is None

    def find(self, model_id: str, seq_id: int, digest: bytes) -> Optional[str]:
        """Return the request id of an earlier submission of the same body, or None.

        Raises:
            Problem: 409 if the number was used for another body; 404 if the run is closed.
        """
        with self._lock:
            return self._open_lane_locked(model_id).find(seq_id, digest)

    def submit(self, model_id: str, seq_id: int, digest: bytes, job: Optional[Job]) -> str:
        """Queue *job* at *seq_id*; None uses the number up without any work.

        Returns the request id: of an earlier submission if the body is the same.
        """
        with self._wake:
            lane = self._open_lane_locked(model_id)
            known = lane.find(seq_id, digest)
            if known is not None:
                return known
            if job is not None:
                self._futures.create(job.request_id, model_id, seq_id)
            lane.add(seq_id, digest, job)
            if lane.ready:
                self._enqueue_locked(lane)
            return "" if job is None else job.request_id

    def unload_model(self, model_id: str, request_id: str) -> None:
        """Queue the end of a run behind what is ready; *request_id* completes then."""

        def unload() -> Dict[str, str]:
            self.close_model(model_id, f"model {model_id} was unloaded")
            return {"model_id": model_id, "type": "unload_model"}

        with self._wake:
            lane = self._open_lane_locked(model_id)
            self._futures.create(request_id, model_id, lane.next_seq)
            lane.ready.append(Job(request_id, unload))
            self._enqueue_locked(lane)

    def close_model(self, model_id: str, why: str) -> None:
        """Refuse further requests of a run, fail the queued ones, and unload it soon."""
        with self._wake:
            lane = self._models.get(model_id)
            if lane is None or lane.closed is not None:
                return
            failed = self._close_lane_locked(lane, why)
        self._fail(failed, why)

    # Samplers

    def add_sampler(self, sampler_id: str, session_id: str, folder: Optional[Path]) -> None:
        """Open the queue of a sampler; the engine loads it soon.

        *folder* holds its weights (None: the base model) and is removed when the sampler ends.
        """
        with self._wake:
            lane = self._samplers[sampler_id] = SamplerLane(sampler_id, session_id, folder)
            self._enqueue_locked(lane)

    def has_sampler(self, sampler_id: str) -> bool:
        """True if the sampler takes requests."""
        with self._lock:
            return sampler_id in self._samplers and self._samplers[sampler_id].closed is None

    def submit_sample(
        self, sampler_id: str, seq_id: int, digest: bytes, request: SampleRequest, cost: int
    ) -> str:
        """Queue a sample request and return its request id; *cost* is its cache in tokens."""
        with self._wake:
            lane = self._samplers.get(sampler_id)
            if lane is None or lane.closed is not None or self._closing:
                raise Problem(404, f"sampler {sampler_id} is not loaded")
            known = lane.seen.find(seq_id, digest)
            if known is not None:
                return known
            if self._queued_samples >= self._limits.max_queued:
                raise Problem(
                    429, f"{self._queued_samples} sample requests are queued", retry_after_s=1.0
                )
            request_id = f"{sampler_id}:{seq_id}"
            self._futures.create(request_id, sampler_id, seq_id)
            lane.seen.add(seq_id, digest, request_id)
            lane.queued.append(SampleJob(request_id, seq_id, request, cost, self._clock()))
            self._queued_samples += 1
            self._enqueue_locked(lane)
            return request_id

    # All

    def end_session(self, session_id: str, why: str) -> None:
        """Fail all queued work of a session and unload its models and samplers soon."""
        failed: List[str] = []
        with self._wake:
            for lane in self._lanes_locked():
                if lane.session_id == session_id and lane.closed is None:
                    failed += self._close_lane_locked(lane, why)
        self._fail(failed, why)

    def why_waiting(self, owner: str, seq_id: int) -> str:
        """Say in a sentence why the request *seq_id* of a run or sampler is not done yet."""
        with self._lock:
            if owner in self._models:
                return self._models[owner].why_waiting(seq_id)
            sampler = self._samplers.get(owner)
            if sampler is None:
                return "ending"
            for ahead, job in enumerate(sampler.queued):
                if job.seq_id == seq_id:
                    return f"queued for the next batch, behind {ahead} other(s)"
            return "being sampled"

    # Under the lock

    def _lanes_locked(self) -> List[AnyLane]:
        return [*self._models.values(), *self._samplers.values()]

    def _open_lane_locked(self, model_id: str) -> Lane:
        lane = self._models.get(model_id)
        if lane is None or lane.closed is not None or self._closing:
            raise Problem(404, lane.closed if lane and lane.closed else f"{model_id} is not loaded")
        return lane

    def _enqueue_locked(self, lane: AnyLane) -> None:
        if lane is not self._running and lane not in self._turns:
            self._turns.append(lane)
        self._wake.notify()

    def _close_lane_locked(self, lane: AnyLane, why: str) -> List[str]:
        lane.closed = why
        self._enqueue_locked(lane)
        if isinstance(lane, Lane):
            return [job.request_id for job in lane.take_all()]
        failed = [job.request_id for job in lane.queued]
        self._queued_samples -= len(failed)
        lane.queued.clear()
        return failed

    def _fail(self, request_ids: List[str], why: str, category: str = "user") -> None:
        for request_id in request_ids:
            self._futures.complete(request_id, Failure(why, category))

    # The engine thread

    def _work(self) -> None:
        chores_due = self._clock()
        while True:
            with self._lock:
                poked, self._poked = self._poked, False
            if poked or self._clock() >= chores_due:
                chores_due = self._do_chores()
            with self._wake:
                if self._closing:
                    break
                lane = self._next_turn_locked(chores_due)
                self._running = lane
            if isinstance(lane, Lane):
                self._training_turn(lane)
            elif lane is not None:
                self._sampling_turn(lane)
            with self._lock:
                self._running = None
                if lane is not None and self._has_work_locked(lane):
                    self._turns.append(lane)  # behind those that came meanwhile
        self._shut_down()

    def _has_work_locked(self, lane: AnyLane) -> bool:
        if isinstance(lane, Lane):
            ended = lane.closed is not None and lane.model_id in self._models
            return bool(lane.ready) or ended
        ended = lane.closed is not None and lane.sampler_id in self._samplers
        return bool(lane.live or lane.queued) or ended

    def _do_chores(self) -> float:
        now = self._clock()
        try:
            return self._housekeeping(now)
        except Exception:
            _log.exception("housekeeping failed; it runs again in a minute")
            return now + 60.0

    def _next_turn_locked(self, chores_due: float) -> Optional[AnyLane]:
        """Take the lane whose turn it is; None after waiting in vain (chores may be due)."""
        now = self._clock()
        wait_until = chores_due
        for _ in range(len(self._turns)):
            lane = self._turns.popleft()
            if isinstance(lane, Lane) or self._sampler_runnable(lane, now):
                return lane
            self._turns.append(lane)
            if lane.queued:
                starts_at = lane.starts_at(self._limits)
                if starts_at > now:  # else it waits for another batch to end, not for the time
                    wait_until = min(wait_until, starts_at)
        if not self._poked:
            self._wake.wait(max(0.0, wait_until - now))
        return None

    def _sampler_runnable(self, lane: SamplerLane, now: float) -> bool:
        return bool(
            lane.live
            or lane.closed is not None
            or lane.wanted
            or lane.may_start(self._limits, self._live_tokens, now)
        )

    def _training_turn(self, lane: Lane) -> None:
        with self._lock:
            job = lane.ready.popleft() if lane.ready else None
        if job is not None:
            self._run(lane, job)
        with self._lock:
            unload = lane.closed is not None and not lane.ready
            if unload:
                self._models.pop(lane.model_id, None)
        if unload:
            self._guarded(lambda: self._engine.unload(lane.model_id), f"unload {lane.model_id}")

    def _run(self, lane: Lane, job: Job) -> None:
        if lane.broken is not None:
            self._fail([job.request_id], lane.broken)
            return
        try:
            value = job.run()
        except Exception as error:
            failure = _failure(error, job.request_id)
            if job.creates:
                lane.broken = f"model {lane.model_id} was not created: {failure.message}"
            self._futures.complete(job.request_id, failure)
        else:
            self._futures.complete(job.request_id, Success(value))

    def _sampling_turn(self, lane: SamplerLane) -> None:
        if lane.closed is not None:
            self._end_sampler(lane, lane.closed)
            return
        batch: Optional[List[SampleJob]] = None
        if self._load_sampler(lane):
            with self._lock:
                if lane.may_start(self._limits, self._live_tokens, self._clock()):
                    batch = lane.take_batch(self._limits, self._live_tokens)
                    self._queued_samples -= len(batch)
            if batch:
                self._start_batch(lane, batch)
            if lane.live:
                self._advance(lane)

    def _load_sampler(self, lane: SamplerLane) -> bool:
        """Have the engine hold the sampler; False if that failed, with what was queued."""
        lane.wanted = False
        if not lane.loaded:
            for other in list(self._loaded.values()):
                if len(self._loaded) < self._limits.max_loaded:
                    break
                if not other.live:
                    self._unload_sampler(other)
            try:
                self._engine.create_sampler(lane.sampler_id, lane.folder)
            except Exception as error:
                failure = _failure(error, lane.sampler_id)
                with self._lock:
                    failed = [job.request_id for job in lane.queued]
                    self._queued_samples -= len(failed)
                    lane.queued.clear()
                self._fail(failed, failure.message, failure.category)
                return False
            lane.loaded = True
            self._loaded[lane.sampler_id] = lane
        self._loaded.move_to_end(lane.sampler_id)
        return True

    def _start_batch(self, lane: SamplerLane, jobs: List[SampleJob]) -> None:
        try:
            slices = self._engine.sample(lane.sampler_id, [job.request for job in jobs])
        except Exception as error:
            failure = _failure(error, lane.sampler_id)
            self._fail([job.request_id for job in jobs], failure.message, failure.category)
            return
        batch = Batch(jobs, slices)
        self._live_tokens += batch.cost
        lane.live.append(batch)

    def _advance(self, lane: SamplerLane) -> None:
        """Do one slice of the batch whose turn it is."""
        batch = lane.live.popleft()
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
            failure = _failure(error, lane.sampler_id)
            self._end_batch(batch, failure.message, failure.category)
        else:
            if batch.unfinished:
                lane.live.append(batch)
            else:
                self._end_batch(batch, "", "server")

    def _end_batch(self, batch: Batch, why: str, category: str) -> None:
        self._live_tokens -= batch.cost
        self._fail([batch.jobs[i].request_id for i in sorted(batch.unfinished)], why, category)
        close = getattr(batch.slices, "close", None)  # a generator has it, a plain iterator not
        if close is not None:
            self._guarded(close, "abandon a batch")

    def _end_sampler(self, lane: SamplerLane, why: str) -> None:
        while lane.live:
            self._end_batch(lane.live.popleft(), why, "user")
        if lane.loaded:
            self._unload_sampler(lane)
        if lane.folder is not None:
            shutil.rmtree(lane.folder, ignore_errors=True)
        with self._lock:
            self._samplers.pop(lane.sampler_id, None)

    def _unload_sampler(self, lane: SamplerLane) -> None:
        lane.loaded = False
        del self._loaded[lane.sampler_id]
        self._guarded(
            lambda: self._engine.unload_sampler(lane.sampler_id), f"unload {lane.sampler_id}"
        )

    def _guarded(self, action: Callable[[], object], what: str) -> None:
        """Do engine work that no request waits for."""
        try:
            action()
        except Exception:
            _log.exception("the engine failed to %s", what)

    def _shut_down(self) -> None:
        why = "the server was closed"
        with self._lock:
            lanes = self._lanes_locked()
            failed: List[str] = []
            for lane in lanes:
                failed += self._close_lane_locked(lane, why)
        self._fail(failed, why, "server")
        for lane in lanes:
            if isinstance(lane, SamplerLane):
                self._end_sampler(lane, why)
        self._guarded(self._engine.close, "close")


def _failure(error: Exception, what: str) -> Failure:
    """Class what work raised: an EngineError speaks for itself, the rest is the server's fault."""
    if isinstance(error, EngineError):
        return Failure(str(error), error.category)
    if isinstance(error, Problem):
        return Failure(error.detail, "user")
    _log.error("%s failed", what, exc_info=error)
    return Failure(f"the engine failed: {type(error).__name__}: {error}", "server")
