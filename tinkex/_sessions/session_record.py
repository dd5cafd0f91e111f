"""SessionRecord: one live session: the connection that keeps it alive, its owners, and its end.

Every session has connections of its own for this, so that no training or sampling load can delay
a heartbeat.  No threads.
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

#: Beats, or ends of sessions, that may be under way at the same time.
MAX_WORKERS = 8

#: A server is given this long, in seconds, for the end of one session when many end together.
FINISH_S = 2.0

#: The same for the session of a dropped client, for which nothing waits before `close` does.
#: A server that misses the end keeps the session until it expires; a busy one may need more than
#: the two seconds.
UNHURRIED_FINISH_S = 15.0

#: As `ServerState` names it.
FINISH_ROUTE = "POST sessions/{id}/finish"


class Wake(NamedTuple):
    """To the heartbeat thread: look again at what is due."""


class OwnerCollected(NamedTuple):
    """To the heartbeat thread: an object that a session was kept alive for is gone."""

    session_id: str
    token: object


class ManagerDropped(NamedTuple):
    """To the heartbeat thread: the manager was collected without being closed."""


Message = Union[Wake, OwnerCollected, ManagerDropped]


class HTTPLink:
    """The connections that keep one session alive; tests put their own in its place.

    Each method blocks.  `abort` may be called by another thread and ends the others immediately.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        # Of its own: closed connections, limits or a load of requests of the clients must not delay
        # or end a heartbeat.
        self._transport = Transport(config, closing=threading.Event())
        # Shorter than the interval: the next beat is the retry.
        self._beat_timeout_s = min(HEARTBEAT_TIMEOUT_S, config.heartbeat_interval_s)

    def create(self) -> CreateSessionResponse:
        """Create a session; retried for ``startup_timeout_s``.  Raises TinkexError."""
        return create_session(self._transport, self._config)

    def give_up(self) -> None:
        """Let `create` begin no further attempt; the one in flight may still succeed."""
        self._transport.closing.set()

    def beat(self, session_id: str) -> int:
        """Send one heartbeat, once, and return the status.  Raises TinkexError."""
        return session_heartbeat(self._transport, session_id, timeout_s=self._beat_timeout_s).status

    def finish(self, session_id: str, status: str, detail: Optional[str], timeout_s: float) -> int:
        """Report the end of the session, once; return the status, 410 if it is unknown."""
        return finish_session(self._transport, session_id, status, detail, timeout_s)

    def drop_idle(self) -> None:
        """Close idle connections: after a long sleep they are dead."""
        self._transport.drop_idle()

    def abort(self) -> None:
        """Close, and interrupt every request in flight."""
        self._transport.closing.set()
        self._transport.abort()


LinkFactory = Callable[[Config], HTTPLink]


class SessionRecord:
    """A live session and the connection that keeps it alive.

    The registry's lock guards its owners; the rest does not change.

    Args:
        session_id: the server's id.
        link: its own connection.
        config: names the server.
        owned: ours to finish; False for a session that another process opened.
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
        # The finalizer of each object that the session is kept alive for, by a token for each.
        # Without any, the session lives until it is stopped.
        self._owners: Dict[object, weakref.finalize[Any, Any]] = {}

    def add_owner(self, owner: object, inbox: Inbox[Message]) -> None:
        """Have *inbox* get an OwnerCollected message when *owner* is collected."""
        token = object()
        # A finalizer may run in any thread, even inside a lock of ours: it only puts a message.
        finalizer = weakref.finalize(owner, inbox.put, OwnerCollected(self.session_id, token))
        finalizer.atexit = False  # the manager's close_at_exit ends the session
        self._owners[token] = finalizer

    def remove_owner(self, token: object) -> bool:
        """Forget the owner that *token* stands for; True if it was the last."""
        return self._owners.pop(token, None) is not None and not self._owners

    @property
    def has_owners(self) -> bool:
        """True if the session is kept alive for certain objects."""
        return bool(self._owners)

    def detach_owners(self) -> None:
        """Ignore the collection of the owners from now on: the session has ended."""
        for finalizer in self._owners.values():
            finalizer.detach()

    def finish(self, status: str, detail: Optional[str], timeout_s: float) -> bool:
        """Report the session's end to the server, once, and close the connection.

        Never raises an Exception.  False if the server did not respond.
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
            # Ignored if a session was finished before: then only this session is unknown.
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
        # Guards what follows; notified when a request has ended.
        self._changed = threading.Condition()
        self._queue = BeatQueue(MAX_WORKERS + 1)
        self._silent_hosts: Set[str] = set()
        self._under_way = 0
        for record in records:
            self._queue.put(record.host, record.session_id)

    def run(self) -> None:
        """Finish sessions until there is none left that this thread may finish."""
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
            # Half of what is left: one silent host must not use up the time of all.
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
        """Wait until no request is under way: a process that exits would cut it off."""
        with self._changed:
            left_s = max(0.0, self._deadline - self._clock.monotonic())
            self._changed.wait_for(lambda: not self._under_way, left_s)
