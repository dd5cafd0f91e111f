"""HeartbeatThread: sends the heartbeats of the sessions in a registry.

The thread ``tinkex-heartbeat`` decides which session's beat is due, and sends it itself while there
is only one session.  With several sessions, up to eight threads ``tinkex-heartbeat-worker-i`` send
the beats.  The heartbeat thread runs from the first session to the last; other threads send it
messages through the registry's inbox.  It refers to the registry, never to the manager, so that a
forgotten manager can be garbage-collected.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Callable, Optional

from tinkex._runtime.clock import Clock
from tinkex._runtime.lifecycle import run_deferred
from tinkex._runtime.worker_pool import WorkerPool
from tinkex._sessions.session_record import (
    FINISH_S,
    MAX_WORKERS,
    UNHURRIED_FINISH_S,
    FinishRound,
    ManagerDropped,
    OwnerCollected,
    Wake,
)
from tinkex._sessions.session_table import Verdict
from tinkex.errors import ClientClosedError, TinkexError

if TYPE_CHECKING:
    from tinkex._sessions.process_status import StatusFile
    from tinkex._sessions.registry import SessionRegistry
    from tinkex._sessions.session_record import SessionRecord

logger = logging.getLogger(__name__)

#: If the wall clock and the monotonic clock drift apart by more than this between two iterations,
#: in seconds, the machine slept; connections that were idle for that long may be dead.
SLEEP_JUMP_S = 5.0
#: Waking up later than this, in seconds, is worth a warning: something held the interpreter.
LATE_S = 2.0
#: The longest sleep of the thread, in seconds: it must wake now and then to notice that the machine
#: slept, and systems limit how long a wait may be.
MAX_SLEEP_S = 60.0

#: Called as ``on_removed(session_id, reason)``, outside every lock, when a session is lost.
RemovalCallback = Callable[[str, str], object]


class HeartbeatThread:
    """Keeps the sessions of a registry alive.  Thread-safe.

    Args:
        registry: the sessions.
        session_workers: threads that finish the sessions whose owners were collected.
        clock: the source of time.
        on_removed: called when a session is lost.
        status_file: kept up to date for other processes to read; None writes no file.

    Attributes:
        workers: threads that send beats when there are several sessions.
    """

    def __init__(
        self,
        registry: SessionRegistry,
        session_workers: WorkerPool,
        clock: Clock,
        on_removed: Optional[RemovalCallback],
        status_file: Optional[StatusFile] = None,
    ) -> None:
        self._status_file = status_file
        self.inbox = registry.inbox
        self.on_removed = on_removed
        self._registry = registry
        self._session_workers = session_workers
        self._clock = clock
        self._begin_watch()
        # Guards the attributes below.  Taken before the registry's own lock; never held during I/O.
        self._lock = threading.Lock()
        self.workers = _new_workers()
        self._thread: Optional[threading.Thread] = None  # the thread in charge
        self._leaving: Optional[threading.Thread] = None  # the last thread to find no session left
        self._sending_inline = False

    def wake(self) -> None:
        """Have the thread check the registry again."""
        self.inbox.put(Wake())

    def ensure_running(self) -> None:
        """Start the thread unless it is running.  Call this after adding a session.

        Raises:
            ClientClosedError: the thread cannot be started.
        """
        with self._lock:
            in_charge = self._thread is not None and self._thread.is_alive()
            # A thread that is sending the beat of what was the only session may hang in that
            # request, so a new thread takes over.
            if not in_charge or self._sending_inline:
                thread = self._new_thread()
                # Start it with the lock held: the new thread waits for the lock, and if it cannot
                # be started, the old one stays in charge.
                try:
                    thread.start()
                except RuntimeError as error:  # interpreter shutdown, or too many threads
                    message = f"cannot start thread {thread.name}: {error}"
                    raise ClientClosedError(message) from error
                self._thread, self._sending_inline = thread, False
        self.wake()

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="tinkex-heartbeat", daemon=True)

    def finish_all(self, status: str, detail: Optional[str], timeout_s: float) -> None:
        """End every session within about *timeout_s*, without starting a thread.

        The calling thread and the idle workers send the requests.
        """
        records = self._registry.remove_all()
        with self._lock:
            workers = self.workers
        finishing = FinishRound(records, status, detail, self._clock, timeout_s)
        # Before `wake`, because the heartbeat thread finds no session left and ends the workers.
        workers.submit_to_idle(finishing.run, len(records) - 1)
        self.wake()
        finishing.run()
        finishing.wait_for_others()

    def close(self) -> None:
        """Have the workers end.  The thread ends by itself when no session is left."""
        with self._lock:
            workers = self.workers
        workers.close()

    def join(self, deadline: float) -> None:
        """Wait until *deadline* (monotonic) for the thread and the workers."""
        with self._lock:
            threads, workers = (self._thread, self._leaving), self.workers
        for thread in threads:
            if thread is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        workers.join(deadline)

    def _run(self) -> None:
        """Iterate until no session is left, or another thread has taken over."""
        self._begin_watch()
        while True:
            try:
                if not self.run_once():
                    return
            except Exception:
                with contextlib.suppress(Exception):  # a user's log handler may be what failed
                    logger.exception("an iteration of the heartbeat thread failed; it continues")
                time.sleep(0.1)  # an error that repeats must not become a busy loop

    def run_once(self) -> bool:
        """Sleep until a beat is due or a message arrives, and handle it.  False ends the thread."""
        with self._lock:
            # A thread that was replaced while it was sending must not take a message.
            if self._thread is not threading.current_thread():
                return False
        late_s = self._sleep()
        # The monotonic clock stands still while the machine sleeps, so no beat is due afterwards;
        # the wall clock shows that time has passed for the server.
        jump_s = self._clock_jump()
        slept = abs(jump_s) > SLEEP_JUMP_S
        if self._leave_if_idle():
            return False
        self._report_delay(jump_s if slept else 0.0, late_s)
        # The server or a router has probably closed idle connections by now: a beat on one of them
        # would time out.
        if slept or late_s > SLEEP_JUMP_S:
            for record in self._registry.records():
                record.link.drop_idle()
        run_deferred()
        with self._lock:
            # Atomic with the decision on which thread sends: if a session is added after this,
            # another thread is started for it, since this one may hang.
            now = self._clock.monotonic()
            due, alone = self._registry.queue_due_beats(now, all_sessions=slept)
            self._sending_inline = alone and due > 0
        self._send(due, inline=alone)
        if self._status_file is not None:
            self._status_file.update()
        with self._lock:
            if self._thread is threading.current_thread():
                self._sending_inline = False
        return True

    def _leave_if_idle(self) -> bool:
        """If no session is left, step down as the thread in charge and return True."""
        with self._lock:
            # Atomic: `ensure_running` for a session added later finds no thread and starts one.
            if len(self._registry):
                return False
            self._leaving, self._thread = self._thread, None
            workers, self.workers = self.workers, _new_workers()
        workers.drain()  # they may be finishing sessions
        if self._status_file is not None:
            self._status_file.update()
        return True

    def _sleep(self) -> float:
        """Wait until a message arrives, or a beat or the status file is due; handle the message.

        Returns how many seconds too late the thread woke up.
        """
        due = self._registry.next_due()
        if due is not None and self._status_file is not None:
            due = min(due, self._status_file.next_due() or due)
        began = self._clock.monotonic()
        sleep_s = MAX_SLEEP_S if due is None else min(MAX_SLEEP_S, max(0.0, due - began))
        try:
            message = self.inbox.get(timeout=sleep_s)
        except queue.Empty:
            return self._clock.monotonic() - max(began, due or 0.0)
        if isinstance(message, OwnerCollected):
            self._finish_unowned(message)
        elif isinstance(message, ManagerDropped):
            # In this thread: the finalizer that sent the message must not do any I/O.
            self.finish_all("success", "the session manager was dropped", FINISH_S)
        return 0.0

    def _finish_unowned(self, message: OwnerCollected) -> None:
        """End a session if the collected owner was its last."""
        record = self._registry.remove_owner(message.session_id, message.token)
        if record is None:
            return
        # In another thread, since this one must not wait for a server that hangs.
        try:
            self._session_workers.submit(
                functools.partial(self._finish_dropped, record, UNHURRIED_FINISH_S)
            )
        except ClientClosedError:  # the manager is being closed and waits for this thread
            self._finish_dropped(record, FINISH_S)

    def _finish_dropped(self, record: SessionRecord, timeout_s: float) -> None:
        try:
            record.finish("success", "the client was dropped", timeout_s)
        finally:
            self._registry.forget_ending(record)

    def _begin_watch(self) -> None:
        """Watch for clock jumps from now on: one while no thread ran has delayed no heartbeat."""
        self._warned_late = False
        # How far the wall clock is ahead of the monotonic one, which stands still while the
        # machine sleeps.
        self._wall_lead_s = self._clock.wall() - self._clock.monotonic()

    def _clock_jump(self) -> float:
        """Return by how many seconds the clocks have drifted apart since the last call."""
        jump_s = self._clock.wall() - self._clock.monotonic() - self._wall_lead_s
        self._wall_lead_s += jump_s
        return jump_s

    def _report_delay(self, jump_s: float, late_s: float) -> None:
        if jump_s:
            logger.info(
                "the clock jumped by %.0f s (the machine slept?): sending heartbeats now", jump_s
            )
        elif late_s > LATE_S and not self._warned_late:
            self._warned_late = True
            logger.warning(
                "heartbeats ran %.1f s late: something kept this process from running (a long "
                "computation that holds the GIL?). If that lasts, the server will end the session",
                late_s,
            )

    def _send(self, due: int, *, inline: bool) -> None:
        """Send the *due* queued beats, in this thread or through the workers."""
        # With a single session, a hung server delays no other beat, so no worker is needed.
        if inline:
            self._send_queued()
            return
        for _ in range(due):
            try:
                self.workers.submit(self._send_queued)
            except ClientClosedError as error:  # no thread can be started: better late than never
                logger.debug("heartbeats are sent one after the other: %s", error)
                self._send_queued()

    def _send_queued(self) -> None:
        """Send queued beats until there is none that may be sent.  Survives every error."""
        while True:
            beat = self._registry.next_beat()
            if beat is None:
                return
            record = beat.record
            status: Optional[int] = None
            error: Optional[str] = None
            try:
                status = record.link.beat(record.session_id)
            except TinkexError as failure:
                error = failure.message
            except Exception as failure:  # a bug of ours must not end the session
                error = repr(failure)
                logger.debug("heartbeat of session %s failed", record.session_id, exc_info=True)
            # Any status, even an error, shows that the host responds.
            self._registry.beat_ended(beat, responded=status is not None)
            self.record_heartbeat_reply(record, status, error)

    def record_heartbeat_reply(
        self, record: SessionRecord, status: Optional[int], error: Optional[str] = None
    ) -> None:
        """Act on the response to a heartbeat: its HTTP *status*, or None and an *error*."""
        verdict = self._registry.record_heartbeat_reply(record, status, error)
        if verdict is None:
            return
        _log_verdict(record, verdict)
        if verdict.removed:
            self._removed(record, verdict.reason)
        elif verdict.confirm:
            self.wake()  # the next beat is now due earlier

    def _removed(self, record: SessionRecord, reason: str) -> None:
        record.link.abort()
        self.wake()
        if self.on_removed is not None:
            try:
                self.on_removed(record.session_id, reason)
            except BaseException:  # even SystemExit must not end the thread: others need its beats
                logger.exception("the removal callback of session %s failed", record.session_id)


def _new_workers() -> WorkerPool:
    return WorkerPool("tinkex-heartbeat-worker", MAX_WORKERS)


def _log_verdict(record: SessionRecord, verdict: Verdict) -> None:
    """Log what a verdict means for the user; usually, that is nothing."""
    session_id = record.session_id
    # A session that has ended is no reason to warn.  But if its very first beat gets a 404, the
    # URL is probably wrong, and nothing else would show that the session is not kept alive.
    if verdict.kind == "gone" and verdict.first_beat and verdict.status == 404 and record.owned:
        logger.warning(
            "the very first heartbeat of session %s got 'not found' from %s: is base_url right, "
            "path prefix and all? Without heartbeats the server will end the session",
            session_id,
            record.host,
        )
    elif verdict.kind == "gone":
        level = logging.DEBUG if record.quiet else logging.INFO
        logger.log(level, "session %s is gone: %s", session_id, verdict.reason)
    elif verdict.removed:
        logger.warning(
            "session %s is given up: %s. Work that needs it will fail; %screate a new client",
            session_id,
            verdict.reason,
            "check the API key and " if verdict.status in (401, 403) else "",
        )
    elif verdict.kind == "warn":
        logger.warning(
            "no heartbeat of session %s has succeeded at %s for %.0f s (%s); still trying",
            session_id,
            record.host,
            verdict.silent_s,
            verdict.error,
        )
    elif verdict.kind == "recovered":
        logger.info(
            "heartbeats of session %s succeed again, after %.0f s", session_id, verdict.silent_s
        )
    elif verdict.kind == "failing":
        logger.debug("heartbeat of session %s: %s", session_id, verdict.error)
