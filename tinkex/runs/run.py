"""Run: a training run with a folder, from which it continues after any interruption.

Used by one thread, and has none of its own: checkpoints are queued and checked between steps.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from pathlib import Path
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    Type,
    TypeVar,
    Union,
)

from tinkex._sessions.runtime import outcome_of
from tinkex.errors import (
    ClientClosedError,
    InvalidInputError,
    SessionLostError,
    TinkexError,
)
from tinkex.runs.batches import Batches, batches_from
from tinkex.runs.connection import Connection
from tinkex.runs.folder import RunFolder
from tinkex.runs.piped import PipedSteps
from tinkex.runs.records import CheckpointRecord
from tinkex.runs.saver import Place, SavePolicy, Saver, save_for_sampler
from tinkex.runs.sigterm import Sigterm
from tinkex.runs.source import RunSource, as_json
from tinkex.runs.step import RunStep

if TYPE_CHECKING:
    from tinkex._training.custom_loss import CustomLoss, LossHandle
    from tinkex.clients.pipeline import Schedule
    from tinkex.clients.service import ServiceClient
    from tinkex.clients.training import TrainingClient

logger = logging.getLogger(__name__)

B = TypeVar("B")


#: The arguments that `Run.pipeline` passes on, in the order of its parameters.
_PipelineArguments = Tuple[Any, Any, Any, int, Any]


class Run:
    """A training run in a folder, from `ServiceClient.open_run`, which documents the arguments.

    Use it as a context manager, in one thread.  At the end of the block, it saves the last step,
    unless that step failed or was left in the middle.

    Attributes:
        folder: the folder that holds its journal.
        record: the contents of the journal, kept up to date.
        config: the settings that `open_run` was given.
        state: a dict for your own JSON values, such as counters or the state of a random generator;
            it is saved with each checkpoint and restored from it.
        resumed_from: the checkpoint that the run was continued from; None if it began from scratch.
    """

    def __init__(
        self,
        service: ServiceClient,
        folder: Union[str, Path],
        source: RunSource,
        policy: SavePolicy,
        *,
        config: Optional[Mapping[str, Any]] = None,
        state: Optional[Mapping[str, Any]] = None,
        on_session_loss: str = "raise",
        max_session_losses: int = 5,
        exit_on_sigterm: bool = False,
        accept_changes: bool = False,
    ) -> None:
        if on_session_loss not in ("raise", "resume"):
            raise InvalidInputError(
                f"on_session_loss is {on_session_loss!r}; it must be 'raise' or 'resume'"
            )
        self.folder = Path(folder)
        self.config: Dict[str, Any] = as_json("config", dict(config or {}))
        self.state: Dict[str, Any] = {}
        self._first_state = as_json("state", dict(state or {}))
        self._resumes = on_session_loss == "resume"
        self._loops = 0  # loops begun so far
        self._running_loop: Optional[int] = None
        self._samplers = itertools.count(1)
        self._place = Place(0, 0, 0)
        self._current: Optional[_Current] = None
        self._piped: Optional[PipedSteps] = None
        self._failure: Optional[BaseException] = None  # raised by metrics, to be raised again
        self._closed = False
        with contextlib.ExitStack() as opened:
            # First, so that SIGTERM while a checkpoint loads raises SystemExit, which closes the
            # rest.
            self._sigterm = Sigterm()
            if exit_on_sigterm:
                self._sigterm.install()
                opened.callback(self._sigterm.uninstall)
            files = self._files = RunFolder(self.folder)
            opened.callback(files.close)
            self.record = files.record
            # Before any request is sent: the folder may hold another run.
            files.check(source.spec(self.record.spec), self.config, accept_changes)
            self._connection = Connection(
                service, source, self.record, files.note, max_session_losses
            )
            opened.callback(self._connection.close)
            self._saver = Saver(policy, self.record, files.note)
            self.resumed_from = self._connection.start()
            self._restore(self.resumed_from)
            self._opened = opened.pop_all()

    @property
    def service(self) -> ServiceClient:
        """The session to work in; replaced after a loss with ``on_session_loss="resume"``."""
        return self._connection.service

    @property
    def trainer(self) -> TrainingClient:
        """The client to train with; replaced together with `service`."""
        return self._connection.trainer

    @property
    def steps_done(self) -> int:
        """How many steps are done over the whole run, including those before it was continued."""
        return self._place.steps

    def steps(self, batches: Batches[B]) -> Iterator[RunStep[B]]:
        """Iterate over the remaining steps, one for each batch.

        A step is done when the loop takes the next one: then its line is written, and a checkpoint
        is queued if one is due.  A step that the loop leaves by ``break`` counts if an optimizer
        step was queued in it.  A program may have several such loops, one after the other: when the
        run is continued, loops that were finished before are empty.

        Args:
            batches: a sequence; a function that takes the number of batches to skip and returns an
                iterable of the rest; or an iterable, which is read from its start to where the run
                is.  The batches and their order must be the same each time the program runs.

        Raises:
            InvalidInputError: *batches* cannot be iterated over, or the loops are nested.
            RunFolderError: the journal cannot be written.
            TinkexError: a checkpoint could not be saved.
            SystemExit: with *exit_on_sigterm*, after the step in which SIGTERM arrived.
        """
        return self._loop(batches, None)

    def pipeline(
        self,
        batches: Batches[Any],
        loss_fn: Union[str, CustomLoss, LossHandle],
        adam_params: Schedule,
        loss_fn_config: Optional[Mapping[str, Union[float, str]]] = None,
        *,
        depth: int = 2,
        metrics: Optional[Callable[[RunStep[Any]], Mapping[str, Any]]] = None,
    ) -> Iterator[RunStep[Any]]:
        """Train like `TrainingClient.pipeline`, and iterate over the finished steps like `steps`.

        Each step has a ``result``, whose metrics are logged.  *adam_params* may be a function of
        the step's index in the whole run.  Checkpoints are exact at any *depth*, and do not drain
        the pipeline.  If the loop is left early, the run waits for the submitted steps when it is
        closed, or when the next loop begins.

        Args:
            batches: as for `steps`; each is a batch for `TrainingClient.pipeline`.
            loss_fn, adam_params, loss_fn_config, depth: as for `TrainingClient.pipeline`.
            metrics: returns additional metrics to log for a step, given the step with its batch and
                result.  Called for every finished step, including steps that the loop did not get
                to see because it was left, e.g. by Ctrl-C.  If it raises, the step is logged
                without them, and the error is raised again once the submitted steps are done and
                saved.
        """
        arguments = (loss_fn, adam_params, loss_fn_config, depth, metrics)
        return self._loop(batches, arguments)

    def save_for_sampler(self) -> str:
        """Save the current weights for sampling, without a time to live; return the path.  Blocks.

        The journal records them as `RunRecord.sampler`.  If a loop was left within a step, that
        step counts if it has trained; steps that a pipeline has submitted are waited for.

        Raises:
            InvalidInputError: called within a loop over `pipeline`, whose next steps have already
                been submitted, or within a step that has trained; or a step was left half done.
            TinkexError: the weights could not be saved.
        """
        self._ensure_open()
        if self._running_loop is None:
            self._settle_before()
        elif self._piped is not None or self._has_trained():
            raise InvalidInputError(
                f"save_for_sampler was called within step {self._place.steps}",
                hint="Call it after the loop. (A loop that was left keeps running while a "
                "variable holds its iterator: close() the iterator.)",
            )
        steps = self._place.steps
        path = save_for_sampler(self.trainer, f"sampler-{steps}-{next(self._samplers)}")
        self._files.note("sampler", path=path, steps=steps)
        return path

    def close(self) -> None:
        """Save the last step, and close the journal, the folder and the training client.

        Idempotent.  Blocks.  Raises TinkexError if the step could not be saved; the run is closed
        all the same.
        """
        self._close(None)

    def __enter__(self) -> Run:
        self._ensure_open()
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self._close(exc)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Run {self.folder}, {self._place.steps} steps done, {state}>"

    # Opening and closing

    def _close(self, error: Optional[BaseException]) -> None:
        if self._closed:
            return
        self._closed = True
        # SIGTERM takes effect after the last step is saved and the folder and handler are released.
        with self._sigterm.held(), self._opened:
            try:
                if error is None:
                    self._save_last(may_count=True)
                elif self._may_save_after(error):
                    try:
                        self._save_last(may_count=False)
                    except TinkexError as failure:  # *error* is the one to raise
                        logger.warning("the last step was not saved: %s", failure.message)
            finally:
                # Before the session ends, because its deletions are still in flight there.
                self._saver.close()
                cause = self._failure if error is None else error
                self._connection.close(*outcome_of(None if cause is None else type(cause)))
            if error is None:
                self._raise_failure()

    def _may_save_after(self, error: BaseException) -> bool:
        """Whether we still know, after *error*, which steps the server has done."""
        if self._sigterm.is_forced:
            return False
        # An error of the server or the network may have lost any of the requests that were sent;
        # Ctrl-C and errors of the caller's own code lose none.
        by_metrics = self._piped is not None and error is self._piped.failure
        return by_metrics or not isinstance(error, TinkexError)

    def _save_last(self, *, may_count: bool) -> None:
        """Save all finished steps if a checkpoint would hold exactly those.

        *may_count* as for `_settle`.
        """
        if self._settle(may_count=may_count) and self._saver.can_save():
            place = self._place
            try:
                self._saver.save_now(place, self.state, for_good=True)
            except SessionLostError as error:
                # Continue from the newest checkpoint.  If it includes all steps, it only has to be
                # saved again, without a time to live.
                self._resume(error)
                if self._place != place:  # the loops are over, so no loop can repeat the lost steps
                    raise
                self._saver.save_now(place, self.state, for_good=True)
        else:
            self._saver.finish_pending()
            logger.warning(
                "%s was left within a step, which is not saved; the run continues from step %d",
                self.folder,
                self.record.checkpoints[-1].steps if self.record.checkpoints else 0,
            )

    def _ensure_open(self) -> None:
        if self._closed:
            raise ClientClosedError(f"{self!r} was closed", hint="Open the folder again.")

    def _write_step(self, index: int, metrics: Dict[str, Any]) -> None:
        self._files.note("step", step=index, metrics=metrics)
        self._saver.steps_written = max(self._saver.steps_written, index + 1)

    # Loops

    def _loop(
        self, batches: Batches[B], pipeline: Optional[_PipelineArguments]
    ) -> Iterator[RunStep[B]]:
        """Return an iterator that begins a loop and yields its remaining steps."""
        self._ensure_open()
        # Checked here, because the generator runs only when the first step is taken.
        if self._resumes and isinstance(batches, Iterator):
            raise InvalidInputError(
                "batches is an iterator, which cannot be read again after a lost session",
                hint="Give a sequence, or a function of the number of batches to skip.",
            )
        return self._iterate(batches, pipeline)

    def _iterate(
        self, batches: Batches[B], pipeline: Optional[_PipelineArguments]
    ) -> Iterator[RunStep[B]]:
        self._settle_before()
        loop, self._loops = self._loops, self._loops + 1
        # Within a step, SIGTERM only sets a flag, which `_walk` checks between steps.
        with self._sigterm.held(), self._running(loop):
            while loop >= self._place.loop:  # otherwise it was done before the run was continued
                if loop > self._place.loop:
                    self._place = Place(self._place.steps, loop, 0)
                try:
                    steps = self._walk(batches, loop)
                    for step in steps if pipeline is None else self._pipe(steps, pipeline):
                        yield step
                        # Write the step's line before `_advance` queues a checkpoint that includes
                        # the step: a run that continues from the checkpoint never writes the line.
                        # In a pipeline, where checkpoints are queued earlier, `Saver.after_step`
                        # waits for the line.
                        step._end()
                    self._piped = None
                    if self._resumes:  # so that a loss in the next loop does not lead back to this
                        self._saver.save_now(self._place, self.state, for_good=False)
                except SessionLostError as error:
                    self._resume(error)  # sets the place, perhaps to one in an earlier loop
                    continue
                return

    @contextlib.contextmanager
    def _running(self, loop: int) -> Iterator[None]:
        self._running_loop = loop
        try:
            yield
        finally:
            if self._running_loop == loop:  # otherwise another loop has begun since
                self._running_loop = None

    def _walk(self, batches: Batches[B], loop: int) -> Iterator[RunStep[B]]:
        """Yield a step per batch.  When the next is taken, a step is done, or at least queued."""
        for batch in batches_from(batches, self._place.batch):
            if self._sigterm.requested:
                return
            step = RunStep(self._place.steps, batch, self._write_step, self._resumes)
            # If the training run's last update is a different object later, the step has trained.
            self._current = _Current(step, self.trainer._run.last_update)
            yield step
            if self._place.loop != loop:
                raise InvalidInputError("loops over the steps of a run cannot be nested")
            self._advance()

    def _pipe(self, steps: Iterator[RunStep[B]], arguments: _PipelineArguments) -> PipedSteps:
        self._piped = PipedSteps(steps, self.trainer, self._place, *arguments)
        return self._piped

    def _advance(self) -> None:
        """Count a step that is done or completely queued; save if a checkpoint is due."""
        self._current = None
        self._place = self._place.after(1)
        if self._saver.after_step(self._place, self.state):
            self._connection.losses = 0  # count only sessions that were lost without progress

    def _has_trained(self) -> bool:
        """Whether the loop's current step has changed the weights."""
        current = self._current
        return current is not None and current.last_update is not self.trainer._run.last_update

    def _settle_before(self) -> None:
        """Complete the step or the pipeline that the previous loop left behind.

        Raises:
            InvalidInputError: a step was left half done.
            BaseException: the error that `metrics` raised for one of the pipeline's steps.
        """
        if not self._settle(may_count=True):
            raise InvalidInputError(
                "the previous step was left half done",
                hint="Close the run and open it again: it continues from its last checkpoint.",
            )
        self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _settle(self, *, may_count: bool) -> bool:
        """Complete the step or pipeline that a loop left; return False if a step is half done.

        Args:
            may_count: count a step that has changed the weights as done.  False after an error:
                such a step is then half done.
        """
        piped = self._piped
        if piped is not None:
            self._current = None  # the pipeline knows whether that step was submitted
            raised = piped.failure
            if not piped.drain():
                return False
            self._piped = None
            self._place = piped.place
            # A failure from before was raised by the loop already.
            self._failure = piped.failure if raised is None else None
        current, self._current = self._current, None
        run = self.trainer._run
        if current is None or (current.last_update is run.last_update and not run.has_gradient):
            return True
        # After an error, the rest of the step's body did not run; and a checkpoint does not include
        # the gradient.
        if not may_count or run.has_gradient:
            return False
        current.step._end()
        self._advance()
        return True

    def _resume(self, error: SessionLostError) -> None:
        """Continue in a new session; raise *error* if that is not wanted or fails repeatedly."""
        if not self._resumes:
            raise error
        with self._sigterm.released():  # without a session there is nothing to save
            found = self._connection.replace_session(error)
        self._restore(found)

    def _restore(self, checkpoint: Optional[CheckpointRecord]) -> None:
        """Set the place and the state to those of *checkpoint*, or of the start if it is None."""
        self._current = self._piped = None
        # Update the dict in place, because the caller may hold it; copy the values, because a later
        # loss needs them as they were saved.
        self.state.clear()
        if checkpoint is None:
            self._place = Place(0, 0, 0)
            self.state.update(copy.deepcopy(self._first_state))
        else:
            self._place = Place(checkpoint.steps, checkpoint.loop, checkpoint.batch)
            self.state.update(copy.deepcopy(checkpoint.state))
        self._saver.start(self.service, self.trainer, self._place.steps)


class _Current(NamedTuple):
    """The current step of a loop, and the training run's last update before it."""

    step: RunStep[Any]
    last_update: object
