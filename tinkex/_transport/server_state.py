"""ServerState: everything that this process knows about one server under one credential.

Nothing is requested here: code that finds out how a server differs records it here, for all later
requests of the process.  `state_of` is the only registry, and lives as long as the process.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from typing import Dict, Mapping, Optional, Set, Tuple

from tinkex._runtime import lifecycle
from tinkex._runtime.single_flight import SingleFlight
from tinkex._transport.limits import RateLimiter
from tinkex._transport.server_flags import FlagCache
from tinkex._transport.tokens import TokenSource
from tinkex.config import Config
from tinkex.wire.codec import Codec

logger = logging.getLogger(__name__)

# How many deprecation notes are remembered per server.  Further notes are not logged: a server that
# makes up a new note for each response would fill the log.
_MAX_NOTES = 256


@dataclasses.dataclass(frozen=True)
class ServerDialect:
    """What is known about how a server speaks the protocol: an immutable snapshot.

    Attributes:
        encoding: the encoding of training batches: ``"protobuf"``, ``"json"``, or None while
            unknown.
        compression: the compression of training batches: ``"zstd"``, or None.
        missing_routes: optional routes that were tried and that the server does not have.
        creates_runs_by_loading: True if one request creates a run from a checkpoint, False if the
            run must be created first, None while unknown.
    """

    encoding: Optional[str] = None
    compression: Optional[str] = None
    missing_routes: Tuple[str, ...] = ()
    creates_runs_by_loading: Optional[bool] = None

    def __str__(self) -> str:
        batches = f"batches as {self.encoding}" if self.encoding else "encoding not known yet"
        parts = [batches + (f" ({self.compression})" if self.compression else "")]
        if self.creates_runs_by_loading is False:
            parts.append("runs are created before a checkpoint is loaded")
        if self.missing_routes:
            parts.append(f"without {', '.join(self.missing_routes)}")
        return "; ".join(parts)


class ServerState:
    """What is known about one server under one credential.  Thread-safe; get it from `state_of`.

    Attributes:
        flags: what the server reports about itself; see `flags_for`.
        limiter: holds submissions back after a 429.
        tokens: the credentials of requests.
        encoding_search: lets one thread at a time search for the encoding of training batches.
        codec: the encoding of training batches that has worked; None before any has.
        compression: the compression of training batches that has worked; None before any has.
        refuses_compression: True once the server has refused a compressed body.
        creates_runs_by_loading: whether one request creates a run from a checkpoint; None while
            unknown.
    """

    def __init__(self, config: Config, parent: Optional[ServerState] = None) -> None:
        self.flags = FlagCache()
        self.limiter = RateLimiter()
        self.tokens = TokenSource(config)
        self.encoding_search: SingleFlight[None] = SingleFlight()
        self.pid = os.getpid()
        # No lock: each is replaced atomically, and a reader that gets the old value just sends a
        # request as it would have a moment earlier.
        self.codec: Optional[Codec] = None
        self.compression: Optional[str] = None
        self.refuses_compression = False
        self.creates_runs_by_loading: Optional[bool] = None
        # Guards what follows.  Never held during I/O or logging.
        self._lock = threading.Lock()
        self._notes: Set[str] = set()
        self._missing: Dict[str, int] = {}
        self._present: Set[str] = set()
        if parent is not None:
            self._inherit(parent)

    def _inherit(self, parent: ServerState) -> None:
        """Copy what the *parent* process knew before a fork."""
        # Without the parent's lock, which may have been held by a thread that does not exist in
        # this process; for the same reason, nothing changes the state while it is read.
        for name in ("codec", "compression", "refuses_compression", "creates_runs_by_loading"):
            setattr(self, name, getattr(parent, name))
        self._notes = set(parent._notes)
        self._missing = dict(parent._missing)
        self._present = set(parent._present)

    def missing_status(self, route: str) -> Optional[int]:
        """Return the status that showed that *route* is missing; None if none did."""
        with self._lock:
            return self._missing.get(route)

    def note_missing(self, route: str, status: int) -> None:
        """Note that *route* is missing, as *status* shows, unless the route has worked before."""
        with self._lock:
            # If the route has worked, the status is about something that the request named.
            if route not in self._present:
                self._missing[route] = status

    def note_present(self, route: str) -> None:
        """Note that *route* has worked."""
        with self._lock:
            self._present.add(route)
            self._missing.pop(route, None)

    def dialect(self, forced: Optional[Codec] = None) -> ServerDialect:
        """Return what is known now; *forced* is an encoding that the settings prescribe."""
        # Without the lock: a forked child may print this, and a thread of the parent may have held
        # the lock.
        codec = forced or self.codec
        return ServerDialect(
            encoding=None if codec is None else codec.name,
            compression=self.compression,
            missing_routes=tuple(sorted(self._missing.copy())),  # copying is atomic
            creates_runs_by_loading=self.creates_runs_by_loading,
        )

    def log_deprecation(self, name: str, headers: Mapping[str, str]) -> None:
        """Log the ``x-deprecation-note`` in the response to request *name*, each note once."""
        note = headers.get("x-deprecation-note", "")[:500]
        if not note:
            return
        with self._lock:
            is_new = note not in self._notes and len(self._notes) < _MAX_NOTES
            if is_new:
                self._notes.add(note)
        if is_new:
            is_error = headers.get("x-deprecation-level", "").lower() == "error"
            logger.log(logging.ERROR if is_error else logging.WARNING, "%s: %s", name, note)


# By base URL and key.  Guarded by lifecycle.module_lock().
_states: Dict[Tuple[str, str], ServerState] = {}


def state_of(config: Config) -> ServerState:
    """Return what this process knows about the server of *config* under its credential.

    Always the same object, except that a forked child gets one of its own.
    """
    # At the fork, the parent's locks may have been held, and flights of the parent under way.
    key = config.base_url, config.key_digest
    with lifecycle.module_lock():
        state = _states.get(key)
        if state is None or state.pid != os.getpid():
            state = _states[key] = ServerState(config, parent=state)
        return state


def forget_servers() -> None:
    """Forget all servers: for tests, whose servers come and go on the same ports."""
    with lifecycle.module_lock():
        _states.clear()
