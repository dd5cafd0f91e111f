"""Connections: the open connections of one transport, shared and private.

A busy thread may have a connection of its own: with hundreds of threads, the lock of a shared pool
costs more than the requests themselves.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from typing import TYPE_CHECKING, Mapping

from tinkex._runtime.clock import Clock
from tinkex._runtime.descriptors import advice
from tinkex._transport.channel import Channel
from tinkex._transport.fast_connection import PrivateChannel
from tinkex.config import Config

if TYPE_CHECKING:
    from tinkex._transport.fast_connection import AnyChannel

logger = logging.getLogger(__name__)

#: Connections kept per traffic class.
POOL_SIZES: Mapping[str, int] = {"control": 4, "work": 16, "poll": 64}

#: Shortest time between two log lines about a lack of file descriptors, in seconds.
_SHORTAGE_INTERVAL_S = 60.0


class Connections:
    """The connections of one transport.  Thread-safe."""

    def __init__(self, config: Config, closing: threading.Event, clock: Clock) -> None:
        self._config = config
        self._closing = closing
        self._clock = clock
        # One pool per traffic class: neither long polls nor bulk data may delay a submission.
        self._shared = {name: Channel(config, size) for name, size in POOL_SIZES.items()}
        # Guards what follows.  Never held while closing a channel, which takes the channel's lock
        # and may block in TLS.
        self._lock = threading.Lock()
        # Weak: once its thread has ended and released it, a private channel closes its socket.
        self._private: weakref.WeakSet[AnyChannel] = weakref.WeakSet()
        self._next_shortage_log = -math.inf

    def shared(self, traffic: str) -> Channel:
        """Return the pool of a traffic class."""
        return self._shared[traffic]

    def open_channel(self) -> Channel:
        """Open a private channel for one busy thread; closed with the transport at the latest."""
        channel = Channel(self._config, pool_size=1)
        self._add(channel)
        return channel

    def open_connection(self) -> AnyChannel:
        """Like `open_channel`, for a thread that sends many short requests and nothing else."""
        if self._config.proxy:  # which PrivateChannel does not support
            return self.open_channel()
        connection = PrivateChannel(self._config)
        self._add(connection)
        return connection

    def _add(self, channel: AnyChannel) -> None:
        with self._lock:
            self._private.add(channel)
        # The owner sets `closing` before it calls `abort`: if `abort` has missed this channel, the
        # event is already set.
        if self._closing.is_set():
            channel.abort()

    def drop_idle(self) -> None:
        """Close the idle connections of the shared channels; those in use are kept."""
        for channel in self._shared.values():
            channel.close()

    def free_descriptors(self) -> None:
        """Close every idle connection, and log the shortage of file descriptors once a minute."""
        self.drop_idle()
        now = self._clock.monotonic()
        with self._lock:
            private = list(self._private)
            is_due = now >= self._next_shortage_log
            if is_due:
                self._next_shortage_log = now + _SHORTAGE_INTERVAL_S
        for channel in private:
            channel.close_if_idle()
        if is_due:
            logger.warning(
                "no file descriptor is free for a connection to %s; waiting for one. %s",
                self._config.host_and_port,
                advice(),
            )

    def abort(self) -> None:
        """Abort every request in flight."""
        with self._lock:
            channels = [*self._shared.values(), *self._private]
        for channel in channels:
            channel.abort()
