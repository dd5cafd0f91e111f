"""CustomPass: one pass with a loss that is computed here, as a task of a run's lane.

Forward for the logprobs; the loss and its gradient; backward with the gradient as weights.  It
runs on the lane's thread, so that no other request of the run comes between.
"""

from __future__ import annotations

from typing import List

from tinkex._training.custom_loss import CustomLoss, forward_data, gradient_data, merge_metrics
from tinkex._training.run import TrainingRun
from tinkex.futures import APIFuture
from tinkex.types import Datum, ForwardBackwardOutput
from tinkex.wire.chunking import combine

Output = ForwardBackwardOutput


class CustomPass:
    """The task that computes *loss_fn* of *data* and settles *future*.

    A failure, or a cancel, before the backward pass leaves the run as it was.  The backward pass
    is that of any batch: see `TrainingRun.send_gradient`.
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
        if not future.begin():
            return
        self._run.ensure_trainable()
        future.enter("submitting")
        output = self._run.run_pass("forward", forward_data(self._data), "cross_entropy", {})
        weighted, metrics = gradient_data(self._data, output, self._loss_fn)
        if future.done():
            return  # cancelled: the gradient must not be added

        def join(outputs: List[Output]) -> Output:
            return merge_metrics(combine(outputs), metrics)

        self._run.send_gradient(future, weighted, "cross_entropy", join)
