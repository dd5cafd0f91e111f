"""ServerMemory: how each server speaks, as far as this process has found out, by base URL.

Nothing is asked here: whoever meets a difference between servers notes it, and nobody meets it
again.  It is kept for the life of the process, and the child of a fork knows what its parent knew.
No threads.
"""

from __future__ import annotations

import dataclasses
from typing import Dict, Optional, Set, Tuple

from tinkex._runtime import lifecycle
from tinkex.wire.codec import Codec


@dataclasses.dataclass(frozen=True)
class ServerDialect:
    """How a server speaks, as far as it is known: a snapshot, which does not change.

    Attributes:
        encoding: of training batches: ``"protobuf"``, ``"json"``, or None while not known.
        compression: of their bodies: ``"zstd"``, or None.
        missing_routes: optional routes that it turned out not to have.
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


class ServerMemory:
    """What is known of one server.  Thread-safe; get it from `memory_of`."""

    def __init__(self) -> None:
        # All guarded by lifecycle.module_lock(), which a fork replaces.
        self._codec: Optional[Codec] = None
        self._compression: Optional[str] = None
        self._refuses_compression = False
        self._missing: Dict[str, int] = {}
        self._seen: Set[str] = set()
        self._creates_by_loading: Optional[bool] = None

    @property
    def codec(self) -> Optional[Codec]:
        """The encoding of training batches that has worked, if any has."""
        with lifecycle.module_lock():
            return self._codec

    def note_codec(self, codec: Codec) -> None:
        """Note that *codec* is the encoding to use."""
        with lifecycle.module_lock():
            self._codec = codec

    @property
    def refuses_compression(self) -> bool:
        """True if a compressed body was refused."""
        with lifecycle.module_lock():
            return self._refuses_compression

    def note_compression(self, name: Optional[str]) -> None:
        """Note the compression that has worked; None means that the server refuses it."""
        with lifecycle.module_lock():
            self._compression = name
            self._refuses_compression = name is None

    def lacks(self, route: str) -> bool:
        """True if the server turned out not to have *route*."""
        with lifecycle.module_lock():
            return route in self._missing

    def missing_status(self, route: str) -> Optional[int]:
        """The status by which *route* turned out to be missing; None if it did not."""
        with lifecycle.module_lock():
            return self._missing.get(route)

    def note_missing(self, route: str, status: int = 404) -> None:
        """Note that there is no *route*; one that has answered before is there, though."""
        with lifecycle.module_lock():
            if route not in self._seen:
                self._missing[route] = status

    def note_present(self, route: str) -> None:
        """Note that *route* has answered."""
        with lifecycle.module_lock():
            self._seen.add(route)
            self._missing.pop(route, None)

    @property
    def creates_runs_by_loading(self) -> Optional[bool]:
        """Whether one request makes a run from a checkpoint; None while not known."""
        with lifecycle.module_lock():
            return self._creates_by_loading

    def note_creates_runs_by_loading(self, can: bool) -> None:
        """Note whether the server makes a run from a checkpoint in one request."""
        with lifecycle.module_lock():
            self._creates_by_loading = can

    def snapshot(self, forced: Optional[Codec] = None) -> ServerDialect:
        """What is known now; *forced* is an encoding that the settings prescribe."""
        with lifecycle.module_lock():
            codec = forced or self._codec
            return ServerDialect(
                encoding=None if codec is None else codec.name,
                compression=self._compression,
                missing_routes=tuple(sorted(self._missing)),
                creates_runs_by_loading=self._creates_by_loading,
            )


# Guarded by lifecycle.module_lock().
_memories: Dict[str, ServerMemory] = {}


def memory_of(base_url: str) -> ServerMemory:
    """Return what is known of the server at *base_url*; always the same object."""
    with lifecycle.module_lock():
        return _memories.setdefault(base_url, ServerMemory())


def forget_servers() -> None:
    """Forget everything: for tests, whose servers come and go on the same ports."""
    with lifecycle.module_lock():
        _memories.clear()
