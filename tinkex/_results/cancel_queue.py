"""CancelQueue: asks the server, in the background, to cancel samples that are not wanted any more.

Servers that support this have a flag for it (docs/protocol.md, "Cancellation"); others get nothing.
Threads: up to eight ``tinkex-cancel-i``, while there is something to cancel.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING

from tinkex._api.futures import cancel_future
from tinkex._transport.server_flags import dynamic_flags_for
from tinkex.errors import ClientClosedError, TinkexError

if TYPE_CHECKING:
    from tinkex._transport.resources import ClientResources

logger = logging.getLogger(__name__)

ROUTE = "POST cancel_future"

_THREADS = 8
#: More than this many cancels are not queued: the server will drop the work in time.
_MAX_QUEUED = 10_000


class CancelQueue:
    """Sends cancels, a few at a time, each retried; failures are only logged.  Thread-safe."""

    def __init__(self, resources: ClientResources) -> None:
        self._transport = resources.transport
        self._pool = resources.pools.make("tinkex-cancel", _THREADS, idle_s=1.0)
        self._pool.resize(1)  # until it is known how many the server accepts

    def put(self, request_id: str) -> None:
        """Have the server cancel *request_id*.  Never blocks, never raises."""
        if self._pool.waiting < _MAX_QUEUED:
            with contextlib.suppress(ClientClosedError):  # the session ends, with all its work
                self._pool.submit(functools.partial(self._cancel, request_id))

    def _cancel(self, request_id: str) -> None:
        limit = self._limit()
        if limit == 0:
            return
        self._pool.resize(min(_THREADS, limit))
        try:
            cancel_future(self._transport, request_id)
        except TinkexError as error:
            logger.debug("cancelling request %s: %s", request_id, error)
            if error.status in (405, 501):  # 404 is about the request
                self._transport.server.note_missing(ROUTE, error.status)

    def _limit(self) -> int:
        """How many cancels the server accepts at a time; 0 if it supports none."""
        try:
            flags = dynamic_flags_for(self._transport)
        except TinkexError as error:
            logger.debug("could not find out whether samples can be cancelled: %s", error)
            return 0
        missing = self._transport.server.missing_status(ROUTE) is not None
        enabled = flags.sample_cancel_enabled and not missing
        return flags.sample_cancel_max_batch_size if enabled else 0
