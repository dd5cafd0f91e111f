"""SessionManager: creates server sessions, keeps them alive, and ends them.

Threads, all daemons: ``tinkex-heartbeat`` and its workers (see heartbeat.py), from the first
session to the last; ``tinkex-session-i`` create sessions, so that a caller can give up at once and
a session that arrives late is ended, and end forgotten ones.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import weakref
from concurrent.futures import Future, InvalidStateError, TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Callable, List, Optional, Type

from tinkex._runtime import lifecycle
from tinkex._runtime.clock import SYSTEM_CLOCK, Clock
from tinkex._sessions.heartbeat import new_thread_locked, take_in
from tinkex._sessions.heartbeat_state import (
    FINISH_S,
    Core,
    Live,
    RemovalCallback,
    finish,
    finish_all,
    stop_session,
)
from tinkex._sessions.link import HTTPLink, LinkFactory
from tinkex._sessions.session_table import HeartbeatPolicy, SessionSnapshot
from tinkex._transport.server_state import state_of
from tinkex.config import Config
from tinkex.errors import APITimeoutError, ClientClosedError, InvalidInputError

if TYPE_CHECKING:
    from tinkex.types import CreateSessionResponse

    _Arrival = Future[CreateSessionResponse]

logger = logging.getLogger(__name__)

#: Beyond startup_timeout_s, for the last attempt's own connection time.
_GRACE_S = 3.0

#: close waits this long for threads once everything is broken off, in seconds.
_LINGER_S = 1.0


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
        core = self._core
        if core.closed:
            raise _closed()
        arrival: _Arrival = Future()
        live = _live(config, self._open_link)
        try:
            core.errands.submit(lambda: _create(core, live, arrival))
            created = arrival.result(config.startup_timeout_s + _GRACE_S)
        except BaseException as error:
            if arrival.done() and not arrival.cancelled() and arrival.exception() is error:
                raise
            _give_up(core, live, arrival)
            if isinstance(error, FutureTimeoutError):
                raise _too_slow(config) from None
            raise
        try:
            self._register(created.session_id, config, live, owner)
        except BaseException:
            _undo(core, created.session_id, live)
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
        """Keep alive a session that another process opened; stopping it does not finish it.

        Adopted again, it lives until the last *owner* is collected.  Does not block.

        Raises:
            ClientClosedError: the manager was closed.
        """
        live = _live(config, self._open_link)
        live.owned = False
        try:
            self._register(session_id, config, live, owner)
        except BaseException:
            _undo(self._core, session_id, live)
            raise

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

    def mark_lost(self, session_id: str, status: int) -> None:
        """Take in that the server has answered a heartbeat of somebody else with 404 or 410."""
        core = self._core
        with core.lock:
            live = core.live.get(session_id)
        if live is not None:
            take_in(core, session_id, live, status, None, core.clock.monotonic())

    def lost_reason(self, session_id: str) -> Optional[str]:
        """Why a session of this manager was lost, in words; None if it was not."""
        with self._core.lock:
            return self._core.lost.get(session_id)

    def close(
        self, status: str = "success", detail: Optional[str] = None, *, timeout_s: float = 5.0
    ) -> None:
        """Stop every session and every thread.  Idempotent; never raises; starts no thread.

        Takes at most about *timeout_s*.  Sessions of a host that does not answer are left to
        expire, so a hung host costs one wait of two seconds.
        """
        core = self._core
        deadline = time.monotonic() + timeout_s
        with core.lock:
            core.closed = True
            thread = core.thread
        finish_all(core, status, detail, timeout_s)
        core.workers.close()
        core.errands.close()
        # All connections are broken off.  What does not end at once is connecting, or creating a
        # session that nobody waits for any more and that is ended when it arrives.
        now = time.monotonic()
        deadline = min(max(deadline, now + 0.2), now + _LINGER_S)
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(deadline - now)
        core.workers.join(deadline)
        core.errands.join(deadline)
        lifecycle.untrack(self)

    def close_at_exit(self, status: str, timeout_s: float) -> None:
        """See lifecycle.Tracked."""
        self.close(status, "the process ended without closing the client", timeout_s=timeout_s)

    def forget_after_fork(self) -> None:
        """See lifecycle.Tracked: the child starts without sessions; the parent's live on."""
        self._finalizer.detach()
        self._start_over()
        lifecycle.track(self)

    def __enter__(self) -> SessionManager:
        return self

    def __exit__(self, exc_type: Optional[Type[BaseException]], *exc: object) -> None:
        self.close("success" if exc_type is None else "errored")

    def _start_over(self) -> None:
        self._core = Core(*self._settings)
        self._finalizer = weakref.finalize(self, self._core.inbox.put, ("close",))
        self._finalizer.atexit = False

    def _register(
        self, session_id: str, config: Config, live: Live, owner: Optional[object]
    ) -> None:
        """Put a session on the table and make sure that somebody beats it."""
        core = self._core
        now = core.clock.monotonic()
        thread: Optional[threading.Thread] = None
        with core.lock:
            if core.closed:
                raise _closed()
            known = core.live.get(session_id)
            if known is None:
                core.live[session_id] = live
                core.table.add(session_id, HeartbeatPolicy.of(config), now=now, phase=core.rand())
            elif known.owned or not known.owners:
                raise InvalidInputError(
                    f"session {session_id} is kept alive by this manager already",
                    hint="Two servers that use the same ids need a SessionManager each.",
                )
            if owner is not None:
                core.add_owner_locked(session_id, owner)
            # One that never started was interrupted before it could.  One that is sending for
            # the only session so far may hang in it.
            if core.thread is None or not core.thread.is_alive() or core.sending_inline:
                thread = new_thread_locked(core)
        if thread is not None:
            try:
                thread.start()
            except RuntimeError as error:  # interpreter shutdown, or no more threads to be had
                raise ClientClosedError(f"cannot start thread {thread.name}: {error}") from error
        core.wake()
        if known is not None:
            live.link.abort()  # the one in use serves for both


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
    return Live(open_link(config), state_of(config), config.host_and_port, config.quiet)


def _create(core: Core, live: Live, arrival: _Arrival) -> None:
    """Create a session and hand it over; end it if nobody waits any more."""
    if arrival.cancelled():
        live.link.abort()
        return
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
        arrival.set_result(created)
    except InvalidStateError:
        logger.info("session %s arrived after its caller gave up; ending it", created.session_id)
        finish(core, created.session_id, live, "interrupted", None, FINISH_S)


def _give_up(core: Core, live: Live, arrival: _Arrival) -> None:
    """The caller waits no longer; a session that is there already is ended now."""
    live.link.give_up()
    if arrival.cancel() or arrival.exception() is not None:
        return
    finish(core, arrival.result().session_id, live, "interrupted", None, FINISH_S)


def _undo(core: Core, session_id: str, live: Live) -> None:
    """End a session whose registration failed or was interrupted."""
    with core.lock:
        known = core.live.get(session_id)
        if known is live:
            core.take_off_locked(session_id)
    if known is None or known is live:
        finish(core, session_id, live, "interrupted", None, FINISH_S)
    else:  # the id of another session: that one goes on
        live.link.abort()


def _closed() -> ClientClosedError:
    return ClientClosedError("the session manager was closed", hint="Make a new SessionManager.")


def _too_slow(config: Config) -> APITimeoutError:
    return APITimeoutError(
        f"{config.host_and_port} did not create a session within {config.startup_timeout_s:g} s",
        hint=f"Is the server at {config.base_url} overloaded, or something else than Tinker?",
    )
