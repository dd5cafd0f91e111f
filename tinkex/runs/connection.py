"""Connection: the session and the training client of a run, and new ones in their place."""

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

#: The longest pause before another new session is tried, in seconds.
_MAX_PAUSE_S = 60.0


class Connection:
    """Starts the run on the server, from the newest checkpoint that it has.  For one thread.

    Args:
        service: of the caller, who closes it.
        source: what the run is made from.
        record: of the run.
        note: adds a line, of a kind and with facts, to the journal and to *record*.
        max_losses: how many sessions in a row may be lost without progress.

    Attributes:
        service, trainer: the clients; *trainer* is there after `start`.
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
        # Of the caller's client: those that replace it know an embedded server by its URL alone.
        self._server = service._local or {"base_url": service.config.base_url}

    def start(self) -> Optional[CheckpointRecord]:
        """Make the training client; return the checkpoint that it continues, if there is one.

        Raises:
            RunFolderError: the run has checkpoints, but the server has none of them any more.
            TinkexError: the server could not be asked, or has failed.
        """
        found = self._load_newest() if self._record.checkpoints else None
        if found is None:
            self.trainer = self._source.create(self.service)
        # Only once there is a client: the line drops what the record has beyond this checkpoint.
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
        """Open another session, and `start` in it; try again after a pause if that fails.

        Raises:
            TinkexError: *error*, or a later one, after *max_losses*.
        """
        while self.losses < self._max_losses:
            pause_s = min(2.0**self.losses, _MAX_PAUSE_S) if self.losses else 0.0
            # Counted before the attempt, and reset only by a checkpoint: a server that accepts
            # sessions and loses them again must not be tried for ever.
            self.losses += 1
            # Without the error's hint, which is for a program that continues by itself.
            logger.warning("continuing in a new session%s, after: %s", self._from(), error.message)
            time.sleep(pause_s)
            try:
                return self._start_anew()
            except (APIError, SessionLostError) as failure:
                error = failure
        raise error

    def _start_anew(self) -> Optional[CheckpointRecord]:
        """Open another session like the one that was lost, and `start` in it."""
        # By its type, because this module is imported by the one that defines it.
        lost = self.service
        fresh = type(lost)(config=lost.config, manager=lost._runtime.session.manager)
        fresh._runtime.ledger = lost._runtime.ledger  # a budget is for the run, not for a session
        # The first client is the caller's to close; those that have replaced it are closed here.
        self.close("errored", "the session was lost")
        self.service = self._owned = fresh
        return self.start()

    def close(self, status: str = "success", detail: Optional[str] = None) -> None:
        """Close the training client, and the session if it is not the caller's; idempotent."""
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
                # A server that is down still has the checkpoint: passing it over would lose steps.
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
                "Is it the server that the run was made on, with the same account?",
                Setting("data_dir", ..., aside=" (An embedded server keeps them only with {}.)"),
                " If they have expired, begin again in another folder.",
            ),
        ) from refusal


def _is_gone(error: TinkexError) -> bool:
    """Whether a checkpoint could not be loaded because of what it is, or because it is not."""
    # A server may refuse the missing checkpoint at once, or accept the request and report a failure
    # of the work later (docs/protocol.md, "Promises").
    return error.status in (404, 410) or (
        isinstance(error, RequestFailedError) and error.category == "user"
    )
