"""Pipeline: training steps that are submitted before the results of earlier ones are awaited.

Used by one thread.  It has none of its own: the run's queue sends the requests.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from tinkex._runtime.numeric import as_int
from tinkex._training.checks import check_ttl
from tinkex.errors import InvalidInputError, TinkexError
from tinkex.futures import APIFuture
from tinkex.types import (
    Datum,
    ForwardBackwardOutput,
    OptimParams,
    OptimStepResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)

if TYPE_CHECKING:
    from tinkex._training.custom_loss import CustomLoss, LossHandle
    from tinkex.clients.training import TrainingClient

logger = logging.getLogger(__name__)

Batch = Iterable[Datum]
#: The optimizer's parameters: the same for every step, or a function of the step's index.
Schedule = Union[OptimParams, Callable[[int], OptimParams]]
#: Which steps the caller saves: every n-th, or each whose index a function maps to True.
SaveAfter = Union[None, int, Callable[[int], bool]]
#: Which steps the pipeline saves: every n-th, or each whose index a function maps to a name.
SaveEvery = Union[None, int, Callable[[int], Optional[str]]]


@dataclasses.dataclass(frozen=True)
class PipelineStep:
    """The results of one training step.

    Attributes:
        index: the step's position in the pipeline, from 0.
        forward_backward, optim: the results of its two requests.
    """

    index: int
    forward_backward: ForwardBackwardOutput
    optim: OptimStepResponse

    #: Set by the pipeline.  Not fields, so that copies and pickles hold only the results.
    _pipeline: ClassVar[Optional[Pipeline]] = None
    _saved: ClassVar[Optional[APIFuture[SaveWeightsResponse]]] = None

    @property
    def metrics(self) -> Dict[str, float]:
        """The metrics of both requests, merged."""
        return {**self.forward_backward.metrics, **(self.optim.metrics or {})}

    def save_state(
        self,
        name: Optional[str] = None,
        ttl_seconds: Optional[int] = None,
        overwrite: bool = False,
        user_metadata: Optional[Mapping[str, str]] = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Save weights and optimizer state as they are after this step; return immediately.

        Without a name, return the future of the checkpoint that the pipeline queued behind this
        step because of *save_every*.  With a name, arguments and result are as for
        `TrainingClient.save_state`.

        Raises:
            InvalidInputError: there is no name, and *save_every* did not select this step.  Or
                there is a name, but the checkpoint would include more than this step: a later step
                was submitted, or the run was trained or loaded outside of the pipeline.  See
                *save_every* and *save_after* of `TrainingClient.pipeline`.
        """
        if name is None:
            if self._saved is None:
                raise InvalidInputError(
                    f"save_state: the pipeline has not saved step {self.index}",
                    hint="Give a name, or say in advance which steps to save: "
                    "pipeline(..., save_every=100).",
                )
            return self._saved
        trainer = self._trainer_after_this("save_state")
        return trainer.save_state(name, ttl_seconds, overwrite, user_metadata)

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: Optional[int] = None,
        user_metadata: Optional[Mapping[str, str]] = None,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Like `save_state`, but for sampling: see `TrainingClient.save_weights_for_sampler`."""
        trainer = self._trainer_after_this("save_weights_for_sampler")
        return trainer.save_weights_for_sampler(name, ttl_seconds, user_metadata)

    def _trainer_after_this(self, what: str) -> TrainingClient:
        if self._pipeline is None:
            raise InvalidInputError(
                f"{what}: this copy of step {self.index} does not belong to a pipeline"
            )
        return self._pipeline.trainer_after(self.index, what)

    def __getstate__(self) -> Dict[str, Any]:
        # Without the pipeline and the future that `_finish_oldest` adds: they can't be pickled.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Step(NamedTuple):
    """A pass and the optimizer step after it, both in the run's queue."""

    forward_backward: APIFuture[ForwardBackwardOutput]
    optim: APIFuture[OptimStepResponse]

    def cancel_if_unsent(self) -> None:
        """Cancel both, unless the queue has begun the pass."""
        # If the pass was sent, its own optimizer step must use up its gradient, which would
        # otherwise be added to the gradient of the next step.
        if self.forward_backward.cancel_if_queued():
            self.optim.cancel()


class _Sent(NamedTuple):
    """A step in progress."""

    step_index: int
    step: Step
    saved: Optional[APIFuture[SaveWeightsResponse]] = None


class Pipeline(Iterator[PipelineStep]):
    """The iterator that `TrainingClient.pipeline` returns.  For one thread.

    Args: as for `TrainingClient.pipeline` of *trainer*.

    Attributes:
        is_drained: set by an owner that always drains the pipeline and reports unfinished steps
            itself; the pipeline then logs no warning about them.
    """

    def __init__(
        self,
        trainer: TrainingClient,
        batches: Iterable[Batch],
        loss_fn: Union[str, CustomLoss, LossHandle],
        loss_fn_config: Optional[Mapping[str, Union[float, str]]],
        adam_params: Schedule,
        depth: int,
        save_after: SaveAfter,
        save_every: SaveEvery = None,
        save_ttl_seconds: Optional[int] = None,
    ) -> None:
        if loss_fn_config is not None and not isinstance(loss_fn, str):
            raise InvalidInputError("loss_fn_config is for losses of the server, not for your own")
        if not isinstance(batches, Iterable):
            raise InvalidInputError(
                f"batches is of type {type(batches).__name__}; it must be an iterable of batches"
            )
        self._trainer = trainer
        self._batches = enumerate(iter(batches))
        self._loss_fn = loss_fn
        self._loss_fn_config = loss_fn_config
        self._adam_params = adam_params
        self._depth = as_int("depth", depth, 1, text=False)
        self._save_after: SaveAfter = _every_nth("save_after", save_after)
        self._save_every: SaveEvery = _every_nth("save_every", save_every)
        self._save_ttl_seconds = check_ttl(save_ttl_seconds)
        self._sent: Deque[_Sent] = collections.deque()
        self._newest = -1  # index of the last step that was submitted
        self._newest_update = trainer._run.last_update  # identifies that step's update
        self._more = True
        self._ended = False
        self.is_drained = False

    def __iter__(self) -> Pipeline:
        return self

    def __next__(self) -> PipelineStep:
        """Submit up to *depth* steps, and wait for the oldest.

        Any failure, including Ctrl-C, cancels the unsent steps and is raised; `drain` returns the
        steps that were sent.
        """
        if self._ended:
            raise StopIteration
        try:
            self._fill()
            if self._sent:
                return self._finish_oldest()
        except BaseException as error:
            self._break_off(error)
            raise
        raise StopIteration

    def drain(self) -> List[PipelineStep]:
        """Wait for the submitted steps, and return those not handed out yet.

        The pipeline takes no more batches.  Blocks; raises the first failure, and can be called
        again after one.
        """
        self._more = False
        steps: List[PipelineStep] = []
        while self._sent:
            try:
                steps.append(self._finish_oldest())
            # Except Ctrl-C: the step remains the oldest, and another `drain` waits for it again.
            except Exception as error:
                self._break_off(error)
                raise
        return steps

    def close(self) -> None:
        """Take no more batches, and cancel the unsent steps.  Idempotent; does not block.

        The server still executes the steps that were sent; they are logged.
        """
        self._more = False
        self._cancel_unsent()
        if self._sent:
            logger.warning("the pipeline was closed: %s", self._describe_sent())
        self._sent.clear()

    def trainer_after(self, index: int, what: str) -> TrainingClient:
        """Return the trainer, for *what*; InvalidInputError if the run is past step *index*."""
        if self._newest > index:
            later = (
                f"step {index + 1} was"
                if self._newest == index + 1
                else (f"steps {index + 1} to {self._newest} were")
            )
            raise InvalidInputError(
                f"{what}: {later} already submitted, so the checkpoint would hold more than step "
                f"{index}",
                hint="Say in advance which steps to save: pipeline(..., save_every=100), or "
                "save_after=100 to save them yourself; or use depth=1.",
            )
        # Every queued optimizer step or load replaces last_update, whoever queued it.
        if self._trainer._run.last_update is not self._newest_update:
            raise InvalidInputError(
                f"{what}: the run was trained or loaded outside of the pipeline after step "
                f"{index}, so the checkpoint would not match that step",
                hint=f"To save the run as it is now, call {what} of the training client.",
            )
        return self._trainer

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _fill(self) -> None:
        while self._more and len(self._sent) < self._depth:
            if self._sent and self._is_saved_after(self._newest):
                return  # until that step was handed out and the caller requests the next one
            try:
                index, batch = next(self._batches)
            except StopIteration:
                self._more = False
                return
            try:
                step = self._submit(index, batch)
                # Before queueing the checkpoint, which may fail: the step is already in the run's
                # queue, and must be cancelled or drained with the others.
                self._sent.append(_Sent(index, step))
                self._newest, self._newest_update = index, self._trainer._run.last_update
                self._save_newest()
            except TinkexError as error:
                _add_step_to_hint(error, index)
                raise

    def _submit(self, index: int, batch: Batch) -> Step:
        params: Any = self._adam_params
        if callable(params):
            params = params(index)
        data, breaks = _flatten(batch)
        return self._trainer._submit_step(params, self._submit_pass, data, breaks)

    def _submit_pass(self, data: Any, breaks: List[int]) -> APIFuture[ForwardBackwardOutput]:
        trainer, loss_fn = self._trainer, self._loss_fn
        if isinstance(loss_fn, str):
            config = self._loss_fn_config
            return trainer._pass("forward_backward", data, loss_fn, config, breaks)
        return trainer._custom_pass(data, loss_fn, breaks)

    def _save_newest(self) -> None:
        """Queue a checkpoint behind the newest step, if *save_every* selects the step."""
        # The server executes a run's requests in order, so the checkpoint holds no later step.
        index, step, _ = self._sent[-1]
        if self._save_every is None:
            return
        if callable(self._save_every):
            name = self._save_every(index)
        else:
            name = f"step-{index + 1}" if (index + 1) % self._save_every == 0 else None
        if name is not None:
            saved = self._trainer.save_state(name, self._save_ttl_seconds)
            self._sent[-1] = _Sent(index, step, saved)

    def _is_saved_after(self, index: int) -> bool:
        """Whether *save_after* selects step *index*."""
        if self._save_after is None:
            return False
        if callable(self._save_after):
            return self._save_after(index)
        return (index + 1) % self._save_after == 0

    def _finish_oldest(self) -> PipelineStep:
        # The step stays in place until its results have arrived: Ctrl-C may interrupt the wait.
        index, sent, saved = self._sent[0]
        try:
            step = PipelineStep(index, sent.forward_backward.result(), sent.optim.result())
            vars(step).update(_pipeline=self, _saved=saved)  # the dataclass is frozen
        except Exception as error:  # not Ctrl-C: the step goes on, and `drain` can wait for it
            self._sent.popleft()
            if isinstance(error, TinkexError):
                _add_step_to_hint(error, index)
            raise
        self._sent.popleft()
        return step

    def _break_off(self, error: BaseException) -> None:
        self._more = False
        self._ended = True
        self._cancel_unsent()
        if not self.is_drained:
            logger.warning(
                "the pipeline stops: %s; %s", type(error).__name__, self._describe_sent()
            )

    def _cancel_unsent(self) -> None:
        """Cancel and forget the steps that the queue has not begun."""
        # From the last step backward: the queue may begin a step at any moment, and must not begin
        # one whose predecessor was cancelled.
        kept: Deque[_Sent] = collections.deque()
        for sent in reversed(self._sent):
            sent.step.cancel_if_unsent()
            if not sent.step.forward_backward.cancelled():
                kept.appendleft(sent)
            elif sent.saved is not None:
                sent.saved.cancel()
        self._sent = kept

    def _describe_sent(self) -> str:
        if not self._sent:
            return "nothing else was sent"
        names = ", ".join(str(sent.step_index) for sent in self._sent)
        return f"already sent, and done by the server unless it fails: step {names}"


def _flatten(batch: Union[Batch, Sequence[Batch]]) -> Tuple[Any, List[int]]:
    """Return the data of a step, and the indices at which its second and later passes begin.

    Raises InvalidInputError if a pass is empty.
    """
    # A list of lists is several passes; anything else is one pass, and is checked later.
    if not (isinstance(batch, (list, tuple)) and batch and all(isinstance(p, list) for p in batch)):
        return batch, []
    data: List[Any] = []
    starts: List[int] = []
    for number, part in enumerate(batch):
        if not part:
            raise InvalidInputError(
                f"pass {number} of the batch is empty", hint="Give at least one Datum."
            )
        starts.append(len(data))
        data += part
    return data, starts[1:]


def _every_nth(name: str, given: Any) -> Any:
    """Return *given*, a number of steps, as an int; return a function or None unchanged."""
    if given is None or callable(given):
        return given
    return as_int(name, given, 1, text=False)


def _add_step_to_hint(error: TinkexError, index: int) -> None:
    step = f"It was step {index} of the pipeline."
    error.hint = f"{error.hint} {step}" if error.hint else step
