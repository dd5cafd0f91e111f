"""Pipeline: training steps, the next of which are submitted before one is waited for.

Used by one thread.  It has none of its own: the run's lane sends.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
from typing import (
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
    Union,
)

from tinkex.errors import InvalidInputError, TinkexError
from tinkex.futures import APIFuture
from tinkex.numeric import as_int
from tinkex.training.run_checkpoints import RunCheckpoints
from tinkex.types import (
    Datum,
    ForwardBackwardOutput,
    OptimParams,
    OptimStepResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)

logger = logging.getLogger(__name__)

Batch = Iterable[Datum]
#: Parameters of the optimizer: the same for every step, or a function of the step's index.
Schedule = Union[OptimParams, Callable[[int], OptimParams]]
#: Steps to be saved: every so many, or those for whose index a function returns True.
SaveAfter = Union[None, int, Callable[[int], bool]]


@dataclasses.dataclass(frozen=True)
class PipelineStep:
    """The results of one training step.

    Attributes:
        index: of the step, from 0.
        forward_backward, optim: what its two requests were answered.
    """

    index: int
    forward_backward: ForwardBackwardOutput
    optim: OptimStepResponse

    #: Set by the pipeline; no field, so that copies and pickles hold the results alone.
    _pipeline: ClassVar[Optional[Pipeline]] = None

    @property
    def metrics(self) -> Dict[str, float]:
        """The metrics of both."""
        return {**self.forward_backward.metrics, **(self.optim.metrics or {})}

    def save_state(
        self,
        name: str,
        ttl_seconds: Optional[int] = None,
        overwrite: bool = False,
        user_metadata: Optional[Mapping[str, str]] = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Queue saving weights and optimizer state as they are after this step; return at once.

        Arguments and result as for `TrainingClient.save_state`.

        Raises:
            InvalidInputError: a later step was submitted already, or the run was trained or loaded
                otherwise since, so that the checkpoint would hold that, too.  See *save_after* of
                `TrainingClient.pipeline`.
        """
        run = self._run_after_this("save_state")
        return run.save_state(name, ttl_seconds, overwrite, user_metadata)

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: Optional[int] = None,
        user_metadata: Optional[Mapping[str, str]] = None,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Like `save_state`, but for sampling: see `TrainingClient.save_weights_for_sampler`."""
        run = self._run_after_this("save_weights_for_sampler")
        return run.save_weights_for_sampler(name, ttl_seconds, user_metadata)

    def _run_after_this(self, what: str) -> RunCheckpoints:
        if self._pipeline is None:
            raise InvalidInputError(
                f"{what}: this copy of step {self.index} does not belong to a pipeline any more"
            )
        return self._pipeline.run_after(self.index, what)

    def __getstate__(self) -> Dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Step(NamedTuple):
    """A pass, and the optimizer step after it, that were handed to the run's lane."""

    forward_backward: APIFuture[ForwardBackwardOutput]
    optim: APIFuture[OptimStepResponse]

    def cancel_if_unsent(self) -> None:
        """Cancel both, unless the lane has begun the pass: then it needs its optimizer step."""
        if self.forward_backward.cancel_if_queued():
            self.optim.cancel()


def submit_step(
    forward_backward: Callable[[], APIFuture[ForwardBackwardOutput]],
    optim_step: Callable[[APIFuture[ForwardBackwardOutput]], APIFuture[OptimStepResponse]],
) -> Step:
    """Submit a pass and its optimizer step, or neither; *optim_step* is given the pass."""
    passed = forward_backward()
    try:
        passed.uncount()
        return Step(passed, optim_step(passed))
    except BaseException:
        passed.cancel()
        raise


class _Sent(NamedTuple):
    """A step under way."""

    number: int
    step: Step


class Pipeline(Iterator[PipelineStep]):
    """The iterator that `TrainingClient.pipeline` returns.  For one thread.

    Args:
        forward_backward: submits the pass over a batch.
        optim_step: submits the step with these parameters, after that pass.
        batches: taken as they are needed.
        schedule: returns the parameters of a step; raises if they are wrong.
        depth: steps under way at once.
        run: what saves the run that is trained.
        last_update: returns what identifies the last change of the run's weights that was queued.
        save_after: after these steps nothing is submitted until the next step is asked for.
    """

    def __init__(
        self,
        forward_backward: Callable[[Any], APIFuture[ForwardBackwardOutput]],
        optim_step: Callable[
            [OptimParams, APIFuture[ForwardBackwardOutput]], APIFuture[OptimStepResponse]
        ],
        batches: Iterable[Batch],
        schedule: Callable[[int], OptimParams],
        depth: int,
        run: RunCheckpoints,
        last_update: Callable[[], object],
        save_after: SaveAfter = None,
    ) -> None:
        if not isinstance(batches, Iterable):
            raise InvalidInputError(
                f"batches is of type {type(batches).__name__}; it must be an iterable of batches"
            )
        self._forward_backward = forward_backward
        self._optim_step = optim_step
        self._batches = enumerate(iter(batches))
        self._schedule = schedule
        self._depth = as_int("depth", depth, 1, text=False)
        self._run = run
        self._is_saved_after = _as_test(save_after)
        self._sent: Deque[_Sent] = collections.deque()
        self._newest = -1  # the last step that was submitted
        self._last_update = last_update
        self._newest_update = last_update()  # that of the newest step
        self._more = True
        self._ended = False

    def __iter__(self) -> Pipeline:
        return self

    def __next__(self) -> PipelineStep:
        """Submit what there is room for, and wait for the oldest step.

        What breaks in, Ctrl-C too, cancels what was not sent, and is raised; `drain` returns what
        was.
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
        """Wait for the steps that were sent, and return those not handed out yet.

        No more batches are taken.  Blocks; raises the first failure, and can be called again.
        """
        self._more = False
        steps: List[PipelineStep] = []
        while self._sent:
            try:
                steps.append(self._finish_oldest())
            except Exception as error:
                self._break_off(error)
                raise
        return steps

    def close(self) -> None:
        """Take no more batches, and cancel what was not sent; log what was.  Idempotent.

        What was sent is done by the server.  Does not block.
        """
        self._more = False
        self._cancel_unsent()
        if self._sent:
            logger.warning("the pipeline was closed: %s", self._describe_sent())
        self._sent.clear()

    def run_after(self, index: int, what: str) -> RunCheckpoints:
        """Return the run for *what*; InvalidInputError if more was submitted after step *index*."""
        if self._newest > index:
            later = (
                f"step {index + 1} was"
                if self._newest == index + 1
                else (f"steps {index + 1} to {self._newest} were")
            )
            raise InvalidInputError(
                f"{what}: {later} submitted before, so the checkpoint would not be that of step "
                f"{index}",
                hint="Say in advance which steps are saved: pipeline(..., save_after=100) for "
                "every hundredth, or save_after=lambda index: ...; or use depth=1.",
            )
        if self._last_update() is not self._newest_update:
            raise InvalidInputError(
                f"{what}: the run was trained or loaded outside of the pipeline after step "
                f"{index}, so the checkpoint would not be that of the step",
                hint=f"To save the run as it is now, call {what} of the training client.",
            )
        return self._run

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _fill(self) -> None:
        while self._more and len(self._sent) < self._depth:
            if self._sent and self._is_saved_after(self._newest):
                return  # until that step has been handed out, and the next one is asked for
            try:
                index, batch = next(self._batches)
            except StopIteration:
                self._more = False
                return
            try:
                params = self._schedule(index)  # before the pass is sent
                step = submit_step(
                    functools.partial(self._forward_backward, batch),
                    functools.partial(self._optim_step, params),
                )
            except TinkexError as error:
                _tell_step(error, index)
                raise
            self._sent.append(_Sent(index, step))
            self._newest, self._newest_update = index, self._last_update()

    def _finish_oldest(self) -> PipelineStep:
        number, (forward_backward, optim) = self._sent[0]
        try:
            step = PipelineStep(number, forward_backward.result(), optim.result())
            object.__setattr__(step, "_pipeline", self)
        except Exception as error:  # not Ctrl-C: the step goes on, and can be waited for
            self._sent.popleft()
            if isinstance(error, TinkexError):
                _tell_step(error, number)
            raise
        self._sent.popleft()
        return step

    def _break_off(self, error: BaseException) -> None:
        self._more = False
        self._ended = True
        self._cancel_unsent()
        logger.warning("the pipeline stops: %s; %s", type(error).__name__, self._describe_sent())

    def _cancel_unsent(self) -> None:
        """Cancel, from the last backward, the steps that the lane has not begun; forget them."""
        kept: Deque[_Sent] = collections.deque()
        for sent in reversed(self._sent):
            sent.step.cancel_if_unsent()
            if not sent.step.forward_backward.cancelled():
                kept.appendleft(sent)
        self._sent = kept

    def _describe_sent(self) -> str:
        if not self._sent:
            return "nothing else was sent"
        names = ", ".join(str(sent.number) for sent in self._sent)
        return f"sent before, and done by the server unless it fails: step {names}"


def _as_test(save_after: SaveAfter) -> Callable[[int], bool]:
    if save_after is None:
        return lambda index: False
    if callable(save_after):
        return save_after
    every = as_int("save_after", save_after, 1, text=False)
    return lambda index: (index + 1) % every == 0


def _tell_step(error: TinkexError, index: int) -> None:
    told = f"It was step {index} of the pipeline."
    error.hint = f"{error.hint} {told}" if error.hint else told
