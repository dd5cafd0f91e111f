"""RunStep: one step of a run, as `Run.steps` and `Run.pipeline` yield it."""

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
    """One step of a run.  For one thread.

    Attributes:
        index: counts from 0 over the whole run, including the steps before it was continued.
        batch: the batch to train on.
        result: the results of the step's requests in a loop over `Run.pipeline`; otherwise None.

    With ``with step:`` around the loop's body, `open_run(on_session_loss="resume")` can continue
    after the session is lost: the SessionLostError ends the body, and the loop continues from the
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
        """A copy of the metrics logged for this step so far, as written to the journal."""
        return dict(self._metrics)

    def log(self, metrics: Optional[Mapping[str, Any]] = None, **more: Any) -> None:
        """Add metrics to this step's line in the journal.

        They are written when the step is done, or immediately if it is done already.

        Args:
            metrics, more: numbers (including those of numpy and torch), strings, booleans or None.

        Raises:
            InvalidInputError: a value has another type.
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
        # Keep the error for the run's generator: raised here, it would end the caller's `for` loop,
        # because a generator cannot catch what the loop's body raises.
        if self._resumes and isinstance(exc, SessionLostError):
            self._lost = exc
        return self._lost is not None

    def __repr__(self) -> str:
        return f"<RunStep {self.index}>"

    def _end(self) -> None:
        """Write the step's line, or raise the SessionLostError that ended the step.

        Raises:
            InvalidInputError: ``on_session_loss="resume"`` was given, but not ``with step:`` used.
        """
        if self._lost is not None:
            # Raised here, in the run's generator, which catches it (see `__exit__`).
            raise self._lost
        if self._resumes and not self._entered:
            raise InvalidInputError(
                "on_session_loss='resume' needs the body of the loop within `with step:`",
                hint="for step in run.steps(batches):\n      with step:\n          ...",
            )
        self._write()

    def _write(self) -> None:
        """Write the step's line with the metrics logged so far, unless it was written already."""
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
    # JSON has no NaN and no infinity: write them as text that float() can parse.
    return number if isinstance(number, int) or math.isfinite(number) else str(number)
