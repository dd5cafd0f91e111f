"""Saver: queues a run's checkpoints when they are due, and drops older ones."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional

from tinkex._runtime.numeric import as_int, as_seconds
from tinkex._training.checks import check_ttl
from tinkex.errors import (
    APIError,
    ConflictError,
    InvalidInputError,
    NotFoundError,
    RequestFailedError,
    ResponseDecodeError,
)
from tinkex.futures import APIFuture, discard
from tinkex.runs.records import RunRecord
from tinkex.runs.source import as_json

if TYPE_CHECKING:
    from tinkex.clients.service import ServiceClient
    from tinkex.clients.training import TrainingClient

logger = logging.getLogger(__name__)

#: The run stops when this many saves in a row have failed.
_MAX_FAILURES = 3

#: How long closing waits for older checkpoints to be deleted, in seconds.
_DELETE_S = 5.0


@dataclasses.dataclass(frozen=True)
class SavePolicy:
    """When a run saves by itself, and what it keeps; see `ServiceClient.open_run`.

    Raises:
        InvalidInputError: a value is out of range.
    """

    every: Optional[int]
    minutes: Optional[float]
    ttl_seconds: Optional[int]
    keep: Optional[int]

    def __post_init__(self) -> None:
        for name, argument in (("every", "save_every"), ("keep", "keep")):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_int(argument, value, 1, text=False))
        minutes = as_seconds("save_minutes", self.minutes)
        if minutes is not None and minutes <= 0:
            raise InvalidInputError(f"save_minutes is {self.minutes!r}; it must be positive")
        object.__setattr__(self, "minutes", minutes)
        check_ttl(self.ttl_seconds)

    def is_due(self, steps: int, elapsed_s: float) -> bool:
        """Whether to save now, *steps* steps and *elapsed_s* seconds after the last checkpoint."""
        if self.every is not None and steps >= self.every:
            return True
        return self.minutes is not None and steps > 0 and elapsed_s >= self.minutes * 60


class Place(NamedTuple):
    """Where a run is: *steps* are done, and the next step takes batch *batch* of loop *loop*."""

    steps: int
    loop: int
    batch: int

    def after(self, steps: int) -> Place:
        """Return the place *steps* further on in the same loop."""
        return Place(self.steps + steps, self.loop, self.batch + steps)


class _Save(NamedTuple):
    """A checkpoint in flight."""

    future: APIFuture[Any]
    name: str
    place: Place
    state: Dict[str, Any]
    ttl_seconds: Optional[int]
    failed_updates: int


class Saver:
    """Saves a run, one checkpoint at a time.  For one thread.

    Args:
        policy: when to save, and what to keep.
        record: the record of the run.
        note: adds a line to the journal and to *record*, given its kind and facts.

    Attributes:
        steps_written: how many steps have a line in the journal.
    """

    def __init__(self, policy: SavePolicy, record: RunRecord, note: Callable[..., None]) -> None:
        self._policy = policy
        self._record = record
        self._note = note
        self._pending: Optional[_Save] = None
        self._deletions: List[APIFuture[None]] = []
        self._counter = itertools.count(1)
        self._failures = 0

    def start(self, service: ServiceClient, trainer: TrainingClient, steps: int) -> None:
        """From now on, save *trainer*, which has done *steps*; forget any checkpoint in flight."""
        self._trainer = trainer
        self._rest = service.create_rest_client()
        if self._pending is not None:
            discard([self._pending.future])  # otherwise its failure would be logged as unretrieved
        self._pending = None
        self._deletions = []
        self._saved_steps = self.steps_written = steps
        self._saved_at = time.monotonic()

    def after_step(self, place: Place, state: Dict[str, Any]) -> bool:
        """Queue a checkpoint of *place* if one is due and possible.

        Does not block: if another checkpoint is in flight, the new one is queued after a later
        step.

        Returns:
            Whether an earlier checkpoint was finished.

        Raises:
            TinkexError: saving has failed repeatedly, or the session has ended.
        """
        finished = self._can_finish() and self.finish()
        elapsed_s = time.monotonic() - self._saved_at
        due = self._policy.is_due(place.steps - self._saved_steps, elapsed_s)
        if due and self._pending is None and self.can_save():
            self._queue(place, state, self._policy.ttl_seconds)
        return finished

    def _can_finish(self) -> bool:
        """Whether the checkpoint in flight is done and the lines of all its steps are written.

        A run that continues from a checkpoint never writes the lines of its steps.
        """
        save = self._pending
        return save is not None and save.future.done() and save.place.steps <= self.steps_written

    def can_save(self) -> bool:
        """Whether a checkpoint would include all work so far.

        A checkpoint does not include a gradient; and a failure that the caller has not read yet may
        mean that part of a step was not done.
        """
        run = self._trainer._run
        return not (run.has_gradient or run.has_unread_failure)

    def save_now(self, place: Place, state: Dict[str, Any], *, for_good: bool) -> None:
        """Wait for the checkpoint in flight; then save *place*, unless it is saved, and wait.

        Args:
            for_good: save it without a time to live.

        Raises:
            TinkexError: the checkpoint could not be saved.
        """
        if self._pending is not None:
            self.finish()
        if not self._is_saved(place, for_good):
            self._failures = _MAX_FAILURES  # raise the first failure: no later step tries again
            self._queue(place, state, None if for_good else self._policy.ttl_seconds)
            self.finish()

    def finish_pending(self) -> None:
        """Wait for the checkpoint in flight, if there is one and all its steps are written.

        Raises:
            TinkexError: as `finish`.
        """
        if self._pending is not None and self._pending.place.steps <= self.steps_written:
            self.finish()

    def finish(self) -> bool:
        """Wait for the checkpoint in flight, record it, and drop older ones; False if it failed.

        Raises:
            TinkexError: saving has failed repeatedly, or the session has ended.
        """
        save, self._pending = self._pending, None
        assert save is not None
        try:
            path = self._path_of(save)
        # Not SessionLostError: in a lost session, no later attempt can succeed.
        except (APIError, RequestFailedError) as error:
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                raise
            logger.warning(
                "the checkpoint of %d steps was not saved; trying again after the next step: %s",
                save.place.steps,
                error,
            )
            self._saved_steps = -1  # due again after the next step
            return False
        self._failures = 0
        if self._trainer._run.failed_updates != save.failed_updates:
            # A request ahead of it in the queue failed, so it lacks a step that `place` counts.
            logger.info("dropping %s: a request before it has failed", path)
            self._delete(path)
            return False
        # Record it only once it is saved, and drop older ones only after that: whenever the process
        # is killed, the newest checkpoint in the journal exists on the server.
        self._note(
            "checkpoint",
            path=path,
            **save.place._asdict(),
            state=save.state,
            ttl_seconds=save.ttl_seconds,
        )
        self._drop_old()
        return True

    def close(self) -> None:
        """Wait a few seconds for the deletions in flight."""
        wait(self._deletions, _DELETE_S)
        self._read_deletions()

    def _is_saved(self, place: Place, for_good: bool) -> bool:
        newest = self._record.checkpoints[-1] if self._record.checkpoints else None
        if newest is None:
            # A run without steps needs no checkpoint: it starts again with the same weights
            # (`RunSource.spec`).
            return place.steps == 0
        same = (newest.steps, newest.loop, newest.batch) == place
        # A checkpoint saved for good must not expire while the run is closed, so one with a time to
        # live is saved again without.
        return same and not (for_good and newest.ttl_seconds is not None)

    def _queue(self, place: Place, state: Dict[str, Any], ttl_seconds: Optional[int]) -> None:
        """Queue a checkpoint behind all requests that the run has queued so far."""
        # With a counter, because each name is used only once: see `_path_of`.
        name = f"autosave-{place.steps}-{next(self._counter)}"
        # Read before queueing: if a request ahead in the queue fails later, the count changes.
        failed_updates = self._trainer._run.failed_updates
        future = self._trainer.save_state(name, ttl_seconds)
        # Copy the state, because the loop may change it while the server saves.
        state = as_json("run.state", state)
        self._pending = _Save(future, name, place, state, ttl_seconds, failed_updates)
        self._saved_steps, self._saved_at = place.steps, time.monotonic()

    def _path_of(self, save: _Save) -> str:
        try:
            path: str = save.future.result().path
        except (ConflictError, RequestFailedError):
            # Each name is used only once, so if it exists, it is this very checkpoint: the response
            # to the first attempt was lost.
            for found in self._rest.list_checkpoints(self._trainer.model_id).result().checkpoints:
                if found.checkpoint_id.endswith(f"weights/{save.name}") and found.tinker_path:
                    return found.tinker_path
            raise
        return path

    def _drop_old(self) -> None:
        """Delete all but the newest checkpoints, after removing them from the record."""
        keep = self._policy.keep
        for old in self._record.checkpoints[:-keep] if keep is not None else ():
            # In this order, a crash in between leaves a checkpoint that is never used; in the other
            # order, it would leave a record of a checkpoint that is gone.
            self._note("gone", path=old.path)
            self._delete(old.path)

    def _delete(self, path: str) -> None:
        self._read_deletions()
        self._deletions.append(self._rest.delete_checkpoint_from_tinker_path(path))

    def _read_deletions(self) -> None:
        """Log failed deletions.  Those checkpoints expire, if they have a time to live."""
        for deletion in [future for future in self._deletions if future.done()]:
            self._deletions.remove(deletion)
            error = deletion.exception()
            if error is not None and not isinstance(error, NotFoundError):
                logger.info("an older checkpoint was not deleted: %s", error)


def save_for_sampler(trainer: TrainingClient, name: str, ttl_seconds: Optional[int] = None) -> str:
    """Save the weights of *trainer* as *name* for sampling; return the path.  Blocks.

    Raises:
        TinkexError: the weights could not be saved.
    """
    path = trainer.save_weights_for_sampler(name, ttl_seconds).result().path
    if path is None:
        raise ResponseDecodeError("the server saved weights for sampling, but named no path")
    return path
