"""Requests without a number of their own, recognised by their idempotency key when they come again.

No thread of its own; thread-safe.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Callable, Optional

#: So many answers are remembered; a retry comes within minutes.
_REMEMBERED = 4096


class Once:
    """Answers by idempotency key."""

    def __init__(self) -> None:
        # Guards _answers, and is held while an answer is made (for milliseconds), so that two
        # requests with one key at once are one.
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, str] = OrderedDict()

    def get(self, key: Optional[str], make: Callable[[], str]) -> str:
        """Return what *make* returned for *key* before, or returns now; None is never known."""
        if not key:
            return make()
        with self._lock:
            if key not in self._answers:
                self._answers[key] = make()
                if len(self._answers) > _REMEMBERED:
                    self._answers.popitem(last=False)
            return self._answers[key]
