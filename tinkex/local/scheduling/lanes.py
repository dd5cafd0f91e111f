"""Lane: puts the requests of one training run into the order of their seq_ids.

It follows the rules of docs/protocol.md, "Sequence numbers".  Pure: no thread, no engine, and no
lock of its own (the scheduler's lock guards it).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Callable, Deque, Dict, List, NamedTuple, Optional, Tuple

from tinkex.local.errors import HTTPError
from tinkex.local.state.deduplication import SeenIds

#: Engine work: called on the engine thread; what it returns is the result.
Work = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Job:
    """One unit of engine work under its request id.

    If a job that *creates* the model fails, every later job of the run fails, too.
    """

    request_id: str
    run: Work
    creates: bool = False


class Missing(NamedTuple):
    """A seq_id that has not arrived although later ones have; *since* is in clock seconds."""

    seq_id: int
    since: float


class Lane:
    """The queue of one training run: requests become ready strictly in seq_id order."""

    def __init__(self, model_id: str, session_id: str) -> None:
        self.model_id = model_id
        self.session_id = session_id
        self.next_seq = 1  # 0 is the request that creates the model
        self.ready: Deque[Job] = deque()
        self.closed: Optional[str] = None  # why the run accepts no more requests
        self.broken: Optional[str] = None  # why the model does not exist; engine thread only
        self.missing: Optional[Missing] = None
        self._early: Dict[int, Optional[Job]] = {}  # beyond a gap; None for a rejected request
        self._seen = SeenIds(model_id)

    def find(self, seq_id: int, digest: bytes) -> Optional[str]:
        """Return the request id of an earlier submission of the same body, or None.

        Raises:
            HTTPError: 409 if the seq_id was used for another body, or so long ago that the body
                is forgotten.
        """
        request_id = self._seen.find(seq_id, digest)
        # The seq_id was used, but its digest is forgotten.  A conflict either way: another body is
        # not allowed, and the same body must not be executed twice.
        if request_id is None and seq_id < self.next_seq and seq_id not in self._seen:
            raise HTTPError(
                409,
                f"seq_id {seq_id} of {self.model_id} was used long ago; the next new one is "
                f"{self.next_seq}",
            )
        return request_id

    def named(self, job: Job) -> Job:
        """Return *job* under its final request id.

        Unchanged here, where each seq_id is used once; tests that imitate other servers override
        it.
        """
        return job

    def add(self, seq_id: int, digest: bytes, job: Optional[Job]) -> None:
        """Add a new request, or None for a seq_id that a rejected request consumed."""
        # Rejected requests, too: only the same body may be tried again under their seq_id.
        self._seen.add(seq_id, digest, None if job is None else job.request_id)
        if seq_id < self.next_seq:
            # A rejected request is repeated, and valid now, e.g. because the checkpoint that it
            # loads has been saved.  Its place in the order has passed, so it runs after the others.
            if job is not None:
                self.ready.append(job)
            return
        self._early[seq_id] = job
        # One arrival may close the gap for many requests that arrived before it.  A rejected
        # request has consumed its seq_id, and leaves no gap (docs/protocol.md, "Sequence numbers").
        while self.next_seq in self._early:
            arrived = self._early.pop(self.next_seq)
            if arrived is not None:
                self.ready.append(arrived)
            self.next_seq += 1

    @property
    def has_work(self) -> bool:
        """True if something is ready for the engine: a request, or the end of the run."""
        # A closed run needs one more turn, in which the engine thread unloads the model.
        return bool(self.ready) or self.closed is not None

    @property
    def waiting(self) -> int:
        """Number of requests that have not begun."""
        return len(self.ready) + len(self._early)

    def waits_beyond_a_gap(self, seq_id: int) -> int:
        """If *seq_id* would wait for a missing seq_id, return how many requests do; else 0."""
        # The missing request itself is never turned away: nothing else can close the gap.
        return len(self._early) if seq_id > self.next_seq else 0

    def note_missing(self, now: float) -> None:
        """Note since when requests have waited for the next seq_id; call it after `add`."""
        # Later requests behind the same gap do not prolong the wait; another gap starts a new one.
        if not self._early:
            self.missing = None
        elif self.missing is None or self.missing.seq_id != self.next_seq:
            self.missing = Missing(self.next_seq, now)

    def remove_early(self) -> List[Tuple[int, Job]]:
        """Remove and return the jobs that wait for a missing seq_id; free their seq_ids."""
        early, self._early, self.missing = self._early, {}, None
        # The client may send other bodies under these seq_ids, since it fills the gap with the
        # first request that failed.
        for seq_id in early:
            self._seen.discard(seq_id)
        return [(seq_id, job) for seq_id, job in sorted(early.items()) if job is not None]

    def remove_all(self) -> List[Job]:
        """Remove and return all jobs that have not begun."""
        jobs = [*self.ready, *(job for _, job in sorted(self._early.items()) if job is not None)]
        self.ready.clear()
        self._early.clear()
        return jobs

    def why_waiting(self, seq_id: int) -> str:
        """Return, in words, why the request *seq_id* is not done yet."""
        if seq_id > self.next_seq and seq_id in self._early:
            return f"waits for seq_id {self.next_seq} of {self.model_id}, which has not arrived"
        # `ready` ends with next_seq - 1, so its last next_seq - seq_id requests are this one and
        # those behind it; the rest are ahead of it.
        ahead = max(0, len(self.ready) - (self.next_seq - seq_id))
        if ahead:
            return f"queued behind {ahead} earlier request(s) of {self.model_id}"
        return "running, or next in turn"
