"""PipedSteps: the steps of a run, submitted ahead of the one that is waited for."""

from __future__ import annotations

import collections
import logging
from typing import TYPE_CHECKING, Any, Callable, Deque, Iterator, Mapping, Optional, Union

from tinkex.runs.saver import Place
from tinkex.runs.step import RunStep
from tinkex.types import OptimParams

if TYPE_CHECKING:
    from tinkex._training.custom_loss import CustomLoss, LossHandle
    from tinkex.clients.pipeline import PipelineStep, Schedule
    from tinkex.clients.training import TrainingClient


logger = logging.getLogger(__name__)


class PipedSteps(Iterator[RunStep[Any]]):
    """Trains on the batches of *steps* in a pipeline; yields each step once it has its result.

    Args:
        steps: a step is taken from it when the pipeline has room; by then, all requests of the
            step before have been queued.
        trainer: the run's training client.
        first: the place before these steps.
        loss_fn, adam_params, loss_fn_config, depth, metrics: as for `Run.pipeline`.

    Attributes:
        failure: the first exception that *metrics* raised, if any.
    """

    def __init__(
        self,
        steps: Iterator[RunStep[Any]],
        trainer: TrainingClient,
        first: Place,
        loss_fn: Union[str, CustomLoss, LossHandle],
        adam_params: Schedule,
        loss_fn_config: Optional[Mapping[str, Union[float, str]]],
        depth: int,
        metrics: Optional[Callable[[RunStep[Any]], Mapping[str, Any]]],
    ) -> None:
        self._steps = steps
        self._first = first
        self._finished = 0
        self._incomplete = False  # a step has failed, or its result was not read
        self.failure: Optional[BaseException] = None
        self._handed_out: Optional[RunStep[Any]] = None  # the step that was yielded last
        self._adam_params = adam_params
        self._metrics = metrics
        self._submitted: Deque[RunStep[Any]] = collections.deque()
        schedule = self._params_of if callable(adam_params) else adam_params
        self._pipeline = trainer.pipeline(
            self._batches(), loss_fn, schedule, loss_fn_config, depth=depth
        )
        # The run always drains: `drain` records the steps that were sent, or the run reports that
        # they are not saved.
        self._pipeline.is_drained = True

    @property
    def place(self) -> Place:
        """The place after the steps that are known to be done."""
        return self._first.after(self._finished)

    def __next__(self) -> RunStep[Any]:
        step = self._finish(next(self._pipeline))
        if self.failure is not None:
            raise self.failure
        self._handed_out = step
        return step

    def drain(self) -> bool:
        """Wait for the steps that were sent, and write them; return False if one had failed before.

        If *metrics* raises an error, it is kept in `failure`, because the server has done the step.

        Raises:
            TinkexError: a step fails.
        """
        # Set until every result is read, so that a failure or Ctrl-C below leaves it set: a second
        # attempt would see only the remaining steps, and take them for all.
        if self._incomplete:
            return False
        self._incomplete = True
        if self._handed_out is not None:  # write its line before those of later steps
            self._handed_out._end()
        for result in self._pipeline.drain():
            if result.index != self._finished:
                return False  # the step before this one has failed
            self._finish(result)._write()  # the loop's body will not see it
        self._incomplete = False
        return True

    def _batches(self) -> Iterator[Any]:
        for step in self._steps:
            self._submitted.append(step)
            yield step.batch

    def _params_of(self, index: int) -> OptimParams:
        # The pipeline counts its steps from 0; a schedule takes the index in the whole run.
        assert callable(self._adam_params)
        return self._adam_params(self._first.steps + index)

    def _finish(self, result: PipelineStep) -> RunStep[Any]:
        step = self._submitted.popleft()
        self._finished += 1
        step.result = result
        step.log(result.metrics)
        if self._metrics is not None:
            # A step that the server has done must be counted and written whatever happens here:
            # otherwise the run would train on its batch twice.
            try:
                step.log(self._metrics(step))
            except BaseException as error:  # including Ctrl-C
                step._write()
                if isinstance(error, SystemExit):
                    raise  # a second SIGTERM: don't wait for anything more
                if self.failure is None:
                    self.failure = error
                else:
                    logger.warning("metrics of step %d failed, too: %r", step.index, error)
        return step
