"""SessionLink: the three things a session says to its server, over connections of its own.

No training or sampling load can delay a heartbeat, because nothing else uses them.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Callable, Optional, Protocol

from tinkex._api.sessions import (
    HEARTBEAT_TIMEOUT_S,
    create_session,
    finish_session,
    session_heartbeat,
)
from tinkex._transport.transport import Transport
from tinkex.config import Config

if TYPE_CHECKING:
    from tinkex.types import CreateSessionResponse


class SessionLink(Protocol):
    """What the session manager needs of a server; tests put their own in its place.

    Each method blocks.  `abort` may be called by another thread and ends the others at once.
    """

    def create(self) -> CreateSessionResponse:
        """Create a session; retried for ``startup_timeout_s``.  Raises TinkexError."""

    def give_up(self) -> None:
        """Have `create` begin no further attempt; the one in flight may still succeed."""

    def beat(self, session_id: str) -> int:
        """Send one heartbeat, once, and return the status.  Raises TinkexError."""

    def finish(self, session_id: str, status: str, detail: Optional[str], timeout_s: float) -> int:
        """Tell the server that the session is over, once; return the status."""

    def drop_idle(self) -> None:
        """Close idle connections: after a long sleep they are dead."""

    def abort(self) -> None:
        """Break off whatever is in flight and close."""


LinkFactory = Callable[[Config], SessionLink]


class HTTPLink:
    """The real SessionLink."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._transport = Transport(config, closing=threading.Event())
        # Shorter than the interval: the next beat is the retry.
        self._beat_timeout_s = min(HEARTBEAT_TIMEOUT_S, config.heartbeat_interval_s)

    def create(self) -> CreateSessionResponse:
        """See SessionLink."""
        return create_session(self._transport, self._config)

    def give_up(self) -> None:
        """See SessionLink."""
        self._transport.closing.set()

    def beat(self, session_id: str) -> int:
        """See SessionLink."""
        return session_heartbeat(self._transport, session_id, timeout_s=self._beat_timeout_s).status

    def finish(self, session_id: str, status: str, detail: Optional[str], timeout_s: float) -> int:
        """See SessionLink."""
        return finish_session(self._transport, session_id, status, detail, timeout_s).status

    def drop_idle(self) -> None:
        """See SessionLink."""
        self._transport.drop_idle()

    def abort(self) -> None:
        """See SessionLink."""
        self._transport.closing.set()
        self._transport.abort()
