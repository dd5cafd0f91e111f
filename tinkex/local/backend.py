"""Backend: sessions, runs and samplers, on top of store, scheduler and engine.

Called by the HTTP routes; owned by LocalServer (or a test).  Starts one thread, tinkex-engine, and
ends it in close.  Thread-safe: every public method may be called from any HTTP thread, and none of
them waits for the engine.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from typing import Any, Callable, Dict, List, Optional, Type

from tinkex.local.engines.engine import Engine, EngineInfo
from tinkex.local.errors import HTTPError, StorageError
from tinkex.local.losses.custom_passes import CustomLosses
from tinkex.local.scheduling.batches import WeightsSource
from tinkex.local.scheduling.engine_thread import EngineThread
from tinkex.local.scheduling.lanes import Job, Lane
from tinkex.local.scheduling.scheduler import Scheduler
from tinkex.local.settings import ServerSettings
from tinkex.local.state.activity import Activity
from tinkex.local.state.catalog import Catalog
from tinkex.local.state.deduplication import CreatedIds, IdempotencyCache
from tinkex.local.state.futures import FutureTable
from tinkex.local.state.rows import CheckpointRow
from tinkex.local.state.session_table import SessionTable
from tinkex.local.state.store import Store
from tinkex.local.state.telemetry import TelemetrySink

_log = logging.getLogger(__name__)

#: Seconds between sweeps of old results and checkpoints.
_SWEEP_S = 15.0

#: HTTP status for a session, or work in it, that is over.
_STATUS_OF_STATE = {"expired": 404, "lost": 404, "finished": 410}


class Backend:
    """The embedded server without HTTP.

    Args:
        engine: does the work; the backend owns it from now on and closes it.
        store: keeps sessions, runs and checkpoints; owned by the backend, too.
        settings: the server's settings; the defaults if None.
        lane_type: class of a run's queue; tests pass their own to imitate other servers.
        futures: the table of results; a new one if None.
        clock: returns monotonic seconds, for liveness and results.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        settings: Optional[ServerSettings] = None,
        *,
        lane_type: Type[Lane] = Lane,
        futures: Optional[FutureTable] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings = settings or ServerSettings()
        self.engine = engine
        self.info: EngineInfo = engine.info
        self.store = store
        self.catalog = Catalog(store, engine.info)
        self.futures = FutureTable(clock=clock) if futures is None else futures
        self.activity = Activity(clock, store.wall)
        self.scheduler = Scheduler(
            self.futures,
            settings.limits,
            max_waiting=settings.max_waiting_per_run,
            missing_seq_id_s=settings.missing_seq_id_s,
            lane_type=lane_type,
            clock=clock,
        )
        self.engine_thread = EngineThread(
            engine,
            self.scheduler,
            self.futures,
            self.housekeeping,
            limits=settings.limits,
            on_sampled=self.activity.note_sample,
            clock=clock,
        )
        self.wall = store.wall
        self._clock = clock
        # Guards _sessions, and is held for nothing else.
        self._lock = threading.Lock()
        self._sessions = SessionTable(settings.session_ttl_s)
        # After start, only the engine thread uses these two.
        self._sweep_due = clock() + _SWEEP_S
        self._not_noted: List[str] = []  # expired sessions whose end is not in the database yet
        # Guards _created, and makes looking up an id and taking it one atomic step.
        self._creating = threading.Lock()
        self._created = CreatedIds()
        self.idempotency = IdempotencyCache()
        self.losses = CustomLosses()
        self.telemetry = TelemetrySink(settings.telemetry_kept)

    def start(self) -> None:
        """Start the engine thread."""
        self.engine_thread.start()

    def close(self, timeout_s: float = 1.5) -> None:
        """Release every waiting poll, end the engine thread and close the store.

        Waits at most *timeout_s* for the engine to finish what it is doing.
        """
        # Polls first: they hold HTTP threads, which need not wait for the engine.
        self.futures.close()
        self.engine_thread.close(timeout_s)
        # Only now: the engine thread may have expired sessions until it ended.
        with self._lock:
            left = self._sessions.ids()
        try:
            for session_id in left:
                self.store.end_session(session_id, "lost", "the server was closed")
        except StorageError as error:
            _log.warning("the end of %d sessions is not in the database: %s", len(left), error)
        finally:
            self.store.close()

    # Sessions

    def create_session(self, facts: Dict[str, Any], idempotency_key: Optional[str] = None) -> str:
        """Start a session, which *facts* describe, and return its id.

        A repetition with the same *idempotency_key* returns the same session.
        """
        return self.idempotency.get(idempotency_key, lambda: self._create_session(facts))

    def _create_session(self, facts: Dict[str, Any]) -> str:
        session_id = str(uuid.uuid4())
        # First, so that there is no session if the database cannot be written.
        self.store.add_session(session_id, facts)
        with self._lock:
            self._sessions.add(session_id, self._clock())
        # The engine thread sleeps until the next session expires: this one may be the next.
        self.scheduler.rotation.request_housekeeping()
        return session_id

    def heartbeat(self, session_id: str) -> None:
        """Keep a session alive; HTTPError 404 or 410 if it is over."""
        with self._lock:
            alive = self._sessions.beat(session_id, self._clock())
        if not alive:
            raise self._over(session_id)

    def heartbeat_ages(self) -> Dict[str, float]:
        """Return the seconds since the last heartbeat of each live session."""
        with self._lock:
            return self._sessions.ages(self._clock())

    def has_sessions(self) -> bool:
        """True if there is a live session."""
        with self._lock:
            return bool(self._sessions.ids())

    def check_session(self, session_id: str) -> None:
        """Raise HTTPError 404 or 410 unless the session is live."""
        with self._lock:
            alive = self._sessions.alive(session_id, self._clock())
        if not alive:
            raise self._over(session_id)

    def finish_session(self, session_id: str, reason: str, detail: Optional[str]) -> None:
        """End a session; ending it again changes nothing.  HTTPError 404 if it is unknown."""
        with self._lock:
            # The thread that removes the session ends it, so that a finish and an expiry at the
            # same moment end it once.
            removed = self._sessions.remove(session_id)
        if not removed:
            row = self.store.session(session_id)
            if row is None:
                raise self._over(session_id)
            # A removed session that the database calls live ended while the disk was full.
            if row.state != "live":
                return
        why = f"{reason}, {detail}" if detail else reason
        self._end_session(session_id, "finished", f"the client ended it: {why}", reason, detail)

    def _over(self, session_id: str) -> HTTPError:
        row = self.store.session(session_id)
        if row is None:
            return HTTPError(
                404, f"session {session_id} is unknown; create one, or check the base URL"
            )
        if row.state == "live":  # the engine thread has not noted its expiry yet
            return HTTPError(
                404,
                f"session {session_id} expired: no heartbeat for {self._sessions.ttl_s:g} s; "
                "create a new one and load the last checkpoint",
            )
        status = _STATUS_OF_STATE[row.state]
        return HTTPError(
            status,
            f"session {session_id} is {row.state} ({row.reason}); "
            "create a new one and load the last checkpoint",
        )

    def _end_session(
        self,
        session_id: str,
        state: str,
        reason: str,
        end_reason: Optional[str] = None,
        end_detail: Optional[str] = None,
    ) -> None:
        """Free what a session holds, and record its end in the database."""
        # The database last: a full disk makes this fail, but everything else is freed by then.
        with self._creating:
            self._created.drop_session(session_id)
        self.losses.drop_session(session_id)
        self.scheduler.end_session(session_id, f"session {session_id} is {state}: {reason}")
        self.store.end_session(session_id, state, reason, end_reason, end_detail)

    def housekeeping(self, now: float) -> float:
        """Expire sessions, drop old results and checkpoints; return when to call again.

        Called by the engine thread.  Both *now* and the result are clock seconds.
        """
        with self._lock:
            expired = self._sessions.drop_expired(now)
        # Not under the lock, which every heartbeat takes: ending a session writes to the database.
        for session_id in expired:
            _log.info("session %s expired", session_id)
        self._end_expired([*self._not_noted, *expired])
        if now >= self._sweep_due:
            self._sweep_due = now + _SWEEP_S
            self.futures.sweep(now)
            self.store.checkpoints.delete_expired()
            # After the deletions, which may have made room for the reserve.
            self.store.restore_reserve()
        with self._lock:
            next_expiry = self._sessions.next_due()
        return self._sweep_due if next_expiry is None else min(self._sweep_due, next_expiry)

    def _end_expired(self, session_ids: List[str]) -> None:
        """End sessions; if a full disk keeps the end of one from being recorded, retry it later."""
        self._not_noted = []
        for session_id in session_ids:
            reason = f"no heartbeat for {self._sessions.ttl_s:g} s"
            try:
                self._end_session(session_id, "expired", reason)
            except StorageError as error:
                self._not_noted.append(session_id)
                _log.warning("the end of session %s is not in the database: %s", session_id, error)

    # Runs and samplers

    def check_model(self, model_id: str) -> None:
        """Raise HTTPError 404 or 410 unless *model_id* takes requests."""
        if self.scheduler.has_model(model_id):
            self.check_session(session_of(model_id))
            self.store.touch_run(model_id)
            return
        # If the run ended with its session, the end of the session is the better explanation.
        run = self.catalog.get_model(model_id)
        if run.session_id:  # a copy has none
            self.check_session(run.session_id)
        raise HTTPError(404, f"model {model_id} was unloaded; load its last checkpoint")

    def create_run(
        self, model_id: str, digest: bytes, job: Job, add_run: Callable[[], None]
    ) -> str:
        """Open the run *model_id* and queue the job that creates it; return the request id.

        *add_run* puts the run into the store.  A repetition with the same *digest* returns the
        request id of the first call; another digest is HTTPError 409.
        """
        session_id = session_of(model_id)
        with self._creating:
            known = self._created.find(model_id, digest)
            if known is not None:
                return known
            # First, since it fails on a full disk: nothing else has been done then.
            add_run()
            self._created.add(model_id, digest, job.request_id)
            # Under the lock: a repetition that finds the request id polls its future at once.
            self.scheduler.add_model(model_id, session_id, job)
        self._end_if_over(session_id)
        return job.request_id

    def create_sampler(
        self,
        sampler_id: str,
        digest: bytes,
        model_path: Optional[str],
        weights: Callable[[], WeightsSource],
    ) -> str:
        """Open the sampler *sampler_id*, which draws from what *weights* returns; return its id.

        A repetition with the same *digest* changes nothing; another digest is HTTPError 409.
        """
        session_id = session_of(sampler_id)
        with self._creating:
            # Checked here and below: a repetition must not copy the weights for nothing.
            known = self._created.find(sampler_id, digest)
        if known is not None:
            return known
        source = weights()  # not under the lock: copies files, or has the engine write them
        with self._creating:
            known = self._created.find(sampler_id, digest)
            if known is None:
                try:
                    self.store.add_sampler(sampler_id, session_id, self.info.model_name, model_path)
                except BaseException:
                    source.remove()
                    raise
                self._created.add(sampler_id, digest, sampler_id)
                self.scheduler.add_sampler(sampler_id, session_id, source)
        if known is not None:  # the same request arrived twice at the same time
            source.remove()
        self._end_if_over(session_id)
        return sampler_id

    def frozen(self, checkpoint: Optional[CheckpointRow]) -> WeightsSource:
        """Return a copy of *checkpoint* to draw from, which outlives it; the base model if None."""
        if checkpoint is None:
            return WeightsSource("base", None, self.info.model_name)
        # With the time, since a checkpoint saved again under the same name has other weights.
        key = (checkpoint.folder, checkpoint.created_at)
        return WeightsSource(key, self.store.freeze(checkpoint), checkpoint.tinker_path)

    def _end_if_over(self, session_id: str) -> None:
        """If the session has ended since the view checked it, unload what it has; raise HTTPError.

        Call it after creating a run or sampler: nothing else would unload what is created after the
        session's end.
        """
        try:
            self.check_session(session_id)
        except HTTPError as problem:
            self.scheduler.end_session(session_id, problem.detail)
            raise

    def check_sampler(self, sampler_id: str) -> None:
        """Raise HTTPError 404 or 410 unless *sampler_id* takes requests."""
        if self.scheduler.has_sampler(sampler_id):
            self.check_session(session_of(sampler_id))
            return
        self.check_session(self.catalog.get_sampler(sampler_id).session_id)
        raise HTTPError(404, f"sampling session {sampler_id} is not loaded")


def session_of(model_or_sampler_id: str) -> str:
    """Return the session in ``<session>:train:<n>`` or ``<session>:sample:<n>``."""
    return model_or_sampler_id.partition(":")[0]
