"""What a SessionManager and its threads share, and how a session ends.

The threads know the `Core`, never the manager, so a forgotten manager can be collected.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
import weakref
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

from tinkex._runtime.clock import Clock
from tinkex._runtime.worker_pool import WorkerPool
from tinkex._sessions.beat_queue import BeatQueue
from tinkex._sessions.link import SessionLink
from tinkex._sessions.session_table import SessionTable
from tinkex._transport.server_flags import ABSENT
from tinkex._transport.server_state import ServerState

logger = logging.getLogger(__name__)

WORKER_CAP = 8
#: A server is given this long, in seconds, to take note of a session's end when many end at once.
FINISH_S = 2.0
#: As `ServerState` names it.
FINISH_ROUTE = "POST sessions/{id}/finish"
#: So many lost sessions are remembered.
LOST_KEPT = 1000

#: Called as ``on_removed(session_id, reason)``, outside every lock, when a session is lost.
RemovalCallback = Callable[[str, str], object]

#: To the heartbeat thread: ("wake",), ("abandon", session_id, token) or ("close",).
Message = Tuple[Any, ...]


@dataclasses.dataclass
class Live:
    """What the manager holds for a live session."""

    link: SessionLink
    server: ServerState
    host: str
    quiet: bool = False
    owned: bool = True  # ours to finish; False for one that another process opened
    #: Finalizers of the objects it lives for, by a token of each; without any, until it is stopped.
    owners: Dict[object, weakref.finalize[Any, Any]] = dataclasses.field(default_factory=dict)

    def disown(self) -> None:
        """Let the session's end not depend on its owners any more."""
        for finalizer in self.owners.values():
            finalizer.detach()


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
        #: Creates sessions, and ends forgotten ones; its threads leave at once when idle.
        self.errands = WorkerPool("tinkex-session", 64, idle_s=0.05)
        # Guards everything below.  Never held during I/O, logging or callbacks.
        self.lock = threading.Lock()
        self.table = SessionTable()
        self.live: Dict[str, Live] = {}
        self.lost: Dict[str, str] = {}  # why and when, until the session is stopped
        self.beats = BeatQueue(WORKER_CAP)
        self.workers = new_workers()
        self.thread: Optional[threading.Thread] = None
        self.sending_inline = False
        self.closed = False

    def wake(self) -> None:
        """Have the heartbeat thread look at the table again."""
        self.inbox.put(("wake",))

    def add_owner_locked(self, session_id: str, owner: object) -> None:
        """Have a live session end when *owner* is collected."""
        token = object()
        finalizer = weakref.finalize(owner, self.inbox.put, ("abandon", session_id, token))
        finalizer.atexit = False
        self.live[session_id].owners[token] = finalizer

    def take_off_locked(self, session_id: str) -> Optional[Live]:
        """Forget a session, wherever it is noted; None if it does not live."""
        self.table.remove(session_id)
        live = self.live.pop(session_id, None)
        if live is not None:
            live.disown()
            if all(other.host != live.host for other in self.live.values()):
                self.beats.forget(live.host)
        return live

    def note_lost_locked(self, session_id: str, reason: str) -> None:
        """Take off a session that was not stopped by us, and remember why."""
        self.take_off_locked(session_id)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.clock.wall()))
        self.lost[session_id] = f"{reason}, at {stamp}"
        if len(self.lost) > LOST_KEPT:  # clients that were dropped never ask
            del self.lost[next(iter(self.lost))]


def new_workers() -> WorkerPool:
    """Make the pool that sends beats when there are several sessions."""
    return WorkerPool("tinkex-heartbeat-worker", WORKER_CAP)


def stop_session(
    core: Core, session_id: str, status: str, detail: Optional[str], timeout_s: float
) -> None:
    """Take a session off the table, then tell the server.  Never raises an Exception."""
    with core.lock:
        live = core.take_off_locked(session_id)
        core.lost.pop(session_id, None)
    core.wake()
    if live is not None:
        finish(core, session_id, live, status, detail, timeout_s)


def abandon(core: Core, session_id: str, token: object) -> None:
    """End a session if nothing needs it any more; the owner that *token* stands for is gone."""
    with core.lock:
        live = core.live.get(session_id)
        if live is None or live.owners.pop(token, None) is None or live.owners:
            return
        core.take_off_locked(session_id)
    reason = ("success", "the client was dropped", FINISH_S)
    core.errands.submit(lambda: finish(core, session_id, live, *reason))


def finish(
    core: Core,
    session_id: str,
    live: Live,
    status: str,
    detail: Optional[str],
    timeout_s: float,
) -> bool:
    """Post the session's end, once, and close its connections.  Never raises an Exception.

    False if the server was asked and did not answer.
    """
    server = live.server
    try:
        if live.owned and timeout_s > 0 and server.missing_status(FINISH_ROUTE) is None:
            answer = live.link.finish(session_id, status, detail, timeout_s)
            if answer < 300:
                server.note_present(FINISH_ROUTE)
            elif answer in ABSENT:
                # Where sessions were finished before, it means that this one had ended already.
                server.note_missing(FINISH_ROUTE, answer)
            else:
                logger.debug("finishing session %s: status %d", session_id, answer)
    except Exception as error:
        logger.debug("finishing session %s: %s", session_id, error)
        return False
    finally:
        live.link.abort()
    return True


def finish_all(core: Core, status: str, detail: Optional[str], timeout_s: float) -> None:
    """End every session, within about *timeout_s*; starts no thread.

    This thread posts, with those workers that are idle.  Once a host does not answer, its other
    sessions are left to expire, so a hung host costs one bounded wait.
    """
    with core.lock:
        failing = {s.session_id for s in core.table.snapshots() if s.consecutive_failures}
        todo = sorted(core.live.items(), key=lambda item: item[0] in failing)
        core.live, core.lost, core.table = {}, {}, SessionTable()
        core.beats = BeatQueue(WORKER_CAP)
        workers = core.workers
    for _, live in todo:
        live.disown()
    one_round = _FinishRound(core, todo, status, detail, core.clock.monotonic() + timeout_s)
    # Before the heartbeat thread wakes, finds nothing left to do and lets the workers go.
    workers.submit_to_idle(one_round.run, len(todo) - 1)
    core.wake()
    one_round.run()
    one_round.wait_for_others()


class _FinishRound:
    """Posts the end of many sessions from several threads."""

    def __init__(
        self,
        core: Core,
        todo: List[Tuple[str, Live]],
        status: str,
        detail: Optional[str],
        deadline: float,
    ) -> None:
        self._core = core
        self._reason = (status, detail)
        self._deadline = deadline
        self._live = dict(todo)
        # Guards the queue, the set and the number; notified when a post has ended.
        self._changed = threading.Condition()
        self._queue = BeatQueue(WORKER_CAP + 1)
        self._silent: Set[str] = set()
        self._posting = 0
        for session_id, live in todo:
            self._queue.put(live.host, session_id)

    def run(self) -> None:
        """Post until there is nothing left that this thread may post."""
        while True:
            now = self._core.clock.monotonic()
            with self._changed:
                item = self._queue.take(now)
                if item is None:
                    return
                self._posting += 1
                host, session_id = item
                left_s = 0.0 if host in self._silent else max(0.0, self._deadline - now)
            live = self._live[session_id]
            # Half of what is left: one silent host must not use up the time of all.
            share_s = min(FINISH_S, left_s / 2)
            answered = finish(self._core, session_id, live, *self._reason, share_s)
            with self._changed:
                ended = self._core.clock.monotonic()
                self._queue.done(host, now, ended, answered=answered)
                if not answered:
                    self._silent.add(host)
                self._posting -= 1
                self._changed.notify_all()

    def wait_for_others(self) -> None:
        """Wait until no thread posts any more: a process that exits would cut its post in two."""
        with self._changed:
            left_s = self._deadline - self._core.clock.monotonic()
            self._changed.wait_for(lambda: not self._posting, max(0.0, left_s))
