"""The heartbeat thread of a SessionManager.

``tinkex-heartbeat`` decides whose beat is due, and sends it itself while there is only one
session.  With several, at most eight ``tinkex-heartbeat-worker-i`` send.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from typing import List, Optional

from tinkex._runtime.clock import Clock
from tinkex._runtime.deferred import run_deferred
from tinkex._sessions.heartbeat_state import FINISH_S, Core, Live, abandon, finish_all, new_workers
from tinkex._sessions.session_table import Verdict
from tinkex.errors import ClientClosedError, TinkexError

logger = logging.getLogger(__name__)

#: Wall and monotonic clock drifting apart by this much between two turns: the machine slept.
#: Connections idle for so long without our doing may be dead.
SLEEP_JUMP_S = 5.0
#: A thread woken later than this is worth a warning: something held the interpreter.
LATE_S = 2.0
#: The longest sleep: a sleeping machine is noticed between two, and waits have an upper limit.
NAP_S = 60.0


class ClockWatch:
    """Notices that the machine slept.  Used by one thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset = clock.wall() - clock.monotonic()
        self.told_late = False

    def jump_s(self) -> float:
        """Seconds the wall clock has gained on the monotonic one since the last call."""
        jump = self._clock.wall() - self._clock.monotonic() - self._offset
        self._offset += jump
        return jump


def new_thread_locked(core: Core) -> threading.Thread:
    """Make the heartbeat thread of *core*, in place of any other; start it outside the lock."""
    core.sending_inline = False
    core.thread = threading.Thread(target=run, args=(core,), name="tinkex-heartbeat", daemon=True)
    return core.thread


def run(core: Core) -> None:
    """Take turns until the last session has ended, or another thread has taken over."""
    watch = ClockWatch(core.clock)
    while True:
        try:
            if not turn(core, watch):
                return
        except Exception:
            with contextlib.suppress(Exception):  # a user's log handler may be what failed
                logger.exception("a turn of the heartbeat thread failed; it goes on")
            time.sleep(0.1)  # whatever it was, not in a hot loop


def turn(core: Core, watch: ClockWatch) -> bool:
    """Sleep until a beat is due or a message comes; see to both.  False if this was the last."""
    with core.lock:
        # Replaced while it was sending?  Then this must not even look into the inbox.
        if core.thread is not threading.current_thread():
            return False
        wanted = core.table.next_due()
    late_s = _sleep(core, wanted)
    jump_s = watch.jump_s()
    slept = abs(jump_s) > SLEEP_JUMP_S
    now = core.clock.monotonic()
    with core.lock:
        idle = None
        if not len(core.table):
            core.thread = None
            idle, core.workers = core.workers, new_workers()
        if slept:
            core.table.beat_all_at(now)
        due = core.table.take_due(now)
        alone = len(core.table) == 1
        core.sending_inline = alone and bool(due)
        stale = slept or late_s > SLEEP_JUMP_S
        links = [live.link for live in core.live.values()] if stale else []
    if idle is not None:
        idle.drain()  # they may be finishing sessions
        return False
    if slept:
        logger.info("the clock jumped by %.0f s (the machine slept?): beating at once", jump_s)
    elif late_s > LATE_S and not watch.told_late:
        watch.told_late = True
        logger.warning(
            "heartbeats ran %.1f s late: something kept this process from running (a long "
            "computation that holds the GIL?). If that lasts, the server will end the session",
            late_s,
        )
    for link in links:
        link.drop_idle()
    run_deferred()
    _send(core, due, inline=alone)
    with core.lock:
        if core.thread is threading.current_thread():
            core.sending_inline = False
    return True


def _sleep(core: Core, wanted: Optional[float]) -> float:
    """Wait until *wanted* or for a message, and see to the message.

    Returns how much later than wanted the thread was woken, in seconds.
    """
    began = core.clock.monotonic()
    nap_s = NAP_S if wanted is None else min(NAP_S, max(0.0, wanted - began))
    try:
        message = core.inbox.get(timeout=nap_s)
    except queue.Empty:
        return core.clock.monotonic() - max(began, wanted or 0.0)
    if message[0] == "abandon":
        abandon(core, message[1], message[2])
    elif message[0] == "close":
        finish_all(core, "success", "the session manager was dropped", FINISH_S)
    return 0.0


def _send(core: Core, due: List[str], *, inline: bool) -> None:
    """Have the beats that are *due* sent: by this thread, or by the workers."""
    with core.lock:
        ready = [(core.live[s].host, s) for s in due if s in core.live]
        for host, session_id in ready:
            core.beats.put(host, session_id)
    if inline:
        _beat_all(core)
        return
    for _ in ready:
        try:
            core.workers.submit(lambda: _beat_all(core))
        except ClientClosedError as error:  # no thread is to be had: better late than never
            logger.debug("heartbeats are sent one after the other: %s", error)
            _beat_all(core)


def _beat_all(core: Core) -> None:
    """Send beats while there are any that may be sent."""
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
        core.beats.done(host, sent, now, answered=status is not None or live is None)
        if core.live.get(session_id) is None and all(o.host != host for o in core.live.values()):
            core.beats.forget(host)
    if live is not None:
        take_in(core, session_id, live, status, error, now)
    return True


def take_in(
    core: Core, session_id: str, live: Live, status: Optional[int], error: Optional[str], now: float
) -> None:
    """Act on the answer to a heartbeat: its HTTP *status*, or None and an *error*."""
    with core.lock:
        verdict = None
        if core.live.get(session_id) is live:  # else it was stopped meanwhile
            verdict = core.table.record(session_id, status=status, error=error, now=now)
            if verdict is not None and verdict.removed:
                core.note_lost_locked(session_id, _reason(verdict))
    if verdict is not None:
        _report(session_id, live, verdict)
        if verdict.removed:
            _removed(core, session_id, live, _reason(verdict))
        elif verdict.confirm:
            core.wake()  # the heartbeat thread may be asleep until a later time


def _removed(core: Core, session_id: str, live: Live, reason: str) -> None:
    live.link.abort()
    core.wake()
    if core.on_removed is not None:
        try:
            core.on_removed(session_id, reason)
        except BaseException:  # SystemExit too would end the thread that beats for the others
            logger.exception("the removal callback of session %s failed", session_id)


def _reason(verdict: Verdict) -> str:
    if verdict.kind == "gone":
        return "the server ended it or let it expire"
    if verdict.kind == "refused":
        return f"the server refused its heartbeat ({verdict.error})"
    return f"no heartbeat succeeded for {verdict.silent_s:.0f} s ({verdict.error})"


def _report(session_id: str, live: Live, verdict: Verdict) -> None:
    """Log what a verdict means for the user; silence is the normal case."""
    if verdict.kind == "gone" and verdict.first_beat and verdict.status == 404 and live.owned:
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
            "session %s is given up: %s. Work that needs it will fail; %screate a new client",
            session_id,
            _reason(verdict),
            "check the API key and " if verdict.status in (401, 403) else "",
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
        logger.info(
            "heartbeats of session %s succeed again, after %.0f s", session_id, verdict.silent_s
        )
    elif verdict.kind == "failing":
        logger.debug("heartbeat of session %s: %s", session_id, verdict.error)
