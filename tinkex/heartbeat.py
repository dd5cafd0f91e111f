"""The heartbeat thread of a SessionManager, and the state it shares with it.

``tinkex-heartbeat`` decides whose beat is due, and sends it itself while there is only one
session.  With several, at most eight ``tinkex-heartbeat-worker-i`` send.  The threads know the
`Core`, never the manager, so a forgotten manager can be collected.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import weakref
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

from tinkex.beat_queue import BeatQueue
from tinkex.clock import Clock
from tinkex.errors import TinkexError
from tinkex.scheduler import WorkerPool
from tinkex.session_link import SessionLink
from tinkex.session_table import SessionTable, Verdict

logger = logging.getLogger(__name__)

WORKER_CAP = 8
#: Wall and monotonic clock drifting apart by this much between two turns: the machine slept.
SLEEP_JUMP_S = 5.0
#: A thread woken later than this is worth a warning: something held the interpreter.
LATE_S = 2.0

#: Called as ``on_removed(session_id, reason)``, outside every lock, when a session is lost.
RemovalCallback = Callable[[str, str], object]

#: To the heartbeat thread: ("wake",), ("abandon", session_id) or ("close",).
Message = Tuple[str, ...]


@dataclasses.dataclass
class Live:
    """What the manager holds for a live session."""

    link: SessionLink
    base_url: str
    host: str
    quiet: bool = False
    owned: bool = True  # ours to finish; False for one that another process opened
    finalizer: Optional[weakref.finalize[Any, Any]] = None


class Core:
    """What a manager and its threads share."""

    def __init__(
        self, clock: Clock, rand: Callable[[], float], on_removed: Optional[RemovalCallback]
    ) -> None:
        self.clock = clock
        self.rand = rand
        self.on_removed = on_removed
        # A SimpleQueue, because finalizers post to it (bpo-32576).
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        # Guards everything below.  Never held during I/O, logging or callbacks.
        self.lock = threading.Lock()
        self.table = SessionTable()
        self.live: Dict[str, Live] = {}
        self.lost: Dict[str, str] = {}
        self.no_finish: Set[str] = set()  # base URLs without that route
        self.beats = BeatQueue(WORKER_CAP)
        self.workers = new_workers()
        self.thread: Optional[threading.Thread] = None
        self.sending_inline = False
        self.closed = False

    def wake(self) -> None:
        """Have the heartbeat thread look at the table again."""
        self.inbox.put(("wake",))

    def new_thread_locked(self) -> threading.Thread:
        """Make the heartbeat thread of this core, to be started outside the lock."""
        self.sending_inline = False
        self.thread = threading.Thread(
            target=_run, args=(self,), name="tinkex-heartbeat", daemon=True
        )
        return self.thread


def new_workers() -> WorkerPool:
    """Make the pool that sends beats when there are several sessions."""
    return WorkerPool("tinkex-heartbeat-worker", WORKER_CAP)


def stop_session(
    core: Core, session_id: str, status: str, detail: Optional[str], timeout_s: float
) -> bool:
    """Take a session off the table, then tell the server.  Never raises an Exception.

    False if the server was asked and did not answer.
    """
    with core.lock:
        core.table.remove(session_id)
        live = core.live.pop(session_id, None)
        core.lost.pop(session_id, None)
        if live is not None and all(other.host != live.host for other in core.live.values()):
            core.beats.forget(live.host)
    core.wake()
    return live is None or finish(core, session_id, live, status, detail, timeout_s)


def finish(
    core: Core,
    session_id: str,
    live: Live,
    status: str,
    detail: Optional[str],
    timeout_s: float,
) -> bool:
    """Post the session's end, once, and close its connections.  Never raises an Exception.

    False if the server did not answer.
    """
    if live.finalizer is not None:
        live.finalizer.detach()
    with core.lock:
        known_missing = live.base_url in core.no_finish
    try:
        if live.owned and not known_missing and timeout_s > 0:
            answer = live.link.finish(session_id, status, detail, timeout_s)
            if answer in (404, 405, 501):
                with core.lock:
                    core.no_finish.add(live.base_url)
            elif answer >= 300:
                logger.debug("finishing session %s: status %d", session_id, answer)
    except TinkexError as error:
        logger.debug("finishing session %s: %s", session_id, error)
        return False
    finally:
        live.link.abort()
    return True


def _run(core: Core) -> None:
    """Sleep until a beat is due or a message comes; see to both.  Ends with the last session."""
    me = threading.current_thread()
    offset = core.clock.wall() - core.clock.monotonic()
    told_late = False
    while True:
        late_s = _sleep(core)
        now = core.clock.monotonic()
        jump_s = core.clock.wall() - now - offset
        offset += jump_s
        slept = abs(jump_s) > SLEEP_JUMP_S
        with core.lock:
            if core.thread is not me:  # replaced while sending
                return
            if slept:
                core.table.beat_all_at(now)
            due = core.table.take_due(now)
            alone = len(core.table) == 1
            if not len(core.table):
                core.thread = None
                idle, core.workers = core.workers, new_workers()
                break
            core.sending_inline = alone and bool(due)
            links = [live.link for live in core.live.values()] if slept else []
        if slept:
            logger.info("the clock jumped by %.0f s (the machine slept?): beating at once", jump_s)
        elif late_s > LATE_S and not told_late:
            told_late = True
            logger.warning(
                "heartbeats ran %.1f s late: something kept this process from running (a long "
                "computation that holds the GIL?). If that lasts, the server will end the session",
                late_s,
            )
        for link in links:
            link.drop_idle()
        _send(core, due, inline=alone)
        with core.lock:
            if core.thread is me:
                core.sending_inline = False
    idle.close()


def _sleep(core: Core) -> float:
    """Wait for the next due time or a message, and see to the message.

    Returns how much later than wanted the thread was woken, in seconds.
    """
    with core.lock:
        due = core.table.next_due()
    began = core.clock.monotonic()
    timeout = None if due is None else max(0.0, due - began)
    try:
        message = core.inbox.get(timeout=timeout)
    except queue.Empty:
        return core.clock.monotonic() - max(began, due or 0.0)
    if message[0] == "abandon":
        session_id = message[1]
        core.workers.submit(
            lambda: stop_session(core, session_id, "success", "the client was dropped", 5.0)
        )
    elif message[0] == "close":
        with core.lock:
            session_ids = core.table.ids()
        for session_id in session_ids:
            stop_session(core, session_id, "success", "the session manager was dropped", 1.0)
    return 0.0


def _send(core: Core, due: List[str], *, inline: bool) -> None:
    """Have the beats that are *due* sent: by this thread, or by the workers."""
    with core.lock:
        ready = [(core.live[s].host, s) for s in due if s in core.live]
        for host, session_id in ready:
            core.beats.put(host, session_id)
    if inline:
        _beat_next(core)
    else:
        for _ in ready:
            core.workers.submit(lambda: _beat_all(core))


def _beat_all(core: Core) -> None:
    """A worker's task: send beats while there are any that may be sent."""
    while _beat_next(core):
        pass


def _beat_next(core: Core) -> bool:
    """Send the next beat and act on the answer.  Survives everything; False if there is none."""
    sent = core.clock.monotonic()
    with core.lock:
        item = core.beats.take(sent)
        live = core.live.get(item[1]) if item is not None else None
    if item is None:
        return False
    host, session_id = item
    status: Optional[int] = None
    error: Optional[str] = None
    if live is not None:
        try:
            status = live.link.beat(session_id)
        except TinkexError as failure:
            error = failure.message
        except Exception as failure:
            error = repr(failure)
            logger.debug("heartbeat of session %s failed", session_id, exc_info=True)
    now = core.clock.monotonic()
    with core.lock:
        core.beats.done(host, sent, answered=status is not None or live is None)
        verdict = core.table.record(session_id, status=status, error=error, now=now)
        if verdict is not None and verdict.removed:
            core.live.pop(session_id, None)
            core.lost[session_id] = _reason(verdict)
    if verdict is not None and live is not None:
        _report(session_id, live, verdict)
        if verdict.removed:
            _removed(core, session_id, live, _reason(verdict))
    return True


def _removed(core: Core, session_id: str, live: Live, reason: str) -> None:
    if live.finalizer is not None:
        live.finalizer.detach()
    live.link.abort()
    core.wake()
    if core.on_removed is not None:
        try:
            core.on_removed(session_id, reason)
        except Exception:
            logger.exception("the removal callback of session %s failed", session_id)


def _reason(verdict: Verdict) -> str:
    if verdict.kind == "gone":
        return "the server ended it or let it expire"
    if verdict.kind == "refused":
        return f"the server refused its heartbeat ({verdict.error})"
    return f"no heartbeat succeeded for {verdict.silent_s:.0f} s ({verdict.error})"


def _report(session_id: str, live: Live, verdict: Verdict) -> None:
    """Log what a verdict means for the user; silence is the normal case."""
    if verdict.kind == "gone" and verdict.first_beat:
        logger.warning(
            "the very first heartbeat of session %s got 'not found' from %s: is base_url right, "
            "path prefix and all? Without heartbeats the server will end the session",
            session_id,
            live.host,
        )
    elif verdict.kind == "gone":
        level = logging.DEBUG if live.quiet else logging.INFO
        logger.log(level, "session %s is gone: %s", session_id, _reason(verdict))
    elif verdict.removed:
        logger.warning(
            "session %s is given up: %s. Work that needs it will fail; create a new client",
            session_id,
            _reason(verdict),
        )
    elif verdict.kind == "warn":
        logger.warning(
            "no heartbeat of session %s has succeeded at %s for %.0f s (%s); still trying",
            session_id,
            live.host,
            verdict.silent_s,
            verdict.error,
        )
    elif verdict.kind == "recovered":
        logger.info("heartbeats of session %s succeed again, after %.0f s", session_id, verdict.silent_s)
    elif verdict.kind == "failing":
        logger.debug("heartbeat of session %s: %s", session_id, verdict.error)
