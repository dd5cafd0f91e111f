"""Gradient: which batches in several requests a run's gradient holds, and which of them in part."""

from __future__ import annotations

from typing import List, Mapping, Optional, Sequence, Tuple, Union

from tinkex._training.run_queue import NumberedLane
from tinkex._training.split_batch import Piece, SplitBatch
from tinkex.errors import IncompleteGradientError
from tinkex.types import Datum


class Gradient:
    """The state of one run's gradient, as far as its next request depends on it.

    Used by the lane's thread alone.  Batches in one request are added or not; they need no entry.
    """

    def __init__(self, lane: NumberedLane) -> None:
        self._lane = lane
        self._split: List[SplitBatch] = []  # may not be settled yet
        self._incomplete: List[SplitBatch] = []

    @property
    def is_incomplete(self) -> bool:
        """Whether a batch is known to have been added in part."""
        return bool(self._incomplete)

    def add(self, batch: SplitBatch, completed: Optional[SplitBatch] = None) -> None:
        """Note that *batch* is about to be sent; it takes the place of *completed*, if any."""
        self._split.append(batch)
        if completed is not None:
            self._incomplete.remove(completed)

    def drop(self) -> None:
        """Note that the server has dropped the gradient."""
        self._incomplete.clear()

    def wait(self) -> None:
        """Wait until all batches are settled, or the client is closed."""
        self._settle(self._split)

    def ensure_complete(self) -> None:
        """Raise IncompleteGradientError if only a part of a batch was added.

        Once a part of a batch has failed, the others are waited for: a request that is sent before
        may make it impossible to complete the batch.
        """
        self._settle([batch for batch in self._split if batch.failing])
        for batch in self._incomplete:
            error = batch.settle()
            if error is not None:
                raise error

    def plan(
        self, data: List[Datum], loss_fn: str, config: Mapping[str, Union[float, str]]
    ) -> Tuple[Optional[SplitBatch], List[Piece]]:
        """Return how to send *data*, and the batch that is completed by it, if any.

        Raises IncompleteGradientError if a batch was added in part, and *data* is not its rest.
        """
        try:
            self.ensure_complete()
        except IncompleteGradientError:
            for batch in self._incomplete:
                pieces = batch.completed_by(data, loss_fn, config)
                if pieces is not None:
                    return batch, pieces
            raise
        return None, [Piece(data, None)]

    def _settle(self, awaited: Sequence[SplitBatch]) -> None:
        """Wait for the batches *awaited*, and settle all that are done."""
        for batch in awaited:
            self._lane.wait_for(batch.parts)
        for batch in [batch for batch in self._split if batch.done]:
            self._split.remove(batch)
            if batch.settle() is not None:
                self._incomplete.append(batch)
