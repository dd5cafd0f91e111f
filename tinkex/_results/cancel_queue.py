"""CancelQueue: asks the server, in the background, to cancel samples that are not wanted any more.

Servers that support this have a flag for it (docs/protocol.md, "Cancellation"); others get nothing.
Threads: up to eight ``tinkex-cancel-i``, while there is something to cancel.
"""

from __future__ import annotations

import collections
import logging
import threading
from typing import Callable, Deque, List

from tinkex._api.futures import cancel_future
from tinkex._runtime.worker_pool import WorkerPool
from tinkex._transport.server_flags import dynamic_flags_for
from tinkex._transport.transport import Transport
from tinkex.errors import ClientClosedError, TinkexError

logger = logging.getLogger(__name__)

ROUTE = "POST cancel_future"

_THREADS = 8
#: More than this many cancels are not queued: the server will drop the work in time.
_MAX_QUEUED = 10_000


class CancelQueue:
    """Sends cancels, a few at a time, each retried; failures are only logged.  Thread-safe."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._pool = WorkerPool("tinkex-cancel", _THREADS, idle_s=1.0)
        # Guards _waiting and _busy.  Never held during I/O.
        self._lock = threading.Lock()
        self._waiting: Deque[str] = collections.deque()
        self._busy = 0  # tasks of the pool that take from the queue
        self._server = transport.server

    def put(self, request_id: str) -> None:
        """Have the server cancel *request_id*.  Never blocks, never raises."""
        with self._lock:
            if len(self._waiting) >= _MAX_QUEUED:
                return
            self._waiting.append(request_id)
            if self._busy >= _THREADS:
                return
            self._busy += 1
        try:
            self._pool.submit(self._drain)
        except ClientClosedError:  # the session ends, and all its work with it
            with self._lock:
                self._busy -= 1
                self._waiting.clear()

    def close(self) -> None:
        """Drop what was not sent and let the threads end.  Returns immediately."""
        with self._lock:
            self._waiting.clear()
        self._pool.close()

    def join(self, deadline: float) -> List[str]:
        """Wait until *deadline* (monotonic) for the threads; return the names of those left."""
        return self._pool.join(deadline)

    @property
    def finalizer_hook(self) -> Callable[[], None]:
        """A function that stops the threads from a finalizer."""
        return self._pool.finalizer_hook

    def _drain(self) -> None:
        while True:
            limit = self._limit()
            with self._lock:
                if limit == 0:
                    self._waiting.clear()
                if not self._waiting or self._busy > limit:
                    self._busy -= 1
                    return
                request_id = self._waiting.popleft()
            self._send(request_id)

    def _limit(self) -> int:
        """How many cancels the server accepts at a time; 0 if it supports none."""
        try:
            flags = dynamic_flags_for(self._transport)
        except TinkexError as error:
            logger.debug("could not find out whether samples can be cancelled: %s", error)
            return 0
        enabled = flags.sample_cancel_enabled and self._server.missing_status(ROUTE) is None
        return flags.sample_cancel_max_batch_size if enabled else 0

    def _send(self, request_id: str) -> None:
        try:
            cancel_future(self._transport, request_id)
        except TinkexError as error:
            logger.debug("cancelling request %s: %s", request_id, error)
            if error.status in (405, 501):  # 404 is about the request
                self._server.note_missing(ROUTE, error.status)
        except Exception:
            logger.exception("cancelling request %s failed", request_id)
