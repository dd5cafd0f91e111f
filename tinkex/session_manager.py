"""SessionManager: creates server sessions, keeps them alive, and ends them.

Threads, all daemons: ``tinkex-heartbeat`` and its workers (see heartbeat.py), from the first
session to the last; ``tinkex-session-start-i`` create sessions, so that a caller can give up at
once, and a session that arrives late is ended.
"""

from __future__ import annotations

import logging
import random
import threading
import weakref
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Callable, List, Optional, Tuple

from tinkex import lifecycle
from tinkex.clock import SYSTEM_CLOCK, Clock
from tinkex.config import Config
from tinkex.errors import APITimeoutError, ClientClosedError, InvalidInputError
from tinkex.heartbeat import Core, Live, RemovalCallback, finish, stop_session
from tinkex.scheduler import WorkerPool
from tinkex.session_link import HTTPLink, LinkFactory
from tinkex.session_table import HeartbeatPolicy, SessionSnapshot
from tinkex.types import CreateSessionResponse

logger = logging.getLogger(__name__)

#: Beyond startup_timeout_s, for the last attempt's own connection time.
_GRACE_S = 3.0

_Arrival = Future[Tuple[CreateSessionResponse, Live]]


class SessionManager:
    """Keeps any number of sessions alive, of any number of servers.  Thread-safe.

    Args:
        on_removed: called as ``on_removed(session_id, reason)`` when a session is lost (not when
            it is stopped), in a heartbeat thread, outside every lock.
        clock, rand, open_link: for tests.
    """

    def __init__(
        self,
        *,
        on_removed: Optional[RemovalCallback] = None,
        clock: Clock = SYSTEM_CLOCK,
        rand: Callable[[], float] = random.random,
        open_link: LinkFactory = HTTPLink,
    ) -> None:
        self._settings = (clock, rand, on_removed)
        self._open_link = open_link
        self._start_over()
        lifecycle.track(self)

    def start_session(self, config: Config, *, owner: Optional[object] = None) -> str:
        """Create a session on the server of *config*, keep it alive, and return its id.

        Blocks until the server answers, for at most ``startup_timeout_s`` and a little.  Whoever is
        interrupted or gives up leaves nothing behind: a session that arrives late is ended.

        Args:
            config: the server, and the session's labels.
            owner: the session is stopped when this object is collected.

        Raises:
            APIError: the server refused or cannot be reached; the message names it.
            ClientClosedError: the manager was closed.
        """
        arrival: _Arrival = Future()
        self._starters.submit(lambda: _create(self._core, self._open_link, config, arrival))
        try:
            created, live = arrival.result(config.startup_timeout_s + _GRACE_S)
        except BaseException as error:
            if arrival.done() and not arrival.cancelled() and arrival.exception() is error:
                raise
            _give_up(self._core, arrival)
            if isinstance(error, FutureTimeoutError):
                raise _too_slow(config) from None
            raise
        try:
            self._register(created.session_id, config, live, owner)
        except BaseException:
            stop_session(self._core, created.session_id, "interrupted", None, 2.0)
            finish(self._core, created.session_id, live, "interrupted", None, 2.0)
            raise
        for level, text in (
            (logging.INFO, created.info_message),
            (logging.WARNING, created.warning_message),
            (logging.ERROR, created.error_message),
        ):
            if text:
                logger.log(level, "%s says: %s", config.host_and_port, text)
        return created.session_id

    def adopt_session(
        self, config: Config, session_id: str, *, owner: Optional[object] = None
    ) -> None:
        """Keep alive a session that another process opened; stopping it does not finish it."""
        live = _live(config, self._open_link)
        live.owned = False
        self._register(session_id, config, live, owner)

    def stop_session(
        self,
        session_id: str,
        status: str = "success",
        detail: Optional[str] = None,
        *,
        timeout_s: float = 5.0,
    ) -> None:
        """Stop beating and tell the server that the session is over.

        Idempotent; never raises; takes at most about *timeout_s*.  A beat in flight can
        neither revive the session nor log anything more.
        """
        stop_session(self._core, session_id, status, detail, timeout_s)

    def snapshot(self) -> List[SessionSnapshot]:
        """What is known of each live session; holds no secret."""
        with self._core.lock:
            return self._core.table.snapshots()

    def lost_reason(self, session_id: str) -> Optional[str]:
        """Why a session of this manager was lost, in words; None if it was not."""
        with self._core.lock:
            return self._core.lost.get(session_id)

    def close(self, status: str = "success", *, timeout_s: float = 5.0) -> None:
        """Stop every session and every thread.  Idempotent; never raises; starts no thread.

        Sessions are finished one after the other; once a host does not answer, its others are
        left to expire, so a hung host costs one bounded wait.
        """
        core = self._core
        with core.lock:
            core.closed = True
            failing = {s.session_id for s in core.table.snapshots() if s.consecutive_failures}
            sessions = [(s in failing, s, core.live[s].host) for s in core.table.ids()]
            thread = core.thread
        deadline = core.clock.monotonic() + timeout_s
        silent_hosts = set()
        for _, session_id, host in sorted(sessions):
            left_s = min(2.0, deadline - core.clock.monotonic())
            share_s = 0.0 if host in silent_hosts else max(0.0, left_s)
            if not stop_session(core, session_id, status, None, share_s):
                silent_hosts.add(host)
        core.wake()
        self._starters.close()
        core.workers.close()
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.2, deadline - core.clock.monotonic()))
        core.workers.join(max(deadline, core.clock.monotonic() + 0.2))
        lifecycle.untrack(self)

    def close_at_exit(self, status: str, timeout_s: float) -> None:
        """See lifecycle.Tracked."""
        self.close(status, timeout_s=timeout_s)

    def forget_after_fork(self) -> None:
        """See lifecycle.Tracked: the child starts without sessions; the parent's live on."""
        self._finalizer.detach()
        self._start_over()
        lifecycle.track(self)

    def __enter__(self) -> SessionManager:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start_over(self) -> None:
        self._core = Core(*self._settings)
        self._starters = WorkerPool("tinkex-session-start", 64, idle_s=0.05)
        self._finalizer = weakref.finalize(self, self._core.inbox.put, ("close",))
        self._finalizer.atexit = False

    def _register(
        self, session_id: str, config: Config, live: Live, owner: Optional[object]
    ) -> None:
        """Put a session on the table and make sure that somebody beats it."""
        core = self._core
        now = core.clock.monotonic()
        if owner is not None:
            live.finalizer = weakref.finalize(owner, core.inbox.put, ("abandon", session_id))
            live.finalizer.atexit = False
        thread: Optional[threading.Thread] = None
        with core.lock:
            if core.closed:
                raise ClientClosedError("the session manager was closed")
            if session_id in core.live:
                raise InvalidInputError(f"session {session_id} is kept alive by this manager already")
            core.live[session_id] = live
            core.table.add(session_id, HeartbeatPolicy.of(config), now=now, phase=core.rand())
            # A thread that is sending for the only session so far may hang in it: replace it.
            if core.thread is None or core.sending_inline:
                thread = core.new_thread_locked()
        if thread is not None:
            thread.start()
        core.wake()


# Guarded by lifecycle.module_lock().
_default: Optional[SessionManager] = None


def default_manager() -> SessionManager:
    """The manager all clients of the process share, so that there is one heartbeat thread."""
    global _default
    with lifecycle.module_lock():
        manager = _default
    if manager is None:
        manager = SessionManager()  # outside the lock, which tracking takes too
        with lifecycle.module_lock():
            manager = _default = _default or manager
    return manager


def _live(config: Config, open_link: LinkFactory) -> Live:
    return Live(open_link(config), config.base_url, config.host_and_port, config.quiet)


def _create(core: Core, open_link: LinkFactory, config: Config, arrival: _Arrival) -> None:
    """Create a session and hand it over; end it if nobody waits any more."""
    live = _live(config, open_link)
    try:
        created = live.link.create()
    except BaseException as error:
        live.link.abort()
        try:
            arrival.set_exception(error)
        except InvalidStateError:
            logger.debug("creating a session failed after its caller gave up: %s", error)
        return
    try:
        arrival.set_result((created, live))
    except InvalidStateError:
        logger.info("session %s arrived after its caller gave up; ending it", created.session_id)
        finish(core, created.session_id, live, "interrupted", None, 5.0)


def _give_up(core: Core, arrival: _Arrival) -> None:
    """The caller waits no longer; a session that is there already is ended now."""
    if arrival.cancel() or arrival.exception() is not None:
        return
    created, live = arrival.result()
    finish(core, created.session_id, live, "interrupted", None, 2.0)


def _too_slow(config: Config) -> APITimeoutError:
    return APITimeoutError(
        f"{config.host_and_port} did not create a session within {config.startup_timeout_s:g} s",
        hint=f"Is the server at {config.base_url} overloaded, or something else than Tinker?",
    )
