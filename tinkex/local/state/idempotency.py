"""Requests without a sequence number, recognised by their idempotency key when repeated."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Callable, Optional

#: Most results that are remembered; a retry comes within minutes.
_MAX_REMEMBERED = 4096


class IdempotencyCache:
    """Results by idempotency key.  Thread-safe."""

    def __init__(self) -> None:
        # Guards _results.  Held while a result is made, for milliseconds, so that two requests
        # with one key at the same time are one.
        self._lock = threading.Lock()
        self._results: OrderedDict[str, str] = OrderedDict()

    def get(self, key: Optional[str], make: Callable[[], str]) -> str:
        """Return what *make* returned for *key* before, or returns now; without a key, now."""
        if not key:
            return make()
        with self._lock:
            if key not in self._results:
                self._results[key] = make()
                if len(self._results) > _MAX_REMEMBERED:
                    self._results.popitem(last=False)
            return self._results[key]
