"""Scheduler: the queues of all training runs and samplers.

Owned by the backend.  HTTP threads submit, cancel and look up requests; the engine thread
(engine_thread.py) takes them from the queues in the order of the rotation (rotation.py).
"""

from __future__ import annotations

import functools
from typing import Callable, Dict, Hashable, List, NamedTuple, Optional, Type

from tinkex.local.errors import HTTPError
from tinkex.local.scheduling.batches import (
    SampleJob,
    Sampler,
    SamplerLane,
    SamplerWeights,
    WeightsSource,
)
from tinkex.local.scheduling.lanes import Job, Lane
from tinkex.local.scheduling.rotation import AnyLane, Rotation
from tinkex.local.settings import SamplingLimits
from tinkex.local.state.futures import Failure, FutureTable, Group, Outcome
from tinkex.types import SampleRequest


class Queues(NamedTuple):
    """How many requests wait, and how many are being sampled.

    Attributes:
        runs: number of waiting requests of each run, by model id; without closed runs.
        samples: number of waiting sample requests.
        sampling: number of sample requests that the engine works on.
    """

    runs: Dict[str, int]
    samples: int
    sampling: int


class Scheduler:
    """The queues of all training runs and samplers.  Thread-safe; no method waits for the engine.

    Args:
        futures: gets a pending future for each request, and the failure of each dropped request.
        limits: how sampling shares the engine.
        max_waiting: most requests of one run that wait for a missing seq_id.
        missing_seq_id_s: requests wait at least this long for a missing seq_id.
        lane_type: class of a training run's queue.
        clock: returns monotonic seconds.

    Attributes:
        rotation: decides which queue is served next; its lock guards all queues.
    """

    def __init__(
        self,
        futures: FutureTable,
        limits: SamplingLimits,
        *,
        max_waiting: int,
        missing_seq_id_s: float,
        lane_type: Type[Lane],
        clock: Callable[[], float],
    ) -> None:
        self._futures = futures
        self._limits = limits
        self._max_waiting = max_waiting
        self._missing_seq_id_s = missing_seq_id_s
        self._lane_type = lane_type
        self._clock = clock
        self.rotation = Rotation(limits, clock)
        # Guards everything below.
        self._lock = self.rotation.lock
        self._models: Dict[str, Lane] = {}
        self._samplers: Dict[str, Sampler] = {}
        self._lanes: Dict[Hashable, SamplerLane] = {}  # lanes of the samplers, by key
        self._queued_samples = 0
        self._retired: List[SamplerWeights] = []  # weights that no lane uses any more

    # Training runs

    def add_model(self, model_id: str, session_id: str, job: Job) -> None:
        """Open the queue of a new training run; *job* creates the model."""
        with self._lock:
            lane = self._models[model_id] = self._lane_type(model_id, session_id)
            self._futures.create(job.request_id, model_id, 0)
            # Not by `Lane.add`, which orders requests from seq_id 1 on: this is number 0.
            lane.ready.append(job)
            self.rotation.add_locked(lane)

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

        Returns the request id, or "" without a job.  If the same body was submitted before, returns
        the request id of that submission.
        """
        with self._lock:
            lane = self._open_lane_locked(model_id)
            # Looked up again, after the view did: the same request may have arrived twice.
            known = lane.find(seq_id, digest)
            if known is not None:
                return known
            # After `find`, so that a repetition always gets its response; and before anything is
            # noted, since a 429 leaves the seq_id unused (docs/protocol.md, "Sequence numbers",
            # rule 3).
            if lane.waits_beyond_a_gap(seq_id) >= self._max_waiting:
                raise HTTPError(
                    429,
                    f"{self._max_waiting} requests of {model_id} already wait for seq_id "
                    f"{lane.next_seq}; send that request first",
                    retry_after_s=1.0,
                )
            if job is not None:
                job = lane.named(job)
                # Before the engine thread can take the job and complete its future.
                self._futures.create(job.request_id, model_id, seq_id)
            lane.add(seq_id, digest, job)
            lane.note_missing(self._clock())
            if lane.ready:
                self.rotation.add_locked(lane)
            return "" if job is None else job.request_id

    def unload_model(self, model_id: str, request_id: str) -> None:
        """Queue the end of a run behind its ready requests, under *request_id*.

        Nothing happens if it was queued before.
        """
        with self._lock:
            # `unload_model` has no seq_id: a repetition is recognized by its future.
            if self._futures.wait(request_id, 0.0) is not None:
                return
            lane = self._open_lane_locked(model_id)
            self._futures.create(request_id, model_id, lane.next_seq)
            lane.ready.append(Job(request_id, functools.partial(self._unload, model_id)))
            self.rotation.add_locked(lane)

    def _unload(self, model_id: str) -> object:
        self.close_model(model_id, f"model {model_id} was unloaded")
        return {"model_id": model_id, "type": "unload_model"}

    def close_model(self, model_id: str, why: str) -> None:
        """Refuse further requests of a run, fail its queued requests, and unload it soon."""
        with self._lock:
            lane = self._models.get(model_id)
            if lane is None or lane.closed is not None:
                return
            failed = self._close_lane_locked(lane, why)
        self._fail(failed, why)

    def refuse_early(self, owner: str) -> None:
        """Fail the requests of a run that have waited too long for a missing seq_id."""
        with self._lock:
            lane = self._models.get(owner)
            # *owner* may be a sampler, whose requests wait for no seq_id.
            missing = None if lane is None else lane.missing
            if lane is None or missing is None:
                return
            if self._clock() < missing.since + self._missing_seq_id_s:
                return
            early = lane.remove_early()
        # A gateway may have refused the missing request in the server's name: the client then
        # counts its seq_id as used, and would never fill the gap.  When it reads this message, it
        # sends the failed requests again, from the missing seq_id on (docs/protocol.md, "Sequence
        # numbers", rule 5).
        for seq_id, job in early:
            why = f"Sequence conflict: expected {missing.seq_id}, got {seq_id}."
            self._fail([job.request_id], f"{why} seq_id {missing.seq_id} has not arrived.")

    # Samplers

    def add_sampler(self, sampler_id: str, session_id: str, source: WeightsSource) -> Sampler:
        """Open a sampler and return it; the engine loads its weights soon."""
        with self._lock:
            weights = SamplerWeights(sampler_id, source)
            lane = self._lanes.get(source.key)
            if lane is None:
                lane = self._lanes[source.key] = SamplerLane(source.key, weights)
            elif source.newest:
                # Live batches finish with the earlier weights; queued requests use the new ones.
                self._retired.append(lane.weights)
                lane.weights, lane.wanted = weights, True
            else:
                # The lane has the same weights: this copy of their files is not needed.
                self._retired.append(weights)
            lane.samplers += 1
            sampler = self._samplers[sampler_id] = Sampler(sampler_id, session_id, lane)
            self.rotation.add_locked(lane)
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

        The outcome is passed to *on_done* if given, and cannot be polled for then (see
        `FutureTable.create`).
        """
        with self._lock:
            sampler = self._open_sampler_locked(sampler_id)
            known = sampler.seen.find(seq_id, digest)
            if known is not None:
                return known
            # Before the seq_id is noted: after a 429 the client sends the same request again.
            if self._queued_samples >= self._limits.max_queued:
                raise HTTPError(
                    429,
                    f"{self._queued_samples} sample requests are queued already; ask again",
                    retry_after_s=1.0,
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
            self.rotation.add_locked(sampler.lane)
            return request_id

    def cancel_sample(self, sampler_id: str, request_id: str) -> None:
        """Drop a sample request from the queue, or from the batch it is in, and fail it.

        Nothing happens if it is done.
        """
        with self._lock:
            sampler = self._samplers.get(sampler_id)
            job = None if sampler is None else sampler.jobs.pop(request_id, None)
            if job is not None:
                self.count_dequeued_locked(job.sampler.lane.drop([job]))
                # The request behind this one may fit where this one did not.
                self.rotation.wake_locked()
        # No check of *job* is needed: if the sample is done, its future keeps its outcome.
        self._fail([request_id], "the client cancelled the request")

    # All

    def end_session(self, session_id: str, why: str) -> None:
        """Fail all queued work of a session and unload its models and samplers soon."""
        failed: List[str] = []
        with self._lock:
            for lane in self._models.values():
                if lane.session_id == session_id and lane.closed is None:
                    failed += self._close_lane_locked(lane, why)
            # A copy, since closing a sampler removes it from the dict.  A closed run stays in its
            # dict until the engine thread has unloaded it.
            for sampler in list(self._samplers.values()):
                if sampler.session_id == session_id:
                    failed += self._close_sampler_locked(sampler)
        self._fail(failed, why)

    def queues(self) -> Queues:
        """Return how many requests wait, and how many are being sampled."""
        with self._lock:
            open_lanes = [lane for lane in self._models.values() if lane.closed is None]
            unfinished = sum(len(sampler.jobs) for sampler in self._samplers.values())
            return Queues(
                {lane.model_id: lane.waiting for lane in open_lanes},
                self._queued_samples,
                unfinished - self._queued_samples,
            )

    def why_waiting(self, owner: str, seq_id: int) -> str:
        """Return, in words, why the request *seq_id* of a run or sampler is not done yet."""
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
        # Runs and the rotation are closed under this lock, too: a request that got in after the
        # engine thread's last look (`end_all`) would stay pending forever.
        if lane is None or lane.closed is not None or self.rotation.is_closing:
            raise HTTPError(
                404, lane.closed if lane and lane.closed else f"{model_id} is not loaded"
            )
        return lane

    def _open_sampler_locked(self, sampler_id: str) -> Sampler:
        sampler = self._samplers.get(sampler_id)
        if sampler is None or self.rotation.is_closing:
            raise HTTPError(404, f"sampler {sampler_id} is not loaded")
        return sampler

    def _close_lane_locked(self, lane: Lane, why: str) -> List[str]:
        """Close a run, remove its requests, and return their ids."""
        lane.closed = why
        self.rotation.add_locked(lane)  # so that the engine thread unloads the model
        return [job.request_id for job in lane.remove_all()]

    def _close_sampler_locked(self, sampler: Sampler) -> List[str]:
        """Close a sampler, drop its requests, and return their ids."""
        del self._samplers[sampler.sampler_id]
        lane, jobs = sampler.lane, sampler.jobs
        lane.samplers -= 1
        self.count_dequeued_locked(lane.drop(jobs.values()))
        sampler.jobs = {}
        self.rotation.add_locked(lane)  # so that the engine thread drops them from batches, too
        return list(jobs)

    # Never called under the lock: completing a future may call back into the OpenAI endpoint.
    def _fail(self, request_ids: List[str], why: str, category: str = "user") -> None:
        for request_id in request_ids:
            self._futures.complete(request_id, Failure(why, category))

    # For the engine thread

    def count_dequeued_locked(self, samples: int) -> None:
        """Count sample requests that left the queue of a lane; call it under the lock."""
        self._queued_samples -= samples

    def give_back(self, lane: Optional[AnyLane]) -> List[SamplerWeights]:
        """Put a lane that was served back into the rotation, if it has more to do.

        Returns the weights that were retired since the last call: no lane uses them any more.
        """
        with self._lock:
            # Checked and removed under one lock: a sampler with the same weights that opens at this
            # moment either keeps this lane alive or gets a new one.
            if isinstance(lane, SamplerLane) and lane.is_over:
                del self._lanes[lane.key]
                self._retired.append(lane.weights)
            if isinstance(lane, Lane) and self._models.get(lane.model_id) is not lane:
                lane = None  # removed when its run ended
            self.rotation.give_back_locked(lane)
            retired, self._retired = self._retired, []
            return retired

    def next_job(self, lane: Lane) -> Optional[Job]:
        """Take the next ready job of a run; None if there is none."""
        with self._lock:
            return lane.ready.popleft() if lane.ready else None

    def remove_ended(self, lane: Lane) -> bool:
        """Remove a run that is closed and has no ready jobs; return whether it was removed."""
        with self._lock:
            # A closed run accepts no requests, so an empty queue stays empty.
            has_ended = lane.closed is not None and not lane.ready
            if has_ended:
                self._models.pop(lane.model_id, None)
            return has_ended

    def end_all(self, why: str) -> List[SamplerLane]:
        """Fail everything that is queued or being sampled; return the lanes of the samplers."""
        with self._lock:
            failed: List[str] = []
            for lane in self._models.values():
                failed += self._close_lane_locked(lane, why)
            for sampler in list(self._samplers.values()):
                failed += self._close_sampler_locked(sampler)
            lanes = list(self._lanes.values())
        self._fail(failed, why, "server")
        return lanes
