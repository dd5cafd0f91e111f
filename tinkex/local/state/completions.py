"""The order in which requests were done, kept per group of requests, for whoever asks what is new.

A group is one sampling client: a sampler, and the number of the clone (docs/protocol.md,
"Clones").  Pure: no thread, no lock (the future table's lock guards it).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Dict, List, NamedTuple, Tuple

#: Sequence numbers of one sampling client; the next so many are the next clone's.
CLONE_BLOCK = 1_000_000_000


class Group(NamedTuple):
    """Who asks: a sampler, and which of its clients."""

    sampler_id: str
    clone: int

    @classmethod
    def of(cls, sampler_id: str, seq_id: int) -> Group:
        """The group of the request *seq_id* of a sampler."""
        return cls(sampler_id, seq_id // CLONE_BLOCK)


class Completions:
    """Finished requests by group, each with a number that only grows."""

    def __init__(self) -> None:
        self._last = 0
        self._groups: Dict[Group, OrderedDict[int, str]] = {}

    def add(self, group: Group, request_id: str) -> int:
        """Note that a request is done, and return its number."""
        self._last += 1
        self._groups.setdefault(group, OrderedDict())[self._last] = request_id
        return self._last

    def after(self, group: Group, cursor: int) -> Tuple[List[str], int]:
        """Return what was done after *cursor*, and the cursor to come back with.

        What stands at or before *cursor* is forgotten: the client has seen it.
        """
        done = self._groups.get(group)
        if done is None:
            return [], cursor
        while done and next(iter(done)) <= cursor:
            done.popitem(last=False)
        if not done:
            del self._groups[group]
            return [], cursor
        return list(done.values()), next(reversed(done))

    def discard(self, group: Group, number: int) -> None:
        """Forget a request whose result is gone."""
        done = self._groups.get(group)
        if done is not None and done.pop(number, None) is not None and not done:
            del self._groups[group]
