"""PipedSteps: the steps of a run whose next ones are submitted before one is waited for."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any, Callable, Deque, Iterator, Mapping, Optional, Union

from tinkex.runs.saver import Place
from tinkex.runs.step import RunStep
from tinkex.types import OptimParams

if TYPE_CHECKING:
    from tinkex._training.custom_loss import CustomLoss, LossHandle
    from tinkex.clients.pipeline import PipelineStep, Schedule
    from tinkex.clients.training import TrainingClient


class PipedSteps(Iterator[RunStep[Any]]):
    """Iterates over *steps*, each with its result, by a pipeline over their batches.

    Args:
        steps: one is taken when the pipeline has room; when the next one is asked for, all
            requests of the one before have been queued.
        trainer: of the run.
        first: the place before these steps.
        loss_fn, adam_params, loss_fn_config, depth, metrics: as for `Run.pipeline`.
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
        self._handed_out: Optional[RunStep[Any]] = None  # the last one
        self._adam_params = adam_params
        self._metrics = metrics
        self._submitted: Deque[RunStep[Any]] = collections.deque()
        schedule = self._params_of if callable(adam_params) else adam_params
        self._pipeline = trainer.pipeline(
            self._batches(), loss_fn, schedule, loss_fn_config, depth=depth
        )

    @property
    def place(self) -> Place:
        """The place after the steps that are known to be done."""
        return self._first.after(self._finished)

    def __next__(self) -> RunStep[Any]:
        self._handed_out = self._finish(next(self._pipeline))
        return self._handed_out

    def drain(self) -> bool:
        """Wait for the steps that were sent, and have them written; False if one has failed.

        Raises:
            TinkexError: one fails.
        """
        if self._handed_out is not None:
            self._handed_out._end()
        for result in self._pipeline.drain():
            if result.index != self._finished:
                return False  # the one before it has failed
            self._finish(result)._write()  # the loop's body has not seen it
        return True

    def _batches(self) -> Iterator[Any]:
        for step in self._steps:
            self._submitted.append(step)
            yield step.batch

    def _params_of(self, index: int) -> OptimParams:
        assert callable(self._adam_params)
        return self._adam_params(self._first.steps + index)

    def _finish(self, result: PipelineStep) -> RunStep[Any]:
        step = self._submitted.popleft()
        self._finished += 1
        step.result = result
        step.log(result.metrics)
        if self._metrics is not None:
            step.log(self._metrics(step))
        return step
