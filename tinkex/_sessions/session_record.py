"""SessionRecord: one live session: the connection that keeps it alive, its owners, and its end.

Every session has its own connections for heartbeats, so that no training or sampling load can delay
them.  No threads.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    List,
    NamedTuple,
    Optional,
    Set,
    Union,
)

from tinkex._api.sessions import (
    HEARTBEAT_TIMEOUT_S,
    create_session,
    finish_session,
    session_heartbeat,
)
from tinkex._runtime.clock import Clock
from tinkex._runtime.inbox import Inbox
from tinkex._sessions.beat_queue import BeatQueue
from tinkex._transport.server_flags import ABSENT
from tinkex._transport.server_state import state_of
from tinkex._transport.transport import Transport
from tinkex.config import Config

if TYPE_CHECKING:
    from tinkex.types import CreateSessionResponse

logger = logging.getLogger(__name__)

#: How many heartbeats, or requests to finish a session, may be in flight at the same time.
MAX_WORKERS = 8

#: The timeout for finishing one session when many end together, in seconds.
FINISH_S = 2.0

#: The timeout for finishing the session of a dropped client, which nothing waits for until `close`.
#: A server that misses the request keeps the session until it expires, and a busy server may need
#: more than FINISH_S.
UNHURRIED_FINISH_S = 15.0

#: The name of the route in `ServerState`.
FINISH_ROUTE = "POST sessions/{id}/finish"


class Wake(NamedTuple):
    """To the heartbeat thread: check again what is due."""


class OwnerCollected(NamedTuple):
    """To the heartbeat thread: an owner of a session was garbage-collected."""

    session_id: str
    token: object


class ManagerDropped(NamedTuple):
    """To the heartbeat thread: the manager was collected without being closed."""


Message = Union[Wake, OwnerCollected, ManagerDropped]


class HTTPLink:
    """The connections that keep one session alive; tests substitute their own.

    Methods that send a request block.  `abort` may be called by another thread and ends them
    immediately.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        # Not the clients' transport, whose limits, load or closed connections must not delay or end
        # a heartbeat.
        self._transport = Transport(config, closing=threading.Event())
        # Never longer than the interval: the next beat is the retry.
        self._beat_timeout_s = min(HEARTBEAT_TIMEOUT_S, config.heartbeat_interval_s)

    def create(self) -> CreateSessionResponse:
        """Create a session, with retries for ``startup_timeout_s``.  Raises TinkexError."""
        return create_session(self._transport, self._config)

    def give_up(self) -> None:
        """Stop `create` from starting another attempt; one in flight may still succeed."""
        self._transport.closing.set()

    def beat(self, session_id: str) -> int:
        """Send one heartbeat without retries; return the HTTP status.  Raises TinkexError."""
        return session_heartbeat(self._transport, session_id, timeout_s=self._beat_timeout_s).status

    def finish(self, session_id: str, status: str, detail: Optional[str], timeout_s: float) -> int:
        """Report the session's end, without retries; return the status, 410 if it is unknown."""
        return finish_session(self._transport, session_id, status, detail, timeout_s)

    def drop_idle(self) -> None:
        """Close idle connections, which are dead after a long sleep of the machine."""
        self._transport.drop_idle()

    def abort(self) -> None:
        """Close all connections, and interrupt every request in flight."""
        self._transport.closing.set()
        self._transport.abort()


LinkFactory = Callable[[Config], HTTPLink]


class SessionRecord:
    """A live session and the connection that keeps it alive.

    The registry's lock guards the owners; nothing else changes.

    Args:
        session_id: the server's id.
        link: the session's own connections.
        config: names the server.
        owned: whether we must finish it; False for a session that another process opened.
    """

    def __init__(
        self, session_id: str, link: HTTPLink, config: Config, *, owned: bool = True
    ) -> None:
        self.session_id = session_id
        self.link = link
        self.host = config.host_and_port
        self.quiet = config.quiet
        self.owned = owned
        self._server = state_of(config)
        # The finalizer of each owner, by a token.  The session lives until its last owner is
        # collected; one that never had an owner lives until it is stopped.
        self._owners: Dict[object, weakref.finalize[Any, Any]] = {}

    def add_owner(self, owner: object, inbox: Inbox[Message]) -> None:
        """Have an OwnerCollected message put into *inbox* when *owner* is garbage-collected."""
        token = object()
        # A finalizer may run in any thread, even one that holds our locks, so it only puts a
        # message.
        finalizer = weakref.finalize(owner, inbox.put, OwnerCollected(self.session_id, token))
        finalizer.atexit = False  # the manager's close_at_exit ends the session
        self._owners[token] = finalizer

    def remove_owner(self, token: object) -> bool:
        """Forget the owner with this *token*; return True if it was the last."""
        return self._owners.pop(token, None) is not None and not self._owners

    @property
    def has_owners(self) -> bool:
        """True if an owner keeps the session alive."""
        return bool(self._owners)

    def detach_owners(self) -> None:
        """Disable the owners' finalizers: the session has ended."""
        for finalizer in self._owners.values():
            finalizer.detach()

    def finish(self, status: str, detail: Optional[str], timeout_s: float) -> bool:
        """Report the session's end to the server, without retries, and close the connections.

        Never raises an Exception.  Returns False if the server did not respond.
        """
        try:
            if self.owned and timeout_s > 0 and self._server.missing_status(FINISH_ROUTE) is None:
                self._note_finish_status(
                    self.link.finish(self.session_id, status, detail, timeout_s)
                )
        except Exception as error:
            logger.debug("finishing session %s: %s", self.session_id, error)
            return False
        finally:
            self.link.abort()
        return True

    def _note_finish_status(self, status: int) -> None:
        if status < 300:
            self._server.note_present(FINISH_ROUTE)
        elif status in ABSENT:
            # Ignored if a session was finished before: then it is only this session that the server
            # does not know.
            self._server.note_missing(FINISH_ROUTE, status)
        else:
            logger.debug("finishing session %s: status %d", self.session_id, status)


class FinishRound:
    """Finishes many sessions from several threads, within a time limit.  Thread-safe.

    Every thread that helps calls `run`.  Once a host does not respond, its other sessions are left
    to expire, so a hung host costs one bounded wait.
    """

    def __init__(
        self,
        records: List[SessionRecord],
        status: str,
        detail: Optional[str],
        clock: Clock,
        timeout_s: float,
    ) -> None:
        self._records = {record.session_id: record for record in records}
        self._status = status
        self._detail = detail
        self._clock = clock
        self._deadline = clock.monotonic() + timeout_s
        # Guards the attributes below; notified when a request has ended.
        self._changed = threading.Condition()
        self._queue = BeatQueue(MAX_WORKERS + 1)
        self._silent_hosts: Set[str] = set()
        self._under_way = 0
        for record in records:
            self._queue.put(record.host, record.session_id)

    def run(self) -> None:
        """Finish sessions until none is left that this thread may finish."""
        while True:
            began = self._clock.monotonic()
            with self._changed:
                item = self._queue.take(began)
                if item is None:
                    return
                host, session_id = item
                self._under_way += 1
                # With no time left, `finish` sends nothing, and only closes the connection.
                left_s = 0.0 if host in self._silent_hosts else max(0.0, self._deadline - began)
            # Half of the time left: one silent host must not use up the time of the others.
            responded = self._records[session_id].finish(
                self._status, self._detail, min(FINISH_S, left_s / 2)
            )
            with self._changed:
                self._queue.done(host, began, self._clock.monotonic(), responded=responded)
                if not responded:
                    self._silent_hosts.add(host)
                self._under_way -= 1
                self._changed.notify_all()

    def wait_for_others(self) -> None:
        """Wait until no request is in flight: if the process exited, it would be cut off."""
        with self._changed:
            left_s = max(0.0, self._deadline - self._clock.monotonic())
            self._changed.wait_for(lambda: not self._under_way, left_s)
