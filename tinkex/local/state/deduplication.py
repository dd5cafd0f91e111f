"""Recognizes requests that a client sends again because it got no response.

A repeated request gets the response of the first one, and nothing is done twice.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Callable, Dict, Optional, Tuple

from tinkex.local.errors import HTTPError

#: Most seq_ids that are remembered per run or sampler, some 300 bytes each; older ones cannot be
#: repeated.  More than the requests that may wait for a missing seq_id.
MAX_REMEMBERED = 2048

#: Most results that are kept by idempotency key; a retry comes within minutes.
_MAX_KEYS = 4096


class SeenIds:
    """The used seq_ids of a run or sampler, each with the digest of its body and its request id.

    Guarded by the scheduler's lock.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._seen: OrderedDict[int, Tuple[bytes, Optional[str]]] = OrderedDict()

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._seen

    def add(self, seq_id: int, digest: bytes, request_id: Optional[str]) -> None:
        """Remember *seq_id*; *request_id* is None if the request was rejected."""
        self._seen[seq_id] = (digest, request_id)
        if len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)

    def discard(self, seq_id: int) -> None:
        """Forget *seq_id*, so that it may be used for another body."""
        self._seen.pop(seq_id, None)

    def find(self, seq_id: int, digest: bytes) -> Optional[str]:
        """Return the request id of an earlier submission of the same body, or None.

        Raises:
            HTTPError: 409 if the seq_id was used for another body.
        """
        if seq_id not in self._seen:
            return None
        known_digest, request_id = self._seen[seq_id]
        if known_digest != digest:
            what = "a rejected request" if request_id is None else "another request"
            raise HTTPError(
                409,
                f"seq_id {seq_id} of {self._owner} was used for {what}; "
                "a repeated seq_id must repeat the same body",
            )
        return request_id


class CreatedIds:
    """The created runs and samplers, each with the digest of its body and the id in its response.

    Guarded by the backend's lock for creating them.
    """

    def __init__(self) -> None:
        self._created: Dict[str, Tuple[bytes, str]] = {}

    def add(self, made_id: str, digest: bytes, response_id: str) -> None:
        """Remember a new run or sampler."""
        self._created[made_id] = (digest, response_id)

    def find(self, made_id: str, digest: bytes) -> Optional[str]:
        """Return the id in the response of an earlier request with the same body, or None.

        Raises:
            HTTPError: 409 if it was created with another body.
        """
        # For an unknown id, the default has this digest, so that the check below passes.
        known_digest, response_id = self._created.get(made_id, (digest, None))
        if known_digest != digest:
            raise HTTPError(
                409, f"{made_id} was created with another body; use the next seq_id of the session"
            )
        return response_id

    def drop_session(self, session_id: str) -> None:
        """Forget the runs and samplers of a session that has ended."""
        prefix = f"{session_id}:"
        for made_id in [made_id for made_id in self._created if made_id.startswith(prefix)]:
            del self._created[made_id]


class IdempotencyCache:
    """Results of requests without a seq_id, by their idempotency key.  Thread-safe."""

    def __init__(self) -> None:
        # Guards _results.  Held while a result is made, for milliseconds, so that two simultaneous
        # requests with one key share one result.
        self._lock = threading.Lock()
        self._results: OrderedDict[str, str] = OrderedDict()

    def get(self, key: Optional[str], make: Callable[[], str]) -> str:
        """Return the result for *key*; *make* makes it the first time, or always without a key."""
        if not key:
            return make()
        with self._lock:
            if key not in self._results:
                # If this raises, nothing is kept, so that the client's retry tries again.
                self._results[key] = make()
                if len(self._results) > _MAX_KEYS:
                    self._results.popitem(last=False)
            return self._results[key]
