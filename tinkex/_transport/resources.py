"""ClientResources: the transport of one client, with the limits and counters of its work.

A client's Runtime owns them and passes them on.
"""

from __future__ import annotations

import dataclasses
import threading

from tinkex._runtime.clock import SYSTEM_CLOCK, Clock
from tinkex._runtime.worker_pool import WorkerPools
from tinkex._transport.billing import BillingPause
from tinkex._transport.limits import Quota, UnreadLimit, megabytes
from tinkex._transport.server_flags import ServerFlags
from tinkex._transport.server_state import ServerState
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.metrics import Recorder

# How many bytes a prompt token counts as, and how many times more shortly after a 429
# (docs/protocol.md, "Back-pressure").
_TOKEN_BYTES = 10
_THROTTLED_FACTOR = 20


class ByteLimits:
    """Limits on the bytes that one client has in flight.  Thread-safe; no threads of its own.

    Each size is the server's flag or the caller's own setting, whichever is smaller
    (docs/protocol.md, "Back-pressure").

    Attributes:
        samples: sampling requests being submitted.
        batches: training batches being submitted.
        results: large results being fetched.
    """

    def __init__(self, config: Config, server: ServerState) -> None:
        self._config = config
        self._server = server
        self._sized_by_server = False
        self.samples = Quota("sample requests", 0, megabytes)
        self.batches = Quota("training batches", 0, megabytes)
        self.results = Quota("large results", 0, megabytes)
        self._resize(ServerFlags())

    def sample_bytes(self, tokens: int) -> int:
        """Return how much of ``samples`` a request with this many prompt *tokens* takes now."""
        self.adjust()
        return tokens * _TOKEN_BYTES * (_THROTTLED_FACTOR if self._server.limiter.throttled else 1)

    def adjust(self) -> None:
        """Apply the server's flags, once they are known."""
        # Two threads may both do this, with the same outcome.
        flags = self._server.flags.static
        if flags is not None and not self._sized_by_server:
            self._sized_by_server = True
            self._resize(flags)

    def wake(self) -> None:
        """Wake every waiting thread, so that it notices that the client was closed."""
        for quota in (self.samples, self.batches, self.results):
            quota.wake()

    def _resize(self, flags: ServerFlags) -> None:
        config = self._config
        for quota, ours, theirs in (
            (self.samples, config.max_sample_bytes, flags.sample_dispatch_bytes_semaphore_size),
            (self.batches, config.max_batch_bytes, flags.fwdbwd_dispatch_bytes_semaphore_size),
            (self.results, config.max_result_bytes, flags.inflight_response_bytes_semaphore_size),
        ):
            quota.size = theirs if ours is None else min(ours, theirs)


@dataclasses.dataclass(frozen=True)
class ClientResources:
    """What the threads of one client share.  Thread-safe.

    Attributes:
        transport: sends the client's requests; its ``server`` holds what is known about the server.
        limits: how many bytes may be in flight.
        unread: how many futures may be unread.
        recorder: counts the client's work, for `ServiceClient.metrics`.
        billing: decides how long to wait while the account cannot pay.
        pools: the client's threads, except those for callbacks and telemetry.
    """

    transport: Transport
    limits: ByteLimits
    unread: UnreadLimit
    recorder: Recorder
    billing: BillingPause
    pools: WorkerPools

    @classmethod
    def open(
        cls, config: Config, closing: threading.Event, clock: Clock = SYSTEM_CLOCK
    ) -> ClientResources:
        """Make the resources of a new client; nothing is sent.

        The owner sets *closing* before it calls `abort`; the event ends every wait.
        """
        recorder = Recorder()
        billing = BillingPause(config.host_and_port, clock)
        transport = Transport(
            config, closing=closing, clock=clock, recorder=recorder, billing=billing
        )
        unread = UnreadLimit(
            config.max_unread,
            raises=config.on_backpressure == "raise",
            closing=closing,
            notice_after_s=config.notice_after_s,
        )
        limits = ByteLimits(config, transport.server)
        return cls(transport, limits, unread, recorder, billing, WorkerPools())

    def abort(self) -> None:
        """Abort every request in flight, and wake every waiting thread."""
        self.transport.abort()
        self.limits.wake()
        self.unread.wake()
