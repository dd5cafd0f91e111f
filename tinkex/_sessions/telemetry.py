"""Reporter: reports the start, failures and end of a session to the server.

Off unless ``TINKER_TELEMETRY=1`` or ``ServiceClient(telemetry=True)`` is set.  The events, which
`telemetry_events` makes, contain no keys, no prompts and nothing else that the user gave us; the
program's own events (`Reporter.log`) contain what it passes.  Reporting never blocks a caller,
never delays an error and never raises; events that cannot be sent are dropped.

One thread, ``tinkex-telemetry``, runs from the first event to the end of the session.
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

#: An event waits at most this long, in seconds, for others to share its request.
FLUSH_S = 10.0
#: The most events in one request, and the most that may be queued; further events are dropped.
BATCH = 100
MAX_WAITING = 10_000
#: The largest size of one event's data, in bytes.
_MAX_DATA_BYTES = 65_536

# Commands to the thread, put among the events: send the queued events; send them and end.
_FLUSH, _STOP = "flush", "stop"

Event = Dict[str, Any]

# A process id, and the name of that process in reports.  Guarded by lifecycle.module_lock().
_process: Tuple[int, str] = (0, "")


def process_uuid() -> str:
    """Return the name of this process in reports; the child of a fork gets its own."""
    global _process
    with lifecycle.module_lock():
        if _process[0] != os.getpid():
            _process = os.getpid(), str(uuid.uuid4())
        return _process[1]


def open_reporter(config: Config, session_id: str) -> Optional[Reporter]:
    """Return a reporter for the session; None if telemetry is off or the server accepts none."""
    if not config.telemetry or state_of(config).missing_status(ROUTE) is not None:
        return None
    return Reporter(config, session_id)


class Reporter:
    """Reports on one session.  Thread-safe; in the child of a fork it does nothing.

    The thread refers to the reporter, so the reporter must not refer to the client that owns it.

    Attributes:
        session_id: the session it reports on.
        dropped: how many events were not sent, e.g. because too many were queued or the server did
            not accept them.
    """

    def __init__(self, config: Config, session_id: str, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.session_id = session_id
        self._pid = os.getpid()
        self._clock = clock
        self._began = clock.monotonic()
        # Not the session's transport, which is closed before the last report is sent.
        self._transport = Transport(config, closing=threading.Event())
        self._queue: Inbox[Union[Event, str]] = Inbox()  # finalizers post to it
        # Guards the attributes below, and the order of events.  Never held during I/O.
        self._lock = threading.Lock()
        self._next_index = 0
        self._thread: Optional[threading.Thread] = None
        self._closed = False  # if True, further events are dropped
        self.dropped = 0

    def log(
        self,
        event_name: str,
        event_data: Optional[Mapping[str, Any]] = None,
        severity: str = "INFO",
    ) -> bool:
        """Report an event of the user's program; False if it is dropped.  Does not block.

        *event_data* is sent to the server unchanged: JSON values, at most 64 KiB.
        """
        data = dict(event_data or {})
        try:
            fits = len(encode(data)) <= _MAX_DATA_BYTES
        except InvalidInputError as error:
            logger.debug("event %s is not reported: %s", event_name, error)
            fits = False
        return fits and self._generic(event_name, data, severity)

    def log_exception(self, error: BaseException, severity: str = "ERROR") -> bool:
        """Report an error that an operation raised; False if it is dropped.  Does not block."""
        if is_user_error(error):
            return self._generic("user_error", user_error(error), "WARNING")
        return self._add("UNHANDLED_EXCEPTION", severity, unhandled(error))

    def trigger_flush(self) -> None:
        """Have the queued events sent now.  Does not block."""
        if self._pid == os.getpid():
            self._queue.put(_FLUSH)

    def session_started(self) -> None:
        """Report the start of the session."""
        self._add("SESSION_START", "INFO", {})

    def operation_failed(self, future: APIFuture[Any], error: BaseException) -> None:
        """Report that *future* failed with *error*.  Never raises."""
        if isinstance(error, ClientClosedError):
            return
        # The error of one part of the work was already reported with that part's own future.
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
        except Exception:  # a bug here must not affect the operation
            logger.exception("the failure of %s is not reported", future.kind)

    def close(self, timeout_s: float, *, ended: bool = True) -> None:
        """Report the session's end, send the queued events, and stop, within about *timeout_s*.

        *ended* is False if the session goes on in another process.
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
        if thread.is_alive():  # it is in a request: aborting that ends the thread
            self._close_transport()
            thread.join(max(0.1, deadline - time.monotonic()))

    def finalizer_hook(self) -> None:
        """Stop the thread, from a finalizer; the queued events are still sent."""
        # Take no lock: the thread that runs the finalizer may hold it.
        self._queue.put(_STOP)

    def _generic(self, name: str, data: Mapping[str, Any], severity: str) -> bool:
        return self._add("GENERIC_EVENT", severity, {"event_name": name, "event_data": data})

    def _add(self, kind: str, severity: str, fields: Mapping[str, Any]) -> bool:
        """Queue an event, and start the thread if need be; return False if the event is dropped."""
        if self._pid != os.getpid():  # in the child of a fork, the lock may be held forever
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
        # Number and queue the event atomically, so that events are sent in order; a dropped event
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
        """Start the thread; return the error if that fails: interpreter shutdown, or too many
        threads.
        """
        thread = threading.Thread(target=self._run, name="tinkex-telemetry", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            return error
        self._thread = thread
        return None

    def _run(self) -> None:
        """Send events in batches until _STOP, or until the server turns out to accept none."""
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
            # The server accepts no events, or the session is over: drop all further events.
            with self._lock:
                self._closed = True
                while not self._queue.empty():
                    self.dropped += isinstance(self._queue.get(), dict)
            self._close_transport()

    def _next_batch(self, more_waiting: bool) -> Tuple[List[Event], Optional[str]]:
        """Return the events of the next request, and the command that ended the wait, if any.

        Waits for the first event, and then up to FLUSH_S for others.  With *more_waiting*, events
        may be left over from the last batch, and it takes what is queued without waiting.
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
        """Send *events*, or drop them; return False if there is no point in sending more."""
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
