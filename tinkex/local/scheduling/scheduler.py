"""Runs all engine work on one thread, "tinkex-engine", and decides what is next.

Owned by the backend; started and closed by it.  HTTP threads submit, the engine thread works:
training runs and samplers are served in rotation, one request or one slice of sampling at a time.
In between, and when it is idle, the thread does the backend's housekeeping.
"""

from __future__ import annotations

import atexit
import functools
import logging
import threading
import time
from collections import deque
from typing import Callable, Deque, Dict, Hashable, List, NamedTuple, Optional, Type, Union

from tinkex.local.engines.engine import Engine
from tinkex.local.errors import HTTPError
from tinkex.local.scheduling.batches import (
    SampleJob,
    Sampler,
    SamplerLane,
    SamplerWeights,
    WeightsSource,
)
from tinkex.local.scheduling.lanes import Job, Lane
from tinkex.local.scheduling.sampling import (
    OnSampled,
    SamplingWorker,
    failure_of,
    log_failure,
)
from tinkex.local.settings import SamplingLimits
from tinkex.local.state.futures import Failure, FutureTable, Group, Outcome, Success
from tinkex.types import SampleRequest

_log = logging.getLogger(__name__)

#: At exit the process waits at most this long for work that was interrupted, in seconds.
EXIT_WAIT_S = 20.0

AnyLane = Union[Lane, SamplerLane]

#: Does what has become due and returns the instant (monotonic) at which to call again.
Housekeeping = Callable[[float], float]


class Queues(NamedTuple):
    """What waits, and what is being sampled.

    Attributes:
        runs: requests that wait, by run; a run that takes no requests any more is not here.
        samples: sample requests that wait.
        sampling: sample requests that are being worked on.
    """

    runs: Dict[str, int]
    samples: int
    sampling: int


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
        max_waiting: int = 1024,
        missing_seq_id_s: float = 60.0,
        lane_type: Type[Lane] = Lane,
        on_sampled: Optional[OnSampled] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._lane_type = lane_type
        self._futures = futures
        self._housekeeping = housekeeping
        self._limits = limits or SamplingLimits()
        self._max_waiting = max_waiting
        self._missing_seq_id_s = missing_seq_id_s
        self._clock = clock
        # Guards the queues and the flags below; never held while the engine works.
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._models: Dict[str, Lane] = {}
        self._samplers: Dict[str, Sampler] = {}
        self._lanes: Dict[Hashable, SamplerLane] = {}  # of the samplers, by their keys
        self._rotation: Deque[AnyLane] = deque()  # lanes with something to do
        self._running: Optional[AnyLane] = None  # being served; not in _rotation meanwhile
        self._queued_samples = 0
        self._housekeeping_wanted = False
        self._closing = False
        self._retired: List[SamplerWeights] = []  # no lane uses them any more
        # Engine thread only.
        self._sampling = SamplingWorker(
            engine,
            futures,
            self._limits,
            self._lock,
            self._count_dequeued_locked,
            clock,
            on_sampled,
        )
        self._thread = threading.Thread(target=self._work, name="tinkex-engine", daemon=True)

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Fail what is queued, interrupt the engine, end the thread, and close the engine.

        Waits at most *timeout_s*; work that takes longer ends in the background.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._engine.interrupt()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                _log.info("the engine is still busy; thread tinkex-engine ends when it is done")
                # Python kills a daemon thread that computes in C++ by aborting the process.
                atexit.register(self._thread.join, EXIT_WAIT_S)

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended, but no longer than *timeout_s*."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def request_housekeeping(self) -> None:
        """Have the engine thread do its housekeeping soon."""
        with self._wake:
            self._housekeeping_wanted = True
            self._wake.notify()

    # Training runs

    def add_model(self, model_id: str, session_id: str, job: Job) -> None:
        """Open the queue of a new training run; *job* creates the model."""
        with self._wake:
            lane = self._models[model_id] = self._lane_type(model_id, session_id)
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
            HTTPError: 409 if the seq_id was used for another body; 404 if the run is closed.
        """
        with self._lock:
            return self._open_lane_locked(model_id).find(seq_id, digest)

    def submit(self, model_id: str, seq_id: int, digest: bytes, job: Optional[Job]) -> str:
        """Queue *job* at *seq_id*; None consumes the seq_id without any work.

        Returns the request id: of an earlier submission if the body is the same.
        """
        with self._wake:
            lane = self._open_lane_locked(model_id)
            known = lane.find(seq_id, digest)
            if known is not None:
                return known
            if lane.waits_beyond_a_gap(seq_id) >= self._max_waiting:
                raise HTTPError(
                    429,
                    f"{self._max_waiting} requests of {model_id} wait for seq_id {lane.next_seq} "
                    "already; send that one",
                    retry_after_s=1.0,
                )
            if job is not None:
                job = lane.named(job)
                self._futures.create(job.request_id, model_id, seq_id)
            lane.add(seq_id, digest, job)
            lane.note_missing(self._clock())
            if lane.ready:
                self._enqueue_locked(lane)
            return "" if job is None else job.request_id

    def unload_model(self, model_id: str, request_id: str) -> None:
        """Queue the end of a run behind what is ready; *request_id* completes then.

        Nothing happens if that was queued before.
        """
        with self._wake:
            if self._futures.wait(request_id, 0.0) is not None:
                return
            lane = self._open_lane_locked(model_id)
            self._futures.create(request_id, model_id, lane.next_seq)
            lane.ready.append(Job(request_id, functools.partial(self._unload, model_id)))
            self._enqueue_locked(lane)

    def _unload(self, model_id: str) -> object:
        self.close_model(model_id, f"model {model_id} was unloaded")
        return {"model_id": model_id, "type": "unload_model"}

    def close_model(self, model_id: str, why: str) -> None:
        """Refuse further requests of a run, fail the queued ones, and unload it soon."""
        with self._wake:
            lane = self._models.get(model_id)
            if lane is None or lane.closed is not None:
                return
            failed = self._close_lane_locked(lane, why)
        self._fail(failed, why)

    def refuse_early(self, owner: str) -> None:
        """Fail the requests of a run that have waited too long for a missing seq_id.

        Something between client and server may have refused that request in the server's name:
        the client counts its seq_id as used, and nothing would ever fill it.  The message is one
        after which clients send the failed requests again, from the missing seq_id on.
        """
        with self._lock:
            lane = self._models.get(owner)
            missing = None if lane is None else lane.missing
            if lane is None or missing is None:
                return
            if self._clock() < missing.since + self._missing_seq_id_s:
                return
            early = lane.remove_early()
        for seq_id, job in early:
            why = f"Sequence conflict: expected {missing.seq_id}, got {seq_id}."
            self._fail([job.request_id], f"{why} seq_id {missing.seq_id} has not arrived.")

    # Samplers

    def add_sampler(self, sampler_id: str, session_id: str, source: WeightsSource) -> Sampler:
        """Open a sampler and return it; the engine loads its weights soon."""
        with self._wake:
            weights = SamplerWeights(sampler_id, source.folder, source.name)
            lane = self._lanes.get(source.key)
            if lane is None:
                lane = self._lanes[source.key] = SamplerLane(source.key, weights)
            elif source.newest:
                self._retired.append(lane.weights)
                lane.weights, lane.wanted = weights, True
            else:  # it has the same weights
                self._retired.append(weights)
            lane.samplers += 1
            sampler = self._samplers[sampler_id] = Sampler(sampler_id, session_id, lane)
            self._enqueue_locked(lane)
            return sampler

    def join_sampler(self, sampler_id: str) -> int:
        """Count one more client of a sampler and return its index; the first client is 0."""
        with self._lock:
            sampler = self._open_sampler_locked(sampler_id)
            sampler.clones += 1
            return sampler.clones

    def has_sampler(self, sampler_id: str) -> bool:
        """True if the sampler takes requests."""
        with self._lock:
            return sampler_id in self._samplers

    def submit_sample(
        self,
        sampler_id: str,
        seq_id: int,
        digest: bytes,
        request: SampleRequest,
        cost: int,
        *,
        on_done: Optional[Callable[[Outcome], None]] = None,
    ) -> str:
        """Queue a sample request and return its request id; *cost* is its cache in tokens.

        With *on_done* the outcome is not polled for but passed on (see `FutureTable.create`).
        """
        with self._wake:
            sampler = self._open_sampler_locked(sampler_id)
            known = sampler.seen.find(seq_id, digest)
            if known is not None:
                return known
            if self._queued_samples >= self._limits.max_queued:
                raise HTTPError(
                    429, f"{self._queued_samples} sample requests are queued", retry_after_s=1.0
                )
            request_id = f"{sampler_id}:{seq_id}"
            group = Group.of(sampler_id, seq_id)
            self._futures.create(
                request_id,
                sampler_id,
                seq_id,
                group=group if on_done is None else None,
                on_done=on_done,
            )
            sampler.seen.add(seq_id, digest, request_id)
            job = SampleJob(sampler, request_id, seq_id, request, cost, self._clock())
            sampler.jobs[request_id] = job
            sampler.lane.queued.append(job)
            self._queued_samples += 1
            self._enqueue_locked(sampler.lane)
            return request_id

    def cancel_sample(self, sampler_id: str, request_id: str) -> None:
        """Drop a sample request from the queue, or from the batch it is in, and fail it.

        Nothing happens if it is done.
        """
        with self._wake:
            sampler = self._samplers.get(sampler_id)
            job = None if sampler is None else sampler.jobs.pop(request_id, None)
            if job is not None:
                self._count_dequeued_locked(job.sampler.lane.drop([job]))
                self._wake.notify()
        self._fail([request_id], "the client cancelled the request")

    # All

    def end_session(self, session_id: str, why: str) -> None:
        """Fail all queued work of a session and unload its models and samplers soon."""
        failed: List[str] = []
        with self._wake:
            for lane in self._models.values():
                if lane.session_id == session_id and lane.closed is None:
                    failed += self._close_lane_locked(lane, why)
            for sampler in list(self._samplers.values()):
                if sampler.session_id == session_id:
                    failed += self._close_sampler_locked(sampler)
        self._fail(failed, why)

    def queues(self) -> Queues:
        """Return how much waits."""
        with self._lock:
            open_lanes = [lane for lane in self._models.values() if lane.closed is None]
            unfinished = sum(len(sampler.jobs) for sampler in self._samplers.values())
            return Queues(
                {lane.model_id: lane.waiting for lane in open_lanes},
                self._queued_samples,
                unfinished - self._queued_samples,
            )

    def why_waiting(self, owner: str, seq_id: int) -> str:
        """Return a sentence on why the request *seq_id* of a run or sampler is not done yet."""
        with self._lock:
            if owner in self._models:
                return self._models[owner].why_waiting(seq_id)
            sampler = self._samplers.get(owner)
            if sampler is None:
                return "ending"
            for ahead, job in enumerate(sampler.lane.queued):
                if job.sampler is sampler and job.seq_id == seq_id:
                    return f"queued for the next batch, behind {ahead} other(s)"
            return "being sampled"

    # Under the lock

    def _open_lane_locked(self, model_id: str) -> Lane:
        lane = self._models.get(model_id)
        if lane is None or lane.closed is not None or self._closing:
            raise HTTPError(
                404, lane.closed if lane and lane.closed else f"{model_id} is not loaded"
            )
        return lane

    def _open_sampler_locked(self, sampler_id: str) -> Sampler:
        sampler = self._samplers.get(sampler_id)
        if sampler is None or self._closing:
            raise HTTPError(404, f"sampler {sampler_id} is not loaded")
        return sampler

    def _enqueue_locked(self, lane: AnyLane) -> None:
        if lane is not self._running and lane not in self._rotation:
            self._rotation.append(lane)
        self._wake.notify()

    def _close_lane_locked(self, lane: Lane, why: str) -> List[str]:
        lane.closed = why
        self._enqueue_locked(lane)
        return [job.request_id for job in lane.remove_all()]

    def _close_sampler_locked(self, sampler: Sampler) -> List[str]:
        """Close a sampler, drop its requests, and return their ids."""
        del self._samplers[sampler.sampler_id]
        lane, jobs = sampler.lane, sampler.jobs
        lane.samplers -= 1
        self._count_dequeued_locked(lane.drop(jobs.values()))
        sampler.jobs = {}
        self._enqueue_locked(lane)
        return list(jobs)

    def _count_dequeued_locked(self, samples: int) -> None:
        self._queued_samples -= samples

    def _fail(self, request_ids: List[str], why: str, category: str = "user") -> None:
        for request_id in request_ids:
            self._futures.complete(request_id, Failure(why, category))

    # The engine thread

    def _work(self) -> None:
        due = self._clock()
        while True:
            with self._lock:
                wanted, self._housekeeping_wanted = self._housekeeping_wanted, False
            if wanted or self._clock() >= due:
                due = self._do_housekeeping()
            with self._wake:
                if self._closing:
                    break
                lane = self._next_lane_locked(due)
                self._running = lane
            if isinstance(lane, Lane):
                self._run_next_job(lane)
            elif lane is not None:
                self._sampling.serve(lane)
            with self._lock:
                self._running = None
                if isinstance(lane, SamplerLane) and lane.is_over:
                    del self._lanes[lane.key]
                    self._retired.append(lane.weights)
                elif lane is not None and self._has_work_locked(lane):
                    self._rotation.append(lane)  # behind those that were queued meanwhile
                retired, self._retired = self._retired, []
            for weights in retired:
                self._sampling.remove(weights)
        self._shut_down()

    def _has_work_locked(self, lane: AnyLane) -> bool:
        if isinstance(lane, Lane):
            ended = lane.closed is not None and lane.model_id in self._models
            return bool(lane.ready) or ended
        return bool(lane.live or lane.queued)

    def _do_housekeeping(self) -> float:
        now = self._clock()
        try:
            return self._housekeeping(now)
        except Exception:
            _log.exception("housekeeping failed; it runs again in a minute")
            return now + 60.0

    def _next_lane_locked(self, due: float) -> Optional[AnyLane]:
        """Take the next lane that can be served; None after waiting, perhaps until *due*."""
        now = self._clock()
        wait_until = due
        for _ in range(len(self._rotation)):
            lane = self._rotation.popleft()
            if isinstance(lane, Lane) or self._sampling.runnable(lane, now):
                return lane
            self._rotation.append(lane)
            if lane.queued:
                starts_at = lane.starts_at(self._limits)
                if starts_at > now:  # else it waits for another batch to end
                    wait_until = min(wait_until, starts_at)
        if not self._housekeeping_wanted:
            self._wake.wait(max(0.0, wait_until - now))
        return None

    def _run_next_job(self, lane: Lane) -> None:
        with self._lock:
            job = lane.ready.popleft() if lane.ready else None
        if job is not None:
            self._run(lane, job)
        with self._lock:
            unload = lane.closed is not None and not lane.ready
            if unload:
                self._models.pop(lane.model_id, None)
        if unload:
            log_failure(f"unload {lane.model_id}", self._engine.unload, lane.model_id)

    def _run(self, lane: Lane, job: Job) -> None:
        if lane.broken is not None:
            self._fail([job.request_id], lane.broken)
            return
        try:
            value = job.run()
        except Exception as error:
            failure = failure_of(error, job.request_id)
            if job.creates:
                lane.broken = f"model {lane.model_id} was not created: {failure.message}"
            self._futures.complete(job.request_id, failure)
        else:
            self._futures.complete(job.request_id, Success(value))

    def _shut_down(self) -> None:
        why = "the server was closed"
        with self._lock:
            failed: List[str] = []
            for lane in self._models.values():
                failed += self._close_lane_locked(lane, why)
            for sampler in list(self._samplers.values()):
                failed += self._close_sampler_locked(sampler)
            retired = self._retired
        self._fail(failed, why, "server")
        for weights in retired:
            self._sampling.remove(weights)
        for sampler_lane in self._lanes.values():
            self._sampling.end(sampler_lane)
        log_failure("close", self._engine.close)
