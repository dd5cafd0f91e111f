"""SessionManager: creates server sessions, keeps them alive, and ends them.

Threads, all daemons: ``tinkex-heartbeat``, one per manager, from the first session to the last;
it decides whose beat is due and sends it itself while there is only one session.  With several,
at most eight ``tinkex-heartbeat-worker-i`` send, so that a hung host delays nobody else.
``tinkex-session-start-i`` create sessions, so that a caller can give up at once and a session
that arrives late is ended.  Other threads reach the heartbeat thread through its inbox.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import random
import threading
import weakref
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Callable, Dict, List, Optional, Set, Tuple

from tinkex import lifecycle
from tinkex.api.sessions import create_session, finish_session, session_heartbeat
from tinkex.clock import SYSTEM_CLOCK, Clock
from tinkex.config import Config
from tinkex.errors import APITimeoutError, ClientClosedError, ResponseDecodeError, TinkexError
from tinkex.scheduler import WorkerPool
from tinkex.session_table import HeartbeatPolicy, SessionSnapshot, SessionTable, Verdict
from tinkex.transport import Transport
from tinkex.types import CreateSessionResponse

logger = logging.getLogger(__name__)

WORKER_CAP = 8
#: Wall and monotonic clock drifting apart by this much between two turns: the machine slept.
SLEEP_JUMP_S = 5.0
#: A beat later than this is worth a warning: something held the interpreter.
LATE_S = 5.0

#: Called as ``on_removed(session_id, reason)``, outside every lock, when a session is lost.
RemovalCallback = Callable[[str, str], object]


@dataclasses.dataclass
class _Live:
    """A session's own connection: nothing else can delay its beats."""

    transport: Transport
    host: str


class _Core:
    """What the manager and its threads share; the threads never see the manager itself."""

    def __init__(self, clock: Clock, rand: Callable[[], float], on_removed: Optional[RemovalCallback]):
        self.clock = clock
        self.rand = rand
        self.on_removed = on_removed
        self.inbox: queue.SimpleQueue[Optional[Tuple[str, str]]] = queue.SimpleQueue()
        self.workers = WorkerPool("tinkex-heartbeat-worker", WORKER_CAP)
        self.starters = WorkerPool("tinkex-session-start", 64, idle_s=0.05)
        # Guards everything below.  Never held during I/O, logging or callbacks.
        self.lock = threading.Lock()
        self.table = SessionTable()
        self.live: Dict[str, _Live] = {}
        self.lost: Dict[str, str] = {}
        self.no_finish: Set[str] = set()
        self.thread: Optional[threading.Thread] = None
        self.sending_inline = False
        self.closed = False


class SessionManager:
    """Keeps any number of sessions alive, of any number of servers.  Thread-safe.

    Args:
        on_removed: called as ``on_removed(session_id, reason)`` when a session is lost (not when
            it is stopped), in a heartbeat thread, outside every lock.
        clock, rand: for tests.
    """

    def __init__(
        self,
        *,
        on_removed: Optional[RemovalCallback] = None,
        clock: Clock = SYSTEM_CLOCK,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self._settings = (clock, rand, on_removed)
        self._core = _Core(clock, rand, on_removed)
        self._finalizer = weakref.finalize(self, self._core.inbox.put, ("close", ""))
        self._finalizer.atexit = False
        lifecycle.track(self)

    def start_session(self, config: Config) -> str:
        """Create a session on the server of *config*, keep it alive, and return its id.

        Blocks until the server answers, at most ``startup_timeout_s`` and a little.  Interrupted
        or timed out, it leaves nothing behind: a session that arrives late is ended.

        Raises:
            APIError: the server refused or cannot be reached; the message names it.
            ClientClosedError: the manager was closed.
        """
        core = self._core
        arrival: Future[Tuple[CreateSessionResponse, Transport]] = Future()
        closing = threading.Event()
        core.starters.submit(lambda: _create(core, config, closing, arrival))
        try:
            created, transport = arrival.result(config.startup_timeout_s + 3.0)
        except FutureTimeoutError:
            _give_up(core, arrival, config)
            raise APITimeoutError(
                f"{config.host_and_port} did not create a session "
                f"within {config.startup_timeout_s:g} s",
                hint=f"Is the server at {config.base_url} overloaded, or not a Tinker server?",
            ) from None
        except (KeyboardInterrupt, SystemExit):
            _give_up(core, arrival, config)
            raise
        try:
            _register(core, created.session_id, config, transport)
        except BaseException:
            _finish(core, created.session_id, transport, "interrupted", None, 2.0)
            raise
        return created.session_id

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
        _stop(self._core, session_id, status, detail, timeout_s)

    def snapshot(self) -> List[SessionSnapshot]:
        """What is known of each live session; holds no secret."""
        with self._core.lock:
            return self._core.table.snapshots()

    def lost_reason(self, session_id: str) -> Optional[str]:
        """Why a session of this manager was lost, in words; None if it was not."""
        with self._core.lock:
            return self._core.lost.get(session_id)

    def close(self, status: str = "success", *, timeout_s: float = 5.0) -> None:
        """Stop every session and every thread.  Idempotent; never raises."""
        core = self._core
        with core.lock:
            core.closed = True
            session_ids = core.table.ids()
        deadline = core.clock.monotonic() + timeout_s
        for index, session_id in enumerate(session_ids):
            left = max(0.1, deadline - core.clock.monotonic())
            _stop(core, session_id, status, None, left / (len(session_ids) - index))
        core.inbox.put(None)
        core.workers.close()
        core.starters.close()
        with core.lock:
            thread = core.thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.1, deadline - core.clock.monotonic()))
        core.workers.join(deadline)
        lifecycle.untrack(self)

    def abandon(self, session_id: str) -> None:
        """Stop a session from a finalizer: no lock, no I/O, no wait; the heartbeat thread does it."""
        self._core.inbox.put(("abandon", session_id))

    def close_at_exit(self, status: str, timeout_s: float) -> None:
        """See lifecycle.Tracked."""
        self.close(status, timeout_s=timeout_s)

    def forget_after_fork(self) -> None:
        """See lifecycle.Tracked: the child starts without sessions; the parent's live on."""
        self._core = _Core(*self._settings)

    def __enter__(self) -> SessionManager:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# Guards _default.
_default_lock = threading.Lock()
_default: Optional[SessionManager] = None


def default_manager() -> SessionManager:
    """The manager all clients of the process share, so that there is one heartbeat thread."""
    global _default
    with _default_lock:
        if _default is None:
            _default = SessionManager()
        return _default


def _create(
    core: _Core,
    config: Config,
    closing: threading.Event,
    arrival: Future[Tuple[CreateSessionResponse, Transport]],
) -> None:
    """Create a session and hand it over; end it if nobody waits any more."""
    transport = Transport(config, closing=closing, clock=core.clock)
    try:
        created = create_session(transport, config)
        if not isinstance(created.session_id, str) or not created.session_id:
            raise ResponseDecodeError(
                f"POST /api/v1/create_session: session_id is {created.session_id!r}, not a string"
            )
    except BaseException as error:
        transport.abort()
        _hand_over(arrival, error=error)
        return
    try:
        arrival.set_result((created, transport))
    except InvalidStateError:
        logger.info("session %s arrived after its caller gave up; ending it", created.session_id)
        _finish(core, created.session_id, transport, "interrupted", None, 5.0)


def _hand_over(arrival: Future[Tuple[CreateSessionResponse, Transport]], *, error: BaseException) -> None:
    try:
        arrival.set_exception(error)
    except InvalidStateError:
        logger.debug("creating a session failed after its caller gave up: %s", error)


def _give_up(
    core: _Core, arrival: Future[Tuple[CreateSessionResponse, Transport]], config: Config
) -> None:
    """The caller waits no longer; a session that is there already is ended now."""
    if arrival.cancel() or arrival.exception() is not None:
        return
    created, transport = arrival.result()
    _finish(core, created.session_id, transport, "interrupted", None, 2.0)


def _register(core: _Core, session_id: str, config: Config, transport: Transport) -> None:
    """Put a new session on the table and make sure that somebody beats it."""
    now = core.clock.monotonic()
    with core.lock:
        if core.closed:
            raise ClientClosedError("the session manager was closed")
        core.live[session_id] = _Live(transport, config.host_and_port)
        core.table.add(session_id, HeartbeatPolicy.of(config), now=now, phase=core.rand())
        # A thread that is sending for the only session so far may hang in it: replace it.
        thread: Optional[threading.Thread] = None
        if core.thread is None or core.sending_inline:
            thread = threading.Thread(target=_run, args=(core,), name="tinkex-heartbeat", daemon=True)
            core.thread = thread
            core.sending_inline = False
    if thread is not None:
        thread.start()
    else:
        core.inbox.put(None)


def _stop(
    core: _Core, session_id: str, status: str, detail: Optional[str], timeout_s: float
) -> None:
    with core.lock:
        core.table.remove(session_id)
        live = core.live.pop(session_id, None)
        core.lost.pop(session_id, None)
    core.inbox.put(None)
    if live is not None:
        _finish(core, session_id, live.transport, status, detail, timeout_s)


def _finish(
    core: _Core,
    session_id: str,
    transport: Transport,
    status: str,
    detail: Optional[str],
    timeout_s: float,
) -> None:
    """Post the session's end, once, and close its connection.  Never raises an Exception."""
    base_url = transport.config.base_url
    with core.lock:
        known_missing = base_url in core.no_finish
    try:
        if not known_missing:
            reply = finish_session(transport, session_id, status, detail, timeout_s)
            if reply.status in (404, 405, 501):
                with core.lock:
                    core.no_finish.add(base_url)
            elif reply.status >= 300:
                logger.debug("finishing session %s: status %d", session_id, reply.status)
    except TinkexError as error:
        logger.debug("finishing session %s: %s", session_id, error)
    finally:
        transport.closing.set()
        transport.abort()


def _run(core: _Core) -> None:
    """The heartbeat thread: sleep until a beat is due or a message comes; see to both."""
    me = threading.current_thread()
    offset = core.clock.wall() - core.clock.monotonic()
    told_late = False
    while True:
        with core.lock:
            due = core.table.next_due()
        timeout = None if due is None else max(0.0, due - core.clock.monotonic())
        try:
            message = core.inbox.get(timeout=timeout)
        except queue.Empty:
            message = None
        if message is not None:
            _handle(core, *message)
        now = core.clock.monotonic()
        jump = core.clock.wall() - now - offset
        offset += jump
        with core.lock:
            if core.thread is not me:  # replaced while sending
                return
            if abs(jump) > SLEEP_JUMP_S:
                core.table.beat_all_at(now)
            session_ids = core.table.take_due(now)
            alone = len(core.table) == 1
            if not len(core.table):
                core.thread = None
                idle, core.workers = core.workers, WorkerPool("tinkex-heartbeat-worker", WORKER_CAP)
                break
            core.sending_inline = alone and bool(session_ids)
        if abs(jump) > SLEEP_JUMP_S:
            logger.info("the clock jumped by %.0f s (did the machine sleep?): beating at once", jump)
        elif due is not None and now - due > LATE_S and not told_late:
            told_late = True
            logger.warning(
                "a heartbeat was %.1f s late: something kept this process from running; "
                "a session can expire if that lasts",
                now - due,
            )
        for session_id in session_ids:
            if alone:
                _beat(core, session_id)
            else:
                core.workers.submit(_Beat(core, session_id))
        with core.lock:
            if core.thread is me:
                core.sending_inline = False
    idle.close()


def _handle(core: _Core, kind: str, session_id: str) -> None:
    """A message from a finalizer."""
    if kind == "abandon":
        core.workers.submit(lambda: _stop(core, session_id, "success", "client was dropped", 5.0))
        return
    with core.lock:
        session_ids = core.table.ids()
    for other in session_ids:
        _stop(core, other, "success", "session manager was dropped", 1.0)


@dataclasses.dataclass(frozen=True)
class _Beat:
    """The intent to send one heartbeat."""

    core: _Core
    session_id: str

    def __call__(self) -> None:
        _beat(self.core, self.session_id)


def _beat(core: _Core, session_id: str) -> None:
    """Send one heartbeat and act on the answer.  Survives everything."""
    with core.lock:
        live = core.live.get(session_id)
    if live is None:
        return
    status: Optional[int] = None
    error: Optional[str] = None
    try:
        status = session_heartbeat(live.transport, session_id).status
    except Exception as failure:
        error = getattr(failure, "message", None) or repr(failure)
        if not isinstance(failure, TinkexError):
            logger.debug("heartbeat of session %s failed", session_id, exc_info=True)
    with core.lock:
        verdict = core.table.record(
            session_id, status=status, error=error, now=core.clock.monotonic()
        )
        if verdict is not None and verdict.removed:
            core.live.pop(session_id, None)
            core.lost[session_id] = _reason(verdict)
    if verdict is None:
        return
    _report(session_id, live.host, verdict)
    if verdict.removed:
        live.transport.closing.set()
        live.transport.abort()
        if core.on_removed is not None:
            try:
                core.on_removed(session_id, _reason(verdict))
            except Exception:
                logger.exception("the removal callback of session %s failed", session_id)


def _reason(verdict: Verdict) -> str:
    if verdict.kind == "gone":
        return "the server ended it or let it expire"
    if verdict.kind == "refused":
        return f"the server refused its heartbeat ({verdict.error})"
    return f"no heartbeat succeeded for {verdict.silent_s:.0f} s ({verdict.error})"


def _report(session_id: str, host: str, verdict: Verdict) -> None:
    """Log what a verdict means for the user; silence is the normal case."""
    if verdict.kind == "gone" and verdict.first_beat:
        logger.warning(
            "the first heartbeat of session %s was answered 'not found' by %s: is base_url right, "
            "with its path prefix? Without heartbeats the server will end the session",
            session_id,
            host,
        )
    elif verdict.kind == "gone":
        logger.info("session %s is gone: %s", session_id, _reason(verdict))
    elif verdict.kind in ("refused", "limit"):
        logger.warning(
            "session %s is given up: %s. Work that needs it will fail; create a new client",
            session_id,
            _reason(verdict),
        )
    elif verdict.kind == "warn":
        logger.warning(
            "no heartbeat of session %s has reached %s for %.0f s (%s); still trying",
            session_id,
            host,
            verdict.silent_s,
            verdict.error,
        )
    elif verdict.kind == "recovered":
        logger.info("heartbeats of session %s succeed again after %.0f s", session_id, verdict.silent_s)
    elif verdict.kind == "failing":
        logger.debug("heartbeat of session %s: %s", session_id, verdict.error)
