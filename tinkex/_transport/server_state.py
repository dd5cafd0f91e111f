"""ServerState: all that this process knows of one server, as one credential sees it.

Nothing is requested here: code that finds out how a server differs notes it, for all later requests
of the process.  `state_of` is the one registry, kept for the life of the process.
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

# Deprecation notes remembered per server.  Notes beyond that are not logged: a server that makes
# up a new one for each response would fill the log.
_MAX_NOTES = 256


@dataclasses.dataclass(frozen=True)
class ServerDialect:
    """What is known of how a server speaks the protocol: a snapshot, which does not change.

    Attributes:
        encoding: of training batches: ``"protobuf"``, ``"json"``, or None while not known.
        compression: of their bodies: ``"zstd"``, or None.
        missing_routes: optional routes that it does not have, as far as they were tried.
        creates_runs_by_loading: True if one request makes a run from a checkpoint, False if the
            run must be made first, None while not known.
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
    """What is known of one server under one credential.  Thread-safe; get it from `state_of`.

    Attributes:
        flags: what the server reports about itself; see `flags_for`.
        limiter: holds submissions back after a 429.
        tokens: what requests are authenticated with.
        encoding_search: the search for the encoding of training batches, one at a time.
        codec: the encoding of training batches that has worked, if any has.
        compression: the one of training batches that has worked, if any has.
        refuses_compression: a compressed body was refused.
        creates_runs_by_loading: whether one request makes a run from a checkpoint; None while not
            known.
    """

    def __init__(self, config: Config, parent: Optional[ServerState] = None) -> None:
        self.flags = FlagCache()
        self.limiter = RateLimiter()
        self.tokens = TokenSource(config)
        self.encoding_search: SingleFlight[None] = SingleFlight()
        self.pid = os.getpid()
        # No lock: each is replaced in one step, and a reader that gets the old value only sends a
        # request as it would have a moment before.
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
        # Without its lock, which may have been held by a thread that does not exist here; for the
        # same reason nothing changes what is read.
        for name in ("codec", "compression", "refuses_compression", "creates_runs_by_loading"):
            setattr(self, name, getattr(parent, name))
        self._notes = set(parent._notes)
        self._missing = dict(parent._missing)
        self._present = set(parent._present)

    def missing_status(self, route: str) -> Optional[int]:
        """The status by which *route* turned out to be missing; None if it did not."""
        with self._lock:
            return self._missing.get(route)

    def note_missing(self, route: str, status: int) -> None:
        """Note that *status* means there is no *route*, unless the route has worked before."""
        with self._lock:
            # If it has worked, the status is about something that the request named.
            if route not in self._present:
                self._missing[route] = status

    def note_present(self, route: str) -> None:
        """Note that *route* has worked."""
        with self._lock:
            self._present.add(route)
            self._missing.pop(route, None)

    def dialect(self, forced: Optional[Codec] = None) -> ServerDialect:
        """What is known now; *forced* is an encoding that the settings prescribe."""
        # Without the lock: the child of a fork may print this, and a thread of the parent's may
        # have held it.
        codec = forced or self.codec
        return ServerDialect(
            encoding=None if codec is None else codec.name,
            compression=self.compression,
            missing_routes=tuple(sorted(self._missing.copy())),  # copying is atomic
            creates_runs_by_loading=self.creates_runs_by_loading,
        )

    def log_deprecation(self, name: str, headers: Mapping[str, str]) -> None:
        """Log the ``x-deprecation-note`` of the response to request *name*, once each."""
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
    """Return what this process knows of the server of *config* under its credential.

    Always the same object, except that the child of a fork gets one of its own.
    """
    # The parent's locks may have been held, and its flights under way, when it was copied.
    key = config.base_url, config.key_digest
    with lifecycle.module_lock():
        state = _states.get(key)
        if state is None or state.pid != os.getpid():
            state = _states[key] = ServerState(config, parent=state)
        return state


def forget_servers() -> None:
    """Forget everything: for tests, whose servers come and go on the same ports."""
    with lifecycle.module_lock():
        _states.clear()
