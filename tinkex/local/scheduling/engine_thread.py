"""EngineThread: runs all engine work on one thread, "tinkex-engine".

The backend owns, starts and closes it.  The thread serves training runs and samplers in rotation,
one request or one slice of sampling at a time.  In between, and when idle, it does the backend's
housekeeping.
"""

from __future__ import annotations

import atexit
import logging
import threading
from typing import Callable

from tinkex.local.engines.engine import Engine
from tinkex.local.scheduling.lanes import Job, Lane
from tinkex.local.scheduling.sampling import OnSampled, SamplingWorker, failure_of, log_failure
from tinkex.local.scheduling.scheduler import Scheduler
from tinkex.local.settings import SamplingLimits
from tinkex.local.state.futures import Failure, FutureTable, Success

_log = logging.getLogger(__name__)

#: Most seconds that the process waits at exit for interrupted work.
EXIT_WAIT_S = 20.0

#: Called with the current time; does what is due and returns when to call again (both monotonic).
Housekeeping = Callable[[float], float]


class EngineThread:
    """The one thread on which the engine works, so that engines need no locks.

    Args:
        engine: does the work, and is closed at the end.
        scheduler: decides which work is next.
        futures: gets the results.
        housekeeping: called when it is due, and when it was requested from the rotation.
        limits: how sampling shares the engine.
        on_sampled: called for each sample request that is done.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        futures: FutureTable,
        housekeeping: Housekeeping,
        *,
        limits: SamplingLimits,
        on_sampled: OnSampled,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._futures = futures
        self._housekeeping = housekeeping
        self._clock = clock
        self._sampling = SamplingWorker(engine, scheduler, futures, limits, clock, on_sampled)
        self._thread = threading.Thread(target=self._work, name="tinkex-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Interrupt the engine, fail all queued requests, close the engine, and end the thread.

        Waits at most *timeout_s*; work that takes longer ends in the background.
        """
        # Before the interrupt: when the interrupted call returns, there must be no other work.
        self._scheduler.rotation.close()
        self._engine.interrupt()
        self.join(timeout_s)
        if self._thread.is_alive():
            _log.info("the engine is still busy; thread tinkex-engine ends when it is done")
            # At exit, Python stops a daemon thread wherever it is.  If that is in C++ code, the
            # process aborts.
            atexit.register(self._thread.join, EXIT_WAIT_S)

    def join(self, timeout_s: float) -> None:
        """Wait at most *timeout_s* for the thread to end."""
        if self._thread.is_alive():  # it may never have been started
            self._thread.join(timeout_s)

    def _work(self) -> None:
        rotation = self._scheduler.rotation
        due = self._clock()
        while not rotation.is_closing:
            if rotation.housekeeping_requested() or self._clock() >= due:
                due = self._do_housekeeping()
            lane = rotation.next_lane(due, self._sampling.runnable)
            if isinstance(lane, Lane):
                self._run_next_job(lane)
            elif lane is not None:
                self._sampling.serve(lane)
            # HTTP threads only list weights as retired: unloading them calls the engine, which only
            # this thread may do.
            for weights in self._scheduler.give_back(lane):
                self._sampling.remove(weights)
        self._shut_down()

    def _do_housekeeping(self) -> float:
        now = self._clock()
        try:
            return self._housekeeping(now)
        except Exception:
            # The thread must survive this: without it, no request would get a result.
            _log.exception("housekeeping failed; it runs again in a minute")
            return now + 60.0

    def _run_next_job(self, lane: Lane) -> None:
        job = self._scheduler.next_job(lane)
        # None if another thread closed the run after the rotation chose it.
        if job is not None:
            self._run(lane, job)
        # After the job, which may be the one that closes the run (`unload_model`).
        if self._scheduler.remove_ended(lane):
            log_failure(f"unload {lane.model_id}", self._engine.unload, lane.model_id)

    def _run(self, lane: Lane, job: Job) -> None:
        if lane.broken is not None:
            self._futures.complete(job.request_id, Failure(lane.broken, "user"))
            return
        try:
            value = job.run()
        # Any exception: this thread serves all runs, and must survive the work of one.
        except Exception as error:
            failure = failure_of(error, job.request_id)
            # Requests may be queued behind the creation already: they fail with this reason,
            # instead of reaching an engine that does not know the model.
            if job.creates:
                lane.broken = f"model {lane.model_id} was not created: {failure.message}"
            self._futures.complete(job.request_id, failure)
        else:
            self._futures.complete(job.request_id, Success(value))

    def _shut_down(self) -> None:
        lanes = self._scheduler.end_all("the server was closed")
        for weights in self._scheduler.give_back(None):
            self._sampling.remove(weights)
        for lane in lanes:
            self._sampling.end(lane)
        # The engine last: ending batches and unloading weights still calls it.
        log_failure("close", self._engine.close)
