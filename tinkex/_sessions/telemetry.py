"""Reporter: tells the server how a session fares, if the user has asked for that.

Off unless ``TINKER_TELEMETRY=1`` or ``ServiceClient(telemetry=True)``.  Reported are the session's
start and end, and the failures of its operations, as `telemetry_events` puts them: without keys,
prompts or anything else that the user gave us.  Reporting never blocks a caller, never delays an
error and never raises; what cannot be sent is dropped.

One thread, ``tinkex-telemetry``, from the first event to the end of the session.
"""

from __future__ import annotations

import collections
import datetime
import logging
import os
import queue
import threading
import time
import uuid
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Tuple

from tinkex._api._call import encode
from tinkex._api.telemetry import send_telemetry
from tinkex._runtime import lifecycle
from tinkex._runtime.clock import SYSTEM_CLOCK, Clock
from tinkex._sessions.telemetry_events import failed_request, is_user_error, unhandled, user_error
from tinkex._transport.server_state import state_of
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.errors import ClientClosedError, InvalidInputError, TinkexError
from tinkex.futures import APIFuture

logger = logging.getLogger(__name__)

ROUTE = "POST telemetry"

#: Events wait for others to go with for so long, in seconds.
FLUSH_S = 10.0
#: Most events in one request, and most that wait; what comes beyond is dropped.
BATCH = 100
MOST_WAITING = 10_000
#: The data of one event is not larger than this, in bytes.
_LARGEST = 65_536

_EVENT, _FLUSH, _STOP = "event", "flush", "stop"

# Guarded by lifecycle.module_lock(): the process, and how it is called in reports.
_process: Tuple[int, str] = (0, "")


def process_uuid() -> str:
    """The name of this process in reports; the child of a fork has its own."""
    global _process
    with lifecycle.module_lock():
        if _process[0] != os.getpid():
            _process = os.getpid(), str(uuid.uuid4())
        return _process[1]


def open_reporter(config: Config, session_id: str) -> Optional[Reporter]:
    """Return a reporter of the session; None if it is not wanted, or the server takes none."""
    if not config.telemetry or state_of(config).missing_status(ROUTE) is not None:
        return None
    return Reporter(config, session_id)


class Reporter:
    """Reports on one session.  Thread-safe; in the child of a fork it does nothing.

    Attributes:
        session_id: what it reports on.
    """

    def __init__(self, config: Config, session_id: str, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.session_id = session_id
        self._pid = os.getpid()
        self._clock = clock
        self._began = clock.monotonic()
        self._state = _State(config, session_id)

    @property
    def dropped(self) -> int:
        """How many events were not sent: too many at once, or the server did not take them."""
        return self._state.dropped

    def log(
        self,
        event_name: str,
        event_data: Optional[Mapping[str, Any]] = None,
        severity: str = "INFO",
    ) -> bool:
        """Report an event of the program's own; False if it is dropped.  Returns at once.

        *event_data* goes to the server as it is: values that JSON can express, 64 KiB at most.
        """
        data = dict(event_data or {})
        try:
            fits = len(encode(data)) <= _LARGEST
        except InvalidInputError as error:
            logger.debug("event %s is not reported: %s", event_name, error)
            fits = False
        return fits and self._generic(event_name, data, severity)

    def log_exception(self, error: BaseException, severity: str = "ERROR") -> bool:
        """Report an error that left an operation; False if it is dropped.  Returns at once."""
        if is_user_error(error):
            return self._generic("user_error", user_error(error), "WARNING")
        return self._add("UNHANDLED_EXCEPTION", severity, unhandled(error))

    def trigger_flush(self) -> None:
        """Have what waits sent now.  Returns at once."""
        if self._pid == os.getpid():
            self._state.wake.put(_FLUSH)

    def session_started(self) -> None:
        """Report that the session lives."""
        self._add("SESSION_START", "INFO", {})

    def operation_failed(self, future: APIFuture[Any], error: BaseException) -> None:
        """Report that *future* failed with *error*.  Never raises."""
        if isinstance(error, ClientClosedError):
            return
        if getattr(error, "request_id", None) not in (None, future.request_id):
            return  # that of a part, which was reported for the part
        try:
            if future.request_id is not None:
                found = failed_request(
                    error,
                    request_id=future.request_id,
                    request_type=future.kind,
                    iteration=future.attempts,
                    elapsed_s=getattr(error, "elapsed_s", None) or future.status().since_s,
                )
                if found is not None:
                    name, data = found
                    self._generic(name, data, "WARNING" if is_user_error(error) else "ERROR")
            self.log_exception(error)
        except Exception:  # a bug here must not become one of the operation
            logger.exception("the failure of %s is not reported", future.kind)

    def close(self, timeout_s: float, *, ended: bool = True) -> None:
        """Report the session's end, send what waits, and stop; at most about *timeout_s*.

        *ended* is False if the session goes on without us.
        """
        if self._pid != os.getpid():
            return
        if ended:
            lasted = datetime.timedelta(seconds=self._clock.monotonic() - self._began)
            self._add("SESSION_END", "INFO", {"duration": str(lasted)})
        self._state.stop(timeout_s)

    @property
    def finalizer_hook(self) -> Callable[[], None]:
        """A function that stops the thread from a finalizer; what waits is still sent."""
        wake = self._state.wake
        return lambda: wake.put(_STOP)

    def _generic(self, name: str, data: Mapping[str, Any], severity: str) -> bool:
        return self._add("GENERIC_EVENT", severity, {"event_name": name, "event_data": data})

    def _add(self, kind: str, severity: str, fields: Mapping[str, Any]) -> bool:
        if self._pid != os.getpid():  # its lock may be dead here
            return False
        at = datetime.datetime.fromtimestamp(self._clock.wall(), datetime.timezone.utc)
        event = {
            "event": kind,
            "event_id": str(uuid.uuid4()),
            "severity": severity,
            "timestamp": at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            **fields,
        }
        return self._state.add(event)


class _State:
    """What a reporter shares with its thread, which must not keep the reporter's owner alive."""

    def __init__(self, config: Config, session_id: str) -> None:
        # Of its own: the session's transport is closed before the last report is sent.
        self.transport = Transport(config, closing=threading.Event())
        self.session_id = session_id
        # A SimpleQueue, because finalizers post to it (bpo-32576).
        self.wake: queue.SimpleQueue[str] = queue.SimpleQueue()
        # Guards the rest.  Never held during I/O.
        self._lock = threading.Lock()
        self._waiting: Deque[Dict[str, Any]] = collections.deque()
        self._index = 0
        self._thread: Optional[threading.Thread] = None
        self.over = False  # nothing more is sent
        self.dropped = 0

    def add(self, event: Dict[str, Any]) -> bool:
        """Queue *event* and see that there is a thread; False if it is dropped."""
        with self._lock:
            event["event_session_index"] = self._index
            self._index += 1
            if self.over or len(self._waiting) >= MOST_WAITING or not self._has_thread_locked():
                self.dropped += 1
                return False
            self._waiting.append(event)
            count = len(self._waiting)
        if count == 1:
            self.wake.put(_EVENT)
        elif count == BATCH:
            self.wake.put(_FLUSH)
        return True

    def _has_thread_locked(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(
                target=_report, args=(self,), name="tinkex-telemetry", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # interpreter shutdown, or no more threads to be had
                logger.debug("no telemetry: cannot start its thread: %s", error)
                return False
            self._thread = thread
        return True

    def stop(self, timeout_s: float) -> None:
        """Let the thread send what waits and end; break it off after *timeout_s*."""
        with self._lock:
            self.over = True
            thread = self._thread
        self.wake.put(_STOP)
        if thread is None or thread is threading.current_thread():
            return
        deadline = time.monotonic() + timeout_s
        thread.join(timeout_s)
        if thread.is_alive():
            self.transport.closing.set()
            self.transport.abort()
            thread.join(max(0.1, deadline - time.monotonic()))

    def take(self) -> List[Dict[str, Any]]:
        """The events of the next request; empty if none wait."""
        with self._lock:
            count = min(BATCH, len(self._waiting))
            return [self._waiting.popleft() for _ in range(count)]

    def drop(self, events: int, *, over: bool) -> None:
        """Count *events* as lost; with *over* nothing more is to be sent."""
        with self._lock:
            self.dropped += events
            if over:
                self.over = True
                self.dropped += len(self._waiting)
                self._waiting.clear()


def _report(state: _State) -> None:
    channel = state.transport.open_channel()
    try:
        while True:
            word = state.wake.get()
            if word == _EVENT:
                word = _wait_for_more(state)
            events = state.take()
            while events:
                _send(state, events, channel)
                events = state.take()
            if word == _STOP or state.over:
                return
    finally:
        state.drop(0, over=True)
        state.transport.closing.set()
        state.transport.abort()


def _wait_for_more(state: _State) -> str:
    """Give further events the time to come; return the word that cut it short, if one did."""
    deadline = time.monotonic() + FLUSH_S
    word = _EVENT
    while word == _EVENT:
        try:
            word = state.wake.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return _FLUSH
    return word


def _send(state: _State, events: List[Dict[str, Any]], channel: Any) -> None:
    transport = state.transport
    try:
        reply = send_telemetry(
            transport,
            events,
            session_id=state.session_id,
            process_uuid=process_uuid(),
            channel=channel,
        )
    except ClientClosedError:
        state.drop(len(events), over=True)
    except TinkexError as error:
        logger.debug("%d events were not reported: %s", len(events), error)
        state.drop(len(events), over=False)
    except Exception:
        logger.exception("%d events were not reported", len(events))
        state.drop(len(events), over=False)
    else:
        if 200 <= reply.status < 300:
            transport.server.note_present(ROUTE)
            return
        missing = reply.status in (404, 405, 501)
        if missing:
            transport.server.note_missing(ROUTE, reply.status)
        logger.debug("%d events were not reported: status %d", len(events), reply.status)
        state.drop(len(events), over=missing)
