"""Connection: the session and the training client of a run, replaced after a lost session."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Callable, Optional

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex._runtime.numeric import as_int
from tinkex.errors import (
    APIError,
    APIStatusError,
    RequestFailedError,
    RunFolderError,
    SessionLostError,
    TinkexError,
)
from tinkex.runs.records import CheckpointRecord, RunRecord
from tinkex.runs.source import RunSource

if TYPE_CHECKING:
    from tinkex.clients.service import ServiceClient
    from tinkex.clients.training import TrainingClient

logger = logging.getLogger(__name__)

#: The longest pause before the next attempt to open a session, in seconds.
_MAX_PAUSE_S = 60.0


class Connection:
    """Starts the run on the server, from its newest checkpoint if it has one.  For one thread.

    Args:
        service: the caller's client; the caller closes it.
        source: what the run is made from.
        record: the record of the run.
        note: adds a line to the journal and to *record*, given its kind and facts.
        max_losses: how many sessions in a row may be lost without progress.

    Attributes:
        service, trainer: the current clients; `start` sets *trainer*.
        losses: how many sessions were lost, or could not be opened, since the last progress.
    """

    trainer: TrainingClient

    def __init__(
        self,
        service: ServiceClient,
        source: RunSource,
        record: RunRecord,
        note: Callable[..., None],
        max_losses: int,
    ) -> None:
        self.service = service
        self._source = source
        self._record = record
        self._note = note
        self._max_losses = as_int("max_session_losses", max_losses, 1, text=False)
        self.losses = 0
        self._owned: Optional[ServiceClient] = None
        # Taken from the caller's client: its replacements know an embedded server only by URL.
        self._server = service._local or {"base_url": service.config.base_url}

    def start(self) -> Optional[CheckpointRecord]:
        """Make the training client; return the checkpoint that it continues from, if any.

        Raises:
            RunFolderError: the run has checkpoints, but none of them can be loaded any more.
            TinkexError: the server could not be reached, or a request failed.
        """
        found = self._load_newest() if self._record.checkpoints else None
        if found is None:
            self.trainer = self._source.create(self.service)
        # Not before the client exists: this line drops everything after the checkpoint from the
        # record.
        self._note(
            "start",
            model_id=self.trainer.model_id,
            session_id=self.service.session_id,
            server={name: value for name, value in self._server.items() if value is not None},
            steps=found.steps if found else 0,
            path=found.path if found else None,
        )
        return found

    def replace_session(self, error: TinkexError) -> Optional[CheckpointRecord]:
        """Open another session and `start` in it; if that fails, try again after a pause.

        Raises:
            TinkexError: *error*, or the last failure, after *max_losses* attempts.
        """
        while self.losses < self._max_losses:
            pause_s = min(2.0**self.losses, _MAX_PAUSE_S) if self.losses else 0.0
            # Counted before the attempt, and reset only by a checkpoint: otherwise a server that
            # accepts sessions and loses them again would be tried for ever.
            self.losses += 1
            # Without the hint, which tells a program how to continue; here the run does it.
            logger.warning("continuing in a new session%s, after: %s", self._from(), error.message)
            time.sleep(pause_s)
            try:
                return self._start_anew()
            except (APIError, SessionLostError) as failure:
                error = failure
        raise error

    def _start_anew(self) -> Optional[CheckpointRecord]:
        """Open another session like the lost one, and `start` in it."""
        # Constructed by its type, because the module that defines it imports this one.
        lost = self.service
        fresh = type(lost)(config=lost.config, manager=lost._runtime.session.manager)
        fresh._runtime.ledger = lost._runtime.ledger  # a budget is for the run, not for a session
        # The caller closes the first client; we close its replacements.
        self.close("errored", "the session was lost")
        self.service = self._owned = fresh
        return self.start()

    def close(self, status: str = "success", detail: Optional[str] = None) -> None:
        """Close the training client, and the session unless it is the caller's; idempotent."""
        if hasattr(self, "trainer"):
            self.trainer.close()
        owned, self._owned = self._owned, None
        if owned is not None:
            owned.close(status, detail)

    def _from(self) -> str:
        """Say where a new session continues, for the log."""
        checkpoints = self._record.checkpoints
        return f" from step {checkpoints[-1].steps}" if checkpoints else " from the start"

    def _load_newest(self) -> CheckpointRecord:
        checkpoints = self._record.checkpoints[::-1]
        for checkpoint in checkpoints:
            try:
                self.trainer = self._source.restore(self.service, checkpoint.path)
            except (APIStatusError, RequestFailedError) as error:
                # A server that is down still has the checkpoint: skipping it would lose steps.
                if not _is_gone(error):
                    raise
                refusal: TinkexError = error
                logger.warning(
                    "the checkpoint of %d steps cannot be loaded, trying the one before it: %s",
                    checkpoint.steps,
                    error.message,
                )
            else:
                return checkpoint
        server = self._record.server
        if server is not None and server.base_url is None and server.data_dir is None:
            raise RunFolderError(
                f"none of the {len(checkpoints)} checkpoints of this run can be loaded: they were "
                "deleted, have expired, or were removed with the embedded server that the run was "
                "trained on, which had no data_dir",
                hint="Begin again in another folder, with ServiceClient.local(model, "
                "data_dir=...), which keeps them.",
            ) from refusal
        raise RunFolderError(
            f"the server has none of the {len(checkpoints)} checkpoints of this run",
            hint=ErrorText(
                "Is this the server that the run was trained on, with the same account?",
                Setting("data_dir", ..., aside=" (An embedded server keeps them only with {}.)"),
                " If they have expired, begin again in another folder.",
            ),
        ) from refusal


def _is_gone(error: TinkexError) -> bool:
    """Whether *error* means that the checkpoint is missing or unusable."""
    # A server may refuse a missing checkpoint at once, or accept the request and report later that
    # the work failed (docs/protocol.md, "Promises").
    return error.status in (404, 410) or (
        isinstance(error, RequestFailedError) and error.category == "user"
    )
