"""Gradient: tracks whether batches in several requests were added to a run's gradient in full.

If only some requests of a batch are done, the run must know: an optimizer step would silently train
on a part of the batch, and after a repeated call it would train on that part twice.  A repeated
call therefore sends only the missing requests.
"""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

from tinkex._training.batch import RUN_LOST, Loss
from tinkex.errors import IncompleteGradientError, TinkexError
from tinkex.futures import APIFuture
from tinkex.retry import left_undone
from tinkex.types import Datum, ForwardBackwardOutput

if TYPE_CHECKING:
    from tinkex._training.run_queue import RunQueue

Output = ForwardBackwardOutput
Part = APIFuture[Output]

_HOW_TO_DROP = (
    "To drop the gradient, save the unchanged weights and optimizer state with save_state, and "
    "load that checkpoint with load_state_with_optimizer(path), or into a new run with "
    "create_training_client_from_state_with_optimizer(path)."
)


class Gradient:
    """The state of one run's gradient, as far as the run's next request depends on it.

    Used only by the queue's thread.  A batch in a single request cannot be added in part, so it
    needs no entry.
    """

    def __init__(self, queue: RunQueue) -> None:
        self._queue = queue
        self._split: List[SplitBatch] = []  # batches that may not be settled yet
        self._incomplete: List[SplitBatch] = []

    @property
    def is_incomplete(self) -> bool:
        """Whether a batch is known to have been added only in part."""
        return bool(self._incomplete)

    def add(self, batch: SplitBatch, completed: Optional[SplitBatch] = None) -> None:
        """Note that *batch* is about to be sent; it replaces *completed*, if any."""
        self._split.append(batch)
        if completed is not None:
            # Right even if the rest fails again: *batch* includes the parts of *completed*.
            self._incomplete.remove(completed)

    def drop(self) -> None:
        """Note that the server has dropped the gradient."""
        self._incomplete.clear()

    def wait(self) -> None:
        """Wait until all batches are settled, or the client is closed."""
        self._settle(self._split)

    def ensure_complete(self) -> None:
        """Raise IncompleteGradientError if a batch was added only in part."""
        # Once a part has failed, wait for the other parts: a request sent before they are settled
        # may make it impossible to complete the batch (`_may_be_completed`).
        self._settle([batch for batch in self._split if batch.failing])
        for batch in self._incomplete:
            error = batch.settle()
            if error is not None:
                raise error

    def plan(self, data: List[Datum], loss: Loss) -> Tuple[Optional[SplitBatch], List[Piece]]:
        """Return the incomplete batch that *data* completes, if any, and how to send *data*.

        Raises IncompleteGradientError if a batch was added only in part, and *data* does not
        complete it.
        """
        try:
            self.ensure_complete()
        except IncompleteGradientError:
            for batch in self._incomplete:
                pieces = batch.completed_by(data, loss)
                if pieces is not None:
                    return batch, pieces
            raise
        return None, [Piece(data, 0, None)]

    def _settle(self, awaited: Sequence[SplitBatch]) -> None:
        """Wait for the batches *awaited*, and settle all that are done."""
        for batch in awaited:
            self._queue.wait_for(batch.parts)
        for batch in [batch for batch in self._split if batch.done]:
            self._split.remove(batch)
            # `_part_settled` may not have run yet: futures wake waiters before they call callbacks.
            if batch.settle() is not None:
                self._incomplete.append(batch)


class Piece(NamedTuple):
    """Consecutive datums of a batch, starting at index *first*.

    *part* is the future of the request that has already added them, if any.
    """

    data: List[Datum]
    first: int
    part: Optional[Part]


class Contents(NamedTuple):
    """The contents of a batch: the datums of each request, and the loss."""

    chunks: Sequence[List[Datum]]
    loss: Loss


class SplitBatch:
    """Settles the future of a batch once all its requests are settled.  Thread-safe.

    Cancelling *future* does not cancel the requests: the batch is added as a unit.

    Args:
        future: the future of the batch.
        parts: the futures of its requests, in order.
        join: joins the results of the requests into the result of the batch.
        may_repeat: whether making the same request again is safe for a part whose response was
            lost, because the server executes it only once.
        contents: the contents of the requests; None if a repeated call would not send the same.
    """

    def __init__(
        self,
        model_id: str,
        future: APIFuture[Output],
        parts: Sequence[Part],
        join: Callable[[List[Output]], Output],
        may_repeat: Callable[[Part], bool],
        contents: Optional[Contents] = None,
    ) -> None:
        self.parts = parts
        self._may_repeat = may_repeat
        self._contents = contents
        self._model_id = model_id
        self._future = future
        self._join = join
        future.stand_for(parts, cancel=False)
        for part in parts:
            part.on_settled(self._part_settled)

    @property
    def done(self) -> bool:
        """Whether all requests are settled."""
        return all(part.done() for part in self.parts)

    @property
    def failing(self) -> bool:
        """Whether any request has failed or was cancelled."""
        return any(part.failed() for part in self.parts)

    def settle(self) -> Optional[IncompleteGradientError]:
        """Settle the future; return the error if the batch was added only in part.

        All requests must be settled.  Idempotent.
        """
        failures = self._failures()
        errors = [failure for failure in failures if failure is not None]
        if not errors:
            self._succeed()
            return None
        # The others are cancelled once one request has failed, and that one has the reason.
        error = next((e for e in errors if not isinstance(e, CancelledError)), errors[0])
        # The plain error is right if nothing was added, because the gradient is then intact, and if
        # the run is lost, because its gradient is lost, too.
        if not isinstance(error, RUN_LOST) and not all(map(_left_out, self.parts, failures)):
            error = self._incomplete(failures, error)
        self._future.try_set_exception(error)
        return error if isinstance(error, IncompleteGradientError) else None

    def completed_by(self, data: List[Datum], loss: Loss) -> Optional[List[Piece]]:
        """Return how *data* would complete this batch, which was added only in part.

        Pieces without a part must be sent, in order.  None if the gradient would not be, or might
        not be, the gradient of *data*.
        """
        own, failures = self._contents, self._failures()
        if own is None or own.loss != loss or not self._may_be_completed(failures):
            return None
        # Cut *data* where this batch was cut.  Otherwise replaced examples, or an encoding that has
        # become known since, would move the cuts, and the pieces would not match the added parts.
        pieces: List[Piece] = []
        start = 0
        for part, failure, chunk in zip(self.parts, failures, own.chunks):
            piece = data[start : start + len(chunk)]
            # Datums that were added, or may have been, must be the same; others may differ.
            if not _left_out(part, failure) and piece != chunk:
                return None
            pieces.append(Piece(piece, start, part if failure is None else None))
            start += len(chunk)
        # Examples beyond the end of this batch were never sent.
        pieces.append(Piece(data[start:], start, None))
        return [piece for piece in pieces if piece.data]

    def _may_be_completed(self, failures: Sequence[Optional[BaseException]]) -> bool:
        """Whether repeating the call adds the missing parts, and no part twice."""
        # A part whose response was lost must be the first request of the repeated call.  Before any
        # other request, the queue would resend the lost part (rule 4 of `SequenceRules`), and the
        # call would then send it once more.
        missing = False
        for part, failure in zip(self.parts, failures):
            if _left_out(part, failure):
                missing = True
            elif failure is not None and (missing or not self._may_repeat(part)):
                return False
        return self._contents is not None

    def _failures(self) -> List[Optional[BaseException]]:
        return [_failure(part) for part in self.parts]

    def _part_settled(self, part: Any) -> None:
        if self.done:
            self.settle()

    def _succeed(self) -> None:
        self._contents = None  # frees the datums, which may be large
        # It was cancelled, which does not stop the requests, or settled by an earlier call.
        if self._future.done():
            return
        try:
            self._future.try_set_result(self._join([part.result() for part in self.parts]))
        except Exception as error:
            self._future.try_set_exception(error)

    def _incomplete(
        self, failures: Sequence[Optional[BaseException]], cause: BaseException
    ) -> IncompleteGradientError:
        reason = cause.message if isinstance(cause, TinkexError) else repr(cause)
        hint = ""
        if self._may_be_completed(failures):
            hint = (
                "Call forward_backward with the batch again to complete the gradient: only the "
                "missing parts are sent, and a refused example may be replaced. "
            )
        error = IncompleteGradientError(
            f"{failures.count(None)} of {len(self.parts)} parts of a batch were added to the "
            f"gradient of run {self._model_id}; the rest was not, or may not have been: {reason}",
            status=getattr(cause, "status", None),
            request_id=getattr(cause, "request_id", None),
            hint="The run takes no optimizer step now. " + hint + _HOW_TO_DROP,
        )
        error.__cause__ = cause
        return error


def _failure(part: Part) -> Optional[BaseException]:
    """Return the failure of *part*, or None; *part* must be settled."""
    try:
        return part.exception()
    except CancelledError as error:
        return error


def _left_out(part: Part, failure: Optional[BaseException]) -> bool:
    """Whether the server certainly added nothing of *part*, which must be settled."""
    return failure is not None and left_undone(
        failure, was_sent=part.was_sent, was_accepted=part.was_accepted
    )
