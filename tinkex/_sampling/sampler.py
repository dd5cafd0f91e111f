"""Sampler: one sampler of the server, as one client of this process uses it."""

from __future__ import annotations

import itertools
import secrets
from typing import Iterator, Optional

from tinkex._api import sampling as api
from tinkex._results.pending import SamplerId
from tinkex._runtime.single_flight import SingleFlight
from tinkex._transport.resources import ClientResources
from tinkex._transport.server_flags import ABSENT, flags_for
from tinkex.errors import APIStatusError, ResponseDecodeError
from tinkex.retry_config import RetryConfig

#: Sequence numbers of clone n start at n times this (docs/protocol.md, "Clones").
CLONE_BLOCK = 10**9


class Sampler:
    """Which sampler it is, how to reach it, and the numbers of the requests.  Thread-safe.

    Attributes:
        warned_of_nan: it was told once that its logprobs are NaN.

    Args:
        clone: it is a second client of a sampler that another one made; its requests are numbered
            in a block of their own, known with the first of them.
    """

    def __init__(
        self,
        resources: ClientResources,
        sampling_session_id: str,
        retries: RetryConfig,
        *,
        clone: bool,
    ) -> None:
        self.transport = resources.transport
        self.limits = resources.limits
        self.sampling_session_id = sampling_session_id
        self.retries = retries
        self.warned_of_nan = False
        # next() is atomic.
        self._seq_ids: Optional[Iterator[int]] = None if clone else itertools.count()
        self._clone = 0  # of a clone, once it has joined, its number
        self._joining: SingleFlight[Iterator[int]] = SingleFlight()

    @property
    def id(self) -> SamplerId:
        """How the server names it; that of a clone is known once a request of it was sent."""
        return SamplerId(self.sampling_session_id, self._clone)

    def next_seq_id(self) -> int:
        """The next number; the first one of a clone may block.  Called by workers."""
        seq_ids = self._seq_ids
        if seq_ids is None:
            seq_ids = self._joining.run(self._join, self.transport.closing)
        return next(seq_ids)

    def _join(self) -> Iterator[int]:
        if self._seq_ids is None:
            self._clone = self._clone_id()
            self._seq_ids = itertools.count(self._clone * CLONE_BLOCK)
        return self._seq_ids

    def _clone_id(self) -> int:
        if flags_for(self.transport).sample_join_sampling_session:
            try:
                joined = api.join_sampling_session(self.transport, self.sampling_session_id)
            except APIStatusError as error:
                if error.status not in ABSENT:
                    raise
            else:
                if 0 < joined.client_counter <= CLONE_BLOCK:
                    return joined.client_counter
                raise ResponseDecodeError(
                    f"join_sampling_session: the client_counter {joined.client_counter} is no "
                    "number of a clone"
                )
        return 1 + secrets.randbelow(CLONE_BLOCK)
