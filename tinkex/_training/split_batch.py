"""SplitBatch: a batch that is added to a run's gradient by several requests.

Either all of its requests are done, or the run must know: an optimizer step would train on a part
of the batch, and one after the same call again on that part twice, without an error.  The same call
again therefore sends only what is missing.
"""

from __future__ import annotations

import copy
import re
from concurrent.futures import CancelledError
from typing import Any, Callable, List, Mapping, NamedTuple, Optional, Sequence, TypeVar, Union

from tinkex.errors import (
    APIStatusError,
    ClientClosedError,
    IncompleteGradientError,
    InvalidInputError,
    RequestFailedError,
    SequenceLostError,
    SessionLostError,
    TinkexError,
)
from tinkex.futures import APIFuture
from tinkex.types import Datum, ForwardBackwardOutput

Output = ForwardBackwardOutput
Part = APIFuture[Output]
E = TypeVar("E", bound=BaseException)

#: How servers name an example of a batch: in a sentence, or as the location of a bad field.
_INDEX = re.compile(r'(\bdatum |\bdata\[|\bdata\.|"data", ?)(\d+)')

#: With these the run itself is lost, and its gradient does not matter any more.
_RUN_LOST = (ClientClosedError, SequenceLostError, SessionLostError)

_HOW_TO_DROP = (
    "save_state still saves weights and optimizer state as they were; load that checkpoint with "
    "load_state_with_optimizer(path), or into a new run with "
    "create_training_client_from_state_with_optimizer(path)."
)


class Piece(NamedTuple):
    """Consecutive datums of a batch; *part* is the request that has added them already, if any."""

    data: List[Datum]
    part: Optional[Part]


class Contents(NamedTuple):
    """What a batch consists of: the datums of each request, and the loss."""

    chunks: Sequence[List[Datum]]
    loss_fn: str
    config: Mapping[str, Union[float, str]]


class SplitBatch:
    """Settles the future of a batch once all its requests are settled.  Thread-safe.

    Cancelling *future* does not cancel the requests: the batch is added as a unit.

    Args:
        future: of the batch.
        parts: the futures of its requests, in order.
        join: makes the result of the batch from theirs.
        may_repeat: tells whether a part whose answer was lost is done only once when the same
            request is made again.
        contents: what the requests send; None if the same call again would not send the same.
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
        """Whether a request has failed, or was cancelled."""
        return any(part.failed() for part in self.parts)

    def settle(self) -> Optional[IncompleteGradientError]:
        """Settle the future; return the error if only a part of the batch was added.

        All requests must be settled.  More than one call does no harm.
        """
        failures = self._failures()
        errors = [failure for failure in failures if failure is not None]
        if not errors:
            self._succeed()
            return None
        # Requests are cancelled because an earlier one has failed.
        error = next((e for e in errors if not isinstance(e, CancelledError)), errors[0])
        if not isinstance(error, _RUN_LOST) and not all(map(_left_out, self.parts, failures)):
            error = self._incomplete(failures, error)
        self._future.try_set_exception(error)
        return error if isinstance(error, IncompleteGradientError) else None

    def completed_by(
        self, data: List[Datum], loss_fn: str, config: Mapping[str, Union[float, str]]
    ) -> Optional[List[Piece]]:
        """Return how *data* would complete this batch, of which a part is missing.

        *data* is cut where this batch was: cut anew, examples that were replaced, or an encoding
        that is known by now, would move the cuts.  Pieces without a part are to be sent, in order.

        Returns None if the gradient would not be that of *data*, or might not be.
        """
        own, failures = self._contents, self._failures()
        if own is None or (own.loss_fn, own.config) != (loss_fn, config):
            return None
        if not self._may_be_completed(failures):
            return None
        pieces: List[Piece] = []
        start = 0
        for part, failure, chunk in zip(self.parts, failures, own.chunks):
            piece = data[start : start + len(chunk)]
            if not _left_out(part, failure) and piece != chunk:
                return None
            pieces.append(Piece(piece, part if failure is None else None))
            start += len(chunk)
        pieces.append(Piece(data[start:], None))
        return [piece for piece in pieces if piece.data]

    def _may_be_completed(self, failures: Sequence[Optional[BaseException]]) -> bool:
        """Whether the same call again adds what is missing, and nothing twice.

        A part whose answer was lost must then be the first request: any other one would have it
        sent again before, and it would be added once more when it is due.
        """
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
        self._contents = None  # a batch takes much memory
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
                "Call forward_backward with the batch again: only what is missing is sent, and an "
                "example that was refused may be another one. Or drop the gradient: "
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
    """Return the failure of *part*, which is settled, or None."""
    try:
        return part.exception()
    except CancelledError as error:
        return error


def _left_out(part: Part, failure: Optional[BaseException]) -> bool:
    """Whether the server has added nothing of *part*, which is settled, for certain."""
    if isinstance(failure, CancelledError):
        return not part.was_sent
    if part.was_accepted:  # any other error is one of asking for the result
        return isinstance(failure, RequestFailedError)
    if isinstance(failure, (InvalidInputError, RequestFailedError)):
        return True
    if not isinstance(failure, APIStatusError) or failure.status is None:
        return False
    if failure.status in (400, 404, 410, 422):  # read, and refused
        return True
    return 400 <= failure.status < 500 and failure.status != 408 and not failure.maybe_taken


def in_indices_of_batch(error: E, first: int, stop: int) -> E:
    """Return *error*, which is about ``data[first:stop]`` of a batch, in the caller's terms.

    An index that the server counted from the beginning of its request is counted from the
    beginning of the batch.
    """
    if not isinstance(error, TinkexError) or isinstance(error, _RUN_LOST) or first == 0:
        return error

    def moved(found: re.Match[str]) -> str:
        return f"{found.group(1)}{int(found.group(2)) + first}"

    translated = copy.copy(error)
    message, count = _INDEX.subn(moved, error.message)
    translated.message = message if count else f"{message} (in data[{first}:{stop}] of the batch)"
    translated.args = (translated.message,)
    translated.__cause__ = error.__cause__
    return translated
