"""CustomPass: one pass with a loss that is computed here, as a task of a run's lane.

Forward for the logprobs; the loss and its gradient; backward with the gradient as weights.  It
runs on the lane's thread, so that no other request of the run comes between.
"""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import List, Mapping, Optional, Sequence

from tinkex.errors import (
    APIStatusError,
    ClientClosedError,
    IncompleteGradientError,
    InvalidInputError,
    RequestFailedError,
    SequenceLostError,
    SessionLostError,
)
from tinkex.futures import APIFuture, gather
from tinkex.training.custom_loss import CustomLoss, forward_data, gradient_data, merge_metrics
from tinkex.training.training_run import TrainingRun
from tinkex.types import Datum, ForwardBackwardOutput
from tinkex.wire.chunking import combine

Output = ForwardBackwardOutput


class CustomPass:
    """The task that computes *loss_fn* of *data* and settles *future*.

    A failure, or a cancel, before the backward pass leaves the run as it was.  A backward pass in
    several requests is waited for, and is not cut short by a cancel: if only some of its requests
    were done, the run is spoilt (see `TrainingRun.spoil`).
    """

    def __init__(
        self,
        run: TrainingRun,
        future: APIFuture[Output],
        data: List[Datum],
        loss_fn: CustomLoss,
    ) -> None:
        self._run = run
        self._future = future
        self._data = data
        self._loss_fn = loss_fn

    def __call__(self) -> None:
        """Do it.  On the lane's thread; blocks.  Raises what the future is to fail with."""
        future = self._future
        if future.done():
            return
        self._run.ensure_trainable()
        future.enter("submitting")
        output = self._run.run_pass("forward", forward_data(self._data), "cross_entropy", {})
        weighted, metrics = gradient_data(self._data, output, self._loss_fn)
        if future.done():
            return  # cancelled: the gradient must not be added
        parts = self._run.send_parts("forward_backward", weighted, "cross_entropy", {})
        if len(parts) == 1:  # added or not added: the next request need not wait to know
            gather(future, parts, lambda outputs: merge_metrics(combine(outputs), metrics))
        else:
            self._settle(parts, metrics)

    def _settle(self, parts: Sequence[APIFuture[Output]], metrics: Mapping[str, float]) -> None:
        """Wait for all *parts* and settle the future; spoil the run if some are missing."""
        self._run.wait_for(parts)
        failures = [_failure(part) for part in parts]
        first = next((failure for failure in failures if failure is not None), None)
        if first is None:
            output = combine([part.result() for part in parts])
            self._future.settle(merge_metrics(output, metrics))
            return
        lost = isinstance(first, (ClientClosedError, SequenceLostError, SessionLostError))
        if lost or all(map(_left_out, parts, failures)):
            raise first  # the run is no more, or nothing was added to it
        done = sum(failure is None for failure in failures)
        spoilt = IncompleteGradientError(
            f"{done} of {len(parts)} parts of a custom loss's gradient were added to run "
            f"{self._run.model_id}, then: {first}",
            request_id=getattr(first, "request_id", None),
            hint="The weights are as they were: save_state still works. Go on from it, or from an "
            "earlier checkpoint, with create_training_client_from_state_with_optimizer(path).",
        )
        spoilt.__cause__ = first
        self._run.spoil(spoilt)
        raise spoilt from first


def _failure(part: APIFuture[Output]) -> Optional[BaseException]:
    """Return the failure of *part*, which is settled, or None."""
    try:
        return part.exception()
    except CancelledError as error:
        return error


def _left_out(part: APIFuture[Output], failure: Optional[BaseException]) -> bool:
    """Whether the server has added nothing of *part*, for certain."""
    if isinstance(failure, CancelledError):
        return part.request_id is None  # it was not sent
    if isinstance(failure, (InvalidInputError, RequestFailedError)):
        return True
    status = failure.status if isinstance(failure, APIStatusError) else None
    return status is not None and 400 <= status < 500 and status != 408
