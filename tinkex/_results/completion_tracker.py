"""CompletionTracker: which samples of one sampler are waited for, done, fetched and acknowledged.

Bookkeeping only: no I/O, no clock, no lock; its owner, a SamplerPolls, guards it.
See docs/protocol.md, "Batch polling".
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

from tinkex._results.pending import PendingRequest


class NextPoll(NamedTuple):
    """What to ask next: from where, what to report, and whether anything is waited for."""

    cursor: int
    retrieved: Tuple[str, ...]
    waiting: bool


class CompletionTracker:
    """The samples of one sampler, by request id.

    A sample can be done before the answer to its submission was read, so what is told of an
    unknown id is kept until every submission that was under way then is over.  After that nobody
    waits for it: it was cancelled, or has taken too long.
    """

    def __init__(self) -> None:
        self.waiting: Dict[
            str, PendingRequest[Any]
        ] = {}  # in the order in which they were accepted
        self._early: Dict[str, Tuple[int, int]] = {}  # size, and submissions begun by then
        self._fetching: Set[str] = set()
        self._unreported: Set[str] = set()
        self._cursor = 0
        self._reported_cursor = 0

    def expect(self, request_id: str, request: PendingRequest[Any]) -> Optional[int]:
        """Wait for *request*; if it is done already, return the size of its result instead."""
        early = self._early.pop(request_id, None)
        if early is None:
            self.waiting[request_id] = request
            return None
        self._fetching.add(request_id)
        return early[0]

    def withdraw(self, request_id: str) -> Optional[PendingRequest[Any]]:
        """Wait for it no more; None if it was not waited for."""
        return self.waiting.pop(request_id, None)

    def next_poll(self) -> NextPoll:
        """What to ask next."""
        return NextPoll(self._cursor, tuple(sorted(self._unreported)), bool(self.waiting))

    @property
    def at_rest(self) -> bool:
        """True if nothing is waited for, being fetched, or to be reported."""
        return not (self.waiting or self._fetching or self.unreported)

    @property
    def unreported(self) -> bool:
        """True if the server does not know of everything that was taken from it."""
        return bool(self._unreported) or self._cursor != self._reported_cursor

    def told(
        self, asked: NextPoll, sizes: Mapping[str, int], cursor: int, begun: int
    ) -> List[Tuple[PendingRequest[Any], int]]:
        """Take the answer to *asked*; return what is to be fetched, with the size of each.

        *begun* is the number of submissions so far.
        """
        self._unreported.difference_update(asked.retrieved)
        self._reported_cursor, self._cursor = asked.cursor, cursor
        ready: List[Tuple[PendingRequest[Any], int]] = []
        for request_id, size in sizes.items():
            request = self.waiting.pop(request_id, None)
            if request is not None:
                self._fetching.add(request_id)
                ready.append((request, size))
            elif request_id not in self._fetching and request_id not in self._unreported:
                self._early[request_id] = (size, begun)
        return ready

    def drop_unwanted(self, oldest: int) -> None:
        """Report the results that nobody waits for; *oldest* is the first submission under way."""
        unwanted = [name for name, (_, begun) in self._early.items() if begun < oldest]
        for name in unwanted:
            del self._early[name]
        self._unreported.update(unwanted)

    def fetched(self, request_id: str) -> None:
        """Its result was fetched, or is not wanted any more."""
        self._fetching.discard(request_id)
        self._unreported.add(request_id)

    def take_all(self) -> List[PendingRequest[Any]]:
        """Wait for nothing any more; return what was waited for."""
        left, self.waiting = self.waiting, {}
        return list(left.values())
