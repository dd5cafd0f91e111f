"""Queues of a training run that treat sequence numbers like other servers.

Pure like the queue they stand in for (`tinkex.local.scheduling.lanes.Lane`): the scheduler's lock
guards them.
"""

from __future__ import annotations

import dataclasses
from typing import Dict, Optional, Type

from servers.profiles.profile import Profile

from tinkex.local.errors import HTTPError
from tinkex.local.scheduling.lanes import Job, Lane


class ArrivalLane(Lane):
    """Requests run in order of arrival, without waiting for a missing number."""

    def find(self, seq_id: int, digest: bytes) -> Optional[str]:
        """Return the request id of an earlier submission; HTTPError 409 if its body differs."""
        return self._seen.find(seq_id, digest)

    def add(self, seq_id: int, digest: bytes, job: Optional[Job]) -> None:
        """Add a new request; None stands for a refused one."""
        self._seen.add(seq_id, digest, None if job is None else job.request_id)
        self.next_seq = max(self.next_seq, seq_id + 1)
        if job is not None:
            self.ready.append(job)


class FirstBodyLane(ArrivalLane):
    """Like ArrivalLane, but a repeated number stands for the first request, whatever its body."""

    def __init__(self, model_id: str, session_id: str) -> None:
        super().__init__(model_id, session_id)
        self._first: Dict[int, str] = {}

    def find(self, seq_id: int, digest: bytes) -> Optional[str]:
        """Return the request id of the number's first submission, or None."""
        return self._first.get(seq_id)

    def add(self, seq_id: int, digest: bytes, job: Optional[Job]) -> None:
        """Add a new request; None stands for a refused one."""
        super().add(seq_id, digest, job)
        if job is not None:
            self._first[seq_id] = job.request_id


class StrictLane(Lane):
    """Requests run in order of arrival, but only the expected number succeeds.

    Only a success uses up a number: after a failure every other number fails until the failed
    number arrives again.  Repeated requests are not recognised.
    """

    def __init__(self, model_id: str, session_id: str) -> None:
        super().__init__(model_id, session_id)
        self._submissions = 0

    def find(self, seq_id: int, digest: bytes) -> Optional[str]:
        """Return None: every submission is a new request."""
        return None

    def named(self, job: Job) -> Job:
        """Return *job* under an id of its own, since its number may come again."""
        self._submissions += 1
        return dataclasses.replace(job, request_id=f"{job.request_id}:{self._submissions}")

    def add(self, seq_id: int, digest: bytes, job: Optional[Job]) -> None:
        """Add a request; a refused one (None) leaves no trace."""
        if job is None:
            return
        run = job.run

        def in_order() -> object:  # on the engine thread, the only one that advances next_seq
            if seq_id != self.next_seq:
                raise HTTPError(409, f"Sequence conflict: expected {self.next_seq}, got {seq_id}.")
            value = run()
            self.next_seq += 1
            return value

        self.ready.append(dataclasses.replace(job, run=in_order))


def lane_of(profile: Profile) -> Type[Lane]:
    """Return the kind of queue that *profile* asks for."""
    if profile.numbers == "strict":
        return StrictLane
    if profile.numbers == "arrival":
        return FirstBodyLane if profile.first_body_wins else ArrivalLane
    return Lane
