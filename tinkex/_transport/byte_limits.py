"""Pressure: what one client may have under way at once, in bytes.

The sizes are those of the server's flags, or the caller's own where those are smaller:
docs/protocol.md, "Back-pressure".
"""

from __future__ import annotations

import threading
from typing import Optional

from tinkex._transport.backpressure import Quota, Unread, megabytes
from tinkex._transport.server_flags import ServerFlags
from tinkex._transport.server_state import ServerState
from tinkex.config import Config

#: What a token of a prompt counts, in bytes.
TOKEN_BYTES = 10

#: Shortly after a 429 a sample counts so many times.
_THROTTLED = 20


class Pressure:
    """The quotas of one client.  Thread-safe; no threads of its own.

    Attributes:
        samples: sampling requests being submitted, in bytes.
        batches: training batches being submitted, in bytes.
        results: large results being fetched, in bytes.
        unread: futures given out and not read.
    """

    def __init__(self, config: Config, server: ServerState, closing: threading.Event) -> None:
        self._config = config
        self._server = server
        self._sized = False  # by the server's own flags
        self.samples = Quota("sample requests", 0, megabytes)
        self.batches = Quota("training batches", 0, megabytes)
        self.results = Quota("large results", 0, megabytes)
        self._size(ServerFlags())
        self.unread = Unread(
            config.max_unread,
            raises=config.on_backpressure == "raise",
            closing=closing,
            notice_after_s=config.notice_after_s,
        )

    def sample_bytes(self, tokens: int) -> int:
        """What a sampling request with so many prompt tokens takes of ``samples`` now."""
        if not self._sized:
            self.adjust()
        return tokens * TOKEN_BYTES * (_THROTTLED if self._server.limiter.throttled else 1)

    def adjust(self) -> None:
        """Take the server's flags into account, once somebody has asked for them."""
        flags = self._server.flags.static
        if flags is not None:
            self._sized = True
            self._size(flags)

    def why(self) -> Optional[str]:
        """In words, how the server holds submissions back; None if it does not."""
        return self._server.limiter.describe()

    def wake(self) -> None:
        """Have everybody who waits notice that the client was closed."""
        for quota in (self.samples, self.batches, self.results):
            quota.wake()
        self._server.limiter.wake()
        self.unread.wake()

    def _size(self, flags: ServerFlags) -> None:
        config = self._config
        self.samples.size = _smaller(
            config.max_sample_bytes, flags.sample_dispatch_bytes_semaphore_size
        )
        self.batches.size = _smaller(
            config.max_batch_bytes, flags.fwdbwd_dispatch_bytes_semaphore_size
        )
        self.results.size = _smaller(
            config.max_result_bytes, flags.inflight_response_bytes_semaphore_size
        )


def _smaller(ours: Optional[int], theirs: int) -> int:
    return theirs if ours is None else min(ours, theirs)
