"""RunStep: one step of a run, as the loop over `Run.steps` gets it."""

from __future__ import annotations

import math
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Dict, Generic, Mapping, Optional, Type, TypeVar

from tinkex._runtime.numeric import to_float
from tinkex.errors import InvalidInputError, SessionLostError

if TYPE_CHECKING:
    from tinkex.clients.pipeline import PipelineStep

B = TypeVar("B")


class RunStep(Generic[B]):
    """One step.  For one thread.

    Attributes:
        index: from 0, over the whole run, also after it was continued.
        batch: what the loop trains on.
        result: from `Run.pipeline`, the results of its requests; else None.

    ``with step:`` around the loop's body lets `open_run(on_session_loss="resume")` continue after
    the loss of the session: the SessionLostError ends the body, and the loop continues from the
    last checkpoint.
    """

    def __init__(
        self, index: int, batch: B, log: Callable[[int, Dict[str, Any]], None], resumes: bool
    ) -> None:
        self.index = index
        self.batch = batch
        self.result: Optional[PipelineStep] = None
        self._log = log
        self._resumes = resumes
        self._metrics: Dict[str, Any] = {}
        self._written = False
        self._entered = False
        self._lost: Optional[SessionLostError] = None

    @property
    def metrics(self) -> Dict[str, Any]:
        """What was logged for this step so far, as the journal has it."""
        return dict(self._metrics)

    def log(self, metrics: Optional[Mapping[str, Any]] = None, **more: Any) -> None:
        """Have the journal hold these metrics of this step, with those logged before.

        They are written when the step is done, or immediately if it is already.

        Args:
            metrics, more: numbers, also of numpy or torch; strings, booleans or None.

        Raises:
            InvalidInputError: a value is something else.
            RunFolderError: the journal cannot be written.
        """
        given = {**(metrics or {}), **more}
        found = {str(name): _metric(name, value) for name, value in given.items()}
        self._metrics.update(found)
        if self._written:
            self._log(self.index, found)

    def __enter__(self) -> RunStep[B]:
        self._entered = True
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> bool:
        # The error is kept for the run's loop: raised here, it would end the caller's `for` loop,
        # since a generator cannot catch what the body of the loop raises.
        if self._resumes and isinstance(exc, SessionLostError):
            self._lost = exc
        return self._lost is not None

    def __repr__(self) -> str:
        return f"<RunStep {self.index}>"

    def _end(self) -> None:
        """Write the step with what was logged so far; raise the SessionLostError that ended it.

        Raises:
            InvalidInputError: ``on_session_loss="resume"`` needs ``with step:``.
        """
        if self._lost is not None:
            # Here it is raised within the run's generator, which can catch it (see `__exit__`).
            raise self._lost
        if self._resumes and not self._entered:
            raise InvalidInputError(
                "on_session_loss='resume' needs the body of the loop within `with step:`",
                hint="for step in run.steps(batches):\n      with step:\n          ...",
            )
        self._write()

    def _write(self) -> None:
        """Write the step with what was logged so far, once."""
        if not self._written:
            self._written = True
            self._log(self.index, self.metrics)


def _metric(name: object, value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    number = to_float(value, text=False)
    if not isinstance(number, (int, float)):
        raise InvalidInputError(
            f"the metric {name!r} is of type {type(value).__name__}; it must be a number or text"
        )
    # JSON has no NaN and no infinity: they are written as text, which float() reads.
    return number if isinstance(number, int) or math.isfinite(number) else str(number)
