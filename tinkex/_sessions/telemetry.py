"""Reporter: reports the start, failures and end of a session to the server.

Off unless ``TINKER_TELEMETRY=1`` or ``ServiceClient(telemetry=True)``.  The events, which
`telemetry_events` makes, hold no keys, prompts or anything else that the user gave us.  Reporting
never blocks a caller, never delays an error and never raises; what cannot be sent is dropped.

One thread, ``tinkex-telemetry``, from the first event to the end of the session.
"""

from __future__ import annotations

import datetime
import logging
import os
import queue
import threading
import time
import uuid
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

from tinkex._api._call import encode
from tinkex._api.sessions import send_telemetry
from tinkex._runtime import lifecycle
from tinkex._runtime.clock import SYSTEM_CLOCK, Clock
from tinkex._runtime.inbox import Inbox
from tinkex._sessions.telemetry_events import failed_request, is_user_error, unhandled, user_error
from tinkex._transport.channel import Channel
from tinkex._transport.server_flags import ABSENT
from tinkex._transport.server_state import state_of
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.errors import ClientClosedError, InvalidInputError, TinkexError
from tinkex.futures import APIFuture

logger = logging.getLogger(__name__)

ROUTE = "POST telemetry"

#: An event waits at most this long, in seconds, for others to be sent with.
FLUSH_S = 10.0
#: Most events in one request, and most that wait; further ones are dropped.
BATCH = 100
MAX_WAITING = 10_000
#: The data of one event is not larger than this, in bytes.
_MAX_DATA_BYTES = 65_536

# Requests to the thread, in the queue of events: send what waits; send it and end.
_FLUSH, _STOP = "flush", "stop"

Event = Dict[str, Any]

# Guarded by lifecycle.module_lock(): the id of a process, and its name in reports.
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

    Its thread refers to it, so it must not refer to the client that owns it.

    Attributes:
        session_id: what it reports on.
        dropped: how many events were not sent: too many waited, or the server did not take them.
    """

    def __init__(self, config: Config, session_id: str, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.session_id = session_id
        self._pid = os.getpid()
        self._clock = clock
        self._began = clock.monotonic()
        # Of its own: the session's transport is closed before the last report is sent.
        self._transport = Transport(config, closing=threading.Event())
        self._queue: Inbox[Union[Event, str]] = Inbox()  # finalizers post to it
        # Guards what follows, and the order of events.  Never held during I/O.
        self._lock = threading.Lock()
        self._next_index = 0
        self._thread: Optional[threading.Thread] = None
        self._closed = False  # no further event is taken
        self.dropped = 0

    def log(
        self,
        event_name: str,
        event_data: Optional[Mapping[str, Any]] = None,
        severity: str = "INFO",
    ) -> bool:
        """Report an event of the program's own; False if it is dropped.  Does not block.

        *event_data* goes to the server as it is: values that JSON can express, 64 KiB at most.
        """
        data = dict(event_data or {})
        try:
            fits = len(encode(data)) <= _MAX_DATA_BYTES
        except InvalidInputError as error:
            logger.debug("event %s is not reported: %s", event_name, error)
            fits = False
        return fits and self._generic(event_name, data, severity)

    def log_exception(self, error: BaseException, severity: str = "ERROR") -> bool:
        """Report an error that left an operation; False if it is dropped.  Does not block."""
        if is_user_error(error):
            return self._generic("user_error", user_error(error), "WARNING")
        return self._add("UNHANDLED_EXCEPTION", severity, unhandled(error))

    def trigger_flush(self) -> None:
        """Have what waits sent now; does not block."""
        if self._pid == os.getpid():
            self._queue.put(_FLUSH)

    def session_started(self) -> None:
        """Report that the session lives."""
        self._add("SESSION_START", "INFO", {})

    def operation_failed(self, future: APIFuture[Any], error: BaseException) -> None:
        """Report that *future* failed with *error*.  Never raises."""
        if isinstance(error, ClientClosedError):
            return
        # The error of a part of the work was reported with that part's own future.
        if getattr(error, "request_id", None) not in (None, future.request_id):
            return
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
        with self._lock:
            self._closed = True
            thread = self._thread
        self._queue.put(_STOP)
        if thread is None or thread is threading.current_thread():
            return
        deadline = time.monotonic() + timeout_s
        thread.join(timeout_s)
        if thread.is_alive():  # in a request: aborting it ends the thread
            self._close_transport()
            thread.join(max(0.1, deadline - time.monotonic()))

    def finalizer_hook(self) -> None:
        """Stop the thread from a finalizer; what waits is still sent."""
        # Sets no flag under the lock, which the thread that runs the finalizer may hold.
        self._queue.put(_STOP)

    def _generic(self, name: str, data: Mapping[str, Any], severity: str) -> bool:
        return self._add("GENERIC_EVENT", severity, {"event_name": name, "event_data": data})

    def _add(self, kind: str, severity: str, fields: Mapping[str, Any]) -> bool:
        """Queue an event for the thread, which the first one starts; False if it is dropped."""
        if self._pid != os.getpid():  # after a fork, its lock may be held for ever
            return False
        at = datetime.datetime.fromtimestamp(self._clock.wall(), datetime.timezone.utc)
        event = {
            "event": kind,
            "event_id": str(uuid.uuid4()),
            "severity": severity,
            "timestamp": at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            **fields,
        }
        trouble: Optional[RuntimeError] = None
        # Index and place in the queue in one step, so that events are sent in order; a dropped one
        # leaves a gap that the server can see.
        with self._lock:
            event["event_session_index"] = self._next_index
            self._next_index += 1
            if self._thread is None and not self._closed:
                trouble = self._start_thread_locked()
            full = self._queue.qsize() >= MAX_WAITING
            taken = self._thread is not None and not self._closed and not full
            if taken:
                self._queue.put(event)
            else:
                self.dropped += 1
        if trouble is not None:
            logger.debug("no telemetry: cannot start its thread: %s", trouble)
        return taken

    def _start_thread_locked(self) -> Optional[RuntimeError]:
        """Start the thread; return why not: interpreter shutdown, or too many threads."""
        thread = threading.Thread(target=self._run, name="tinkex-telemetry", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            return error
        self._thread = thread
        return None

    def _run(self) -> None:
        """Send events in batches until _STOP, or until the server turns out not to take any."""
        channel = self._transport.open_channel()
        more_waiting = False
        try:
            while True:
                events, request = self._next_batch(more_waiting)
                if events and not self._send(events, channel):
                    return
                if request == _STOP:
                    return
                more_waiting = len(events) == BATCH
        finally:
            # The server takes no events, or the session is over: later ones are dropped at once.
            with self._lock:
                self._closed = True
                while not self._queue.empty():
                    self.dropped += isinstance(self._queue.get(), dict)
            self._close_transport()

    def _next_batch(self, more_waiting: bool) -> Tuple[List[Event], Optional[str]]:
        """Return the events of the next request, and what ended the wait for more: _FLUSH or _STOP.

        Waits for the first event, and then FLUSH_S for others.  If more are *more_waiting* since
        the last batch, it takes those without any delay.
        """
        events: List[Event] = []
        deadline = time.monotonic()
        while len(events) < BATCH:
            left_s = max(0.0, deadline - time.monotonic())
            try:
                item = self._queue.get(timeout=left_s if events or more_waiting else None)
            except queue.Empty:
                break
            if isinstance(item, str):
                return events, item
            if not events and not more_waiting:
                deadline = time.monotonic() + FLUSH_S
            events.append(item)
        return events, None

    def _send(self, events: List[Event], channel: Channel) -> bool:
        """Send *events*, or drop them; False if there is no point in sending more."""
        useful = True
        try:
            reply = send_telemetry(
                self._transport,
                events,
                session_id=self.session_id,
                process_uuid=process_uuid(),
                channel=channel,
            )
            if 200 <= reply.status < 300:
                self._transport.server.note_present(ROUTE)
                return True
            logger.debug("%d events were not reported: status %d", len(events), reply.status)
            if reply.status in ABSENT:
                self._transport.server.note_missing(ROUTE, reply.status)
                useful = False
        except ClientClosedError:
            useful = False
        except TinkexError as error:
            logger.debug("%d events were not reported: %s", len(events), error)
        except Exception:  # telemetry must never disturb the program
            logger.exception("%d events were not reported", len(events))
        with self._lock:
            self.dropped += len(events)
        return useful

    def _close_transport(self) -> None:
        self._transport.closing.set()
        self._transport.abort()
