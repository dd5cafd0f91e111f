"""SessionManager: creates server sessions, keeps them alive, and ends them.

It combines a SessionRegistry and a HeartbeatThread, and adds the start and the end of sessions.

Threads, all daemons: ``tinkex-heartbeat`` and its workers (see heartbeat.py) run from the first
session to the last.  ``tinkex-session-i`` create sessions, so that a caller can give up at any time
and a session that arrives late is ended; they also end sessions whose owners were collected.
``tinkex-status-file`` writes the status file (see process_status.py).
"""

from __future__ import annotations

import logging
import random
import time
import weakref
from concurrent.futures import Future, InvalidStateError, TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Callable, List, Optional, Type

from tinkex._runtime import lifecycle
from tinkex._runtime.clock import SYSTEM_CLOCK, Clock
from tinkex._runtime.worker_pool import WorkerPool
from tinkex._sessions.heartbeat import HeartbeatThread, RemovalCallback
from tinkex._sessions.process_status import FindWork, StatusFile
from tinkex._sessions.registry import SessionRegistry, closed_error
from tinkex._sessions.session_record import (
    FINISH_S,
    HTTPLink,
    LinkFactory,
    ManagerDropped,
    SessionRecord,
)
from tinkex._sessions.session_table import HeartbeatPolicy, SessionSnapshot
from tinkex.config import Config
from tinkex.errors import APITimeoutError

if TYPE_CHECKING:
    from tinkex.types import CreateSessionResponse

logger = logging.getLogger(__name__)

#: Seconds added to startup_timeout_s, to give the last attempt time to connect.
_GRACE_S = 3.0

#: close waits this long for threads once all connections are closed, in seconds.
_LINGER_S = 1.0


class SessionManager:
    """Keeps any number of sessions alive, on any number of servers.  Thread-safe.

    Args:
        on_removed: called as ``on_removed(session_id, reason)`` when a session is lost (not when
            it is stopped), in a heartbeat thread, outside every lock.
        clock, rand, open_link: for tests.
        find_work: returns the sessions' work.  If it is given, their status is written to a file:
            see `tinkex._sessions.process_status`.
    """

    def __init__(
        self,
        *,
        on_removed: Optional[RemovalCallback] = None,
        clock: Clock = SYSTEM_CLOCK,
        rand: Callable[[], float] = random.random,
        open_link: LinkFactory = HTTPLink,
        find_work: Optional[FindWork] = None,
    ) -> None:
        self._clock = clock
        self._rand = rand
        self._on_removed = on_removed
        self._open_link = open_link
        self._find_work = find_work
        self._start_over()
        lifecycle.track(self)

    def start_session(self, config: Config, *, owner: Optional[object] = None) -> str:
        """Create a session on the server of *config*, keep it alive, and return its id.

        Blocks until the server responds, for at most slightly more than ``startup_timeout_s``.  A
        call that is interrupted or times out leaves nothing behind: a session that arrives late is
        ended.

        Args:
            config: the server, and the session's labels.
            owner: the session is stopped when this object is garbage-collected.

        Raises:
            APIError: the server refused, or cannot be reached; the message names the server.
            ClientClosedError: the manager was closed.
        """
        if self._registry.closed:  # check before the server creates a session we could not keep
            raise closed_error()
        creation = _Creation(config, self._open_link(config))
        # In another thread, so that Ctrl-C and the timeout can end the wait at any time, and a
        # server that hangs delays no heartbeat.
        try:
            self._session_workers.submit(creation.run)
            created = creation.wait()
            record = creation.record(created)
        except BaseException:  # Ctrl-C too
            creation.give_up()
            raise
        self._register(record, config, owner)
        for level, text in (
            (logging.INFO, created.info_message),
            (logging.WARNING, created.warning_message),
            (logging.ERROR, created.error_message),
        ):
            if text:
                logger.log(level, "message from %s: %s", config.host_and_port, text)
        return created.session_id

    def adopt_session(
        self, config: Config, session_id: str, *, owner: Optional[object] = None
    ) -> None:
        """Keep alive a session that another process opened; stopping it does not finish it.

        If it is adopted more than once, it is kept alive until the last *owner* is collected.  Does
        not block.

        Raises:
            ClientClosedError: the manager was closed.
        """
        link = self._open_link(config)
        self._register(SessionRecord(session_id, link, config, owned=False), config, owner)

    def stop_session(
        self,
        session_id: str,
        status: str = "success",
        detail: Optional[str] = None,
        *,
        timeout_s: float = 5.0,
    ) -> None:
        """Stop the heartbeats and tell the server that the session is over.

        Idempotent; never raises; takes at most about *timeout_s*.  A beat in flight can
        neither revive the session nor log anything more.
        """
        # First: when a beat in flight gets its response, there is no session to revive or report.
        record = self._registry.remove(session_id)
        self._heartbeat.wake()  # the thread ends if that was the last session
        if record is not None:
            record.finish(status, detail, timeout_s)

    def snapshot(self) -> List[SessionSnapshot]:
        """Return what is known about each live session; contains no secrets."""
        return self._registry.snapshots()

    def mark_lost(self, session_id: str, status: int) -> None:
        """Note that a heartbeat sent elsewhere got the response *status* (404 or 410).

        Does nothing for a session that is no longer kept alive.
        """
        record = self._registry.get(session_id)
        if record is not None:
            self._heartbeat.record_heartbeat_reply(record, status)

    def lost_reason(self, session_id: str) -> Optional[str]:
        """Return why a session of this manager was lost, in words; None if it was not lost."""
        return self._registry.lost_reason(session_id)

    def close(
        self, status: str = "success", detail: Optional[str] = None, *, timeout_s: float = 5.0
    ) -> None:
        """Stop every session and every thread.  Idempotent; never raises; starts no thread.

        Takes at most about *timeout_s*.  Sessions of a host that does not respond are left to
        expire, so a hung host costs one wait of two seconds.
        """
        deadline = time.monotonic() + timeout_s
        # The order matters: first let no session be added, then end all that exist.
        self._registry.close()
        self._heartbeat.finish_all(status, detail, timeout_s)
        if self._status_file is not None:
            self._status_file.update()  # no session is left: its thread removes the file and ends
        self._heartbeat.close()
        self._session_workers.drain()  # requests to finish dropped sessions may still be queued
        # All connections are closed, except those that finish dropped sessions.  Any other thread
        # that does not end right away is connecting, or is creating a session that no caller waits
        # for any more; that session is ended when it arrives.
        now = time.monotonic()
        deadline = min(max(deadline, now + 0.2), now + _LINGER_S)
        self._heartbeat.join(deadline)
        self._session_workers.join(deadline)
        ending = self._registry.ending()
        for record in ending:
            record.link.abort()
        if ending:  # their threads end now
            self._session_workers.join(time.monotonic() + 0.2)
        if self._status_file is not None:
            self._status_file.join(deadline)
        lifecycle.untrack(self)

    def close_at_exit(self, status: str, timeout_s: float) -> None:
        """See lifecycle.Tracked."""
        self.close(status, "the process ended without closing the client", timeout_s=timeout_s)

    def forget_after_fork(self) -> None:
        """See lifecycle.Tracked: the child starts without sessions; the parent's live on."""
        # New locks and queues: the old ones may be held by a thread that does not exist here.
        self._finalizer.detach()
        self._start_over()
        lifecycle.track(self)

    def __enter__(self) -> SessionManager:
        return self

    def __exit__(self, exc_type: Optional[Type[BaseException]], *exc: object) -> None:
        self.close("success" if exc_type is None else "errored")

    def _start_over(self) -> None:
        """Set everything up, without sessions or threads."""
        self._registry = SessionRegistry(self._clock)
        # Its threads end soon after they become idle: programs create few sessions.
        self._session_workers = WorkerPool("tinkex-session", 64, idle_s=0.05)
        work = self._find_work
        self._status_file = None if work is None else StatusFile(self._registry, self._clock, work)
        self._heartbeat = HeartbeatThread(
            self._registry, self._session_workers, self._clock, self._on_removed, self._status_file
        )
        # A message, since the heartbeat thread refers to the registry and never to the manager.
        self._finalizer = weakref.finalize(self, self._registry.inbox.put, ManagerDropped())
        self._finalizer.atexit = False  # close_at_exit does that

    def _register(self, record: SessionRecord, config: Config, owner: Optional[object]) -> None:
        """Add a session and make sure that the heartbeats run; end the session if that fails."""
        try:
            used = self._registry.add(record, HeartbeatPolicy.of(config), self._rand(), owner)
            self._heartbeat.ensure_running()
        except BaseException:  # Ctrl-C too
            if self._registry.remove_record(record):
                record.finish("interrupted", None, FINISH_S)
            else:  # the id belongs to another session, which goes on
                record.link.abort()
            raise
        if used is not record:
            record.link.abort()  # the record in use serves both owners


class _Creation:
    """A session that a background thread creates for a caller that may give up."""

    def __init__(self, config: Config, link: HTTPLink) -> None:
        self._config = config
        self._link = link
        # Settles the race between a session that arrives, which sets the future, and a caller that
        # gives up, which cancels it: the first one wins.
        self._arrival: Future[CreateSessionResponse] = Future()

    def record(self, created: CreateSessionResponse) -> SessionRecord:
        """Return the record that the manager keeps of the created session."""
        return SessionRecord(created.session_id, self._link, self._config)

    def run(self) -> None:
        """Create the session; end it if the caller has given up.  Blocks."""
        if self._arrival.cancelled():
            self._link.abort()
            return
        try:
            created = self._link.create()
        except BaseException as error:  # the caller is waiting: it must get every error
            self._link.abort()
            try:
                self._arrival.set_exception(error)
            except InvalidStateError:
                logger.debug("creating a session failed after its caller gave up: %s", error)
            return
        try:
            self._arrival.set_result(created)
        except InvalidStateError:
            logger.info(
                "session %s arrived after its caller gave up; ending it", created.session_id
            )
            self.record(created).finish("interrupted", None, FINISH_S)

    def wait(self) -> CreateSessionResponse:
        """Wait for the session, for at most slightly more than ``startup_timeout_s``.

        Raises:
            APITimeoutError: the session has not arrived in time.
            APIError: the session could not be created.
        """
        config = self._config
        try:
            return self._arrival.result(config.startup_timeout_s + _GRACE_S)
        except FutureTimeoutError as error:
            if self._arrival.done() and self._arrival.exception() is error:
                raise  # a timeout of the attempt, not of this wait
            raise APITimeoutError(
                f"{config.host_and_port} did not create a session within "
                f"{config.startup_timeout_s:g} s",
                hint=f"Is the server at {config.base_url} overloaded, or something other than "
                "Tinker?",
            ) from None

    def give_up(self) -> None:
        """Stop waiting; if the session has already arrived, end it."""
        # Start no further attempt, but do not abort this one: the server may be creating the
        # session right now, and only the response contains the id needed to end it.
        self._link.give_up()
        if self._arrival.cancel() or self._arrival.exception() is not None:
            return
        self.record(self._arrival.result()).finish("interrupted", None, FINISH_S)


# Guarded by lifecycle.module_lock().
_default: Optional[SessionManager] = None


def default_manager() -> SessionManager:
    """Return the manager that all clients of the process share: there is one heartbeat thread."""
    global _default
    with lifecycle.module_lock():
        manager = _default
    if manager is None:
        from tinkex._sessions.runtime import work_in_flight  # runtimes depend on managers

        # Outside the lock, which `lifecycle.track` takes too.
        manager = SessionManager(find_work=work_in_flight)
        with lifecycle.module_lock():
            manager = _default = _default or manager
    return manager
