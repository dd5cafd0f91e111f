"""Session: one live session on the server, as the clients that use it see it.

The session manager keeps it alive.  This module holds its counters, and explains the failures of
work whose session was lost.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from typing import TYPE_CHECKING, Optional

from tinkex._api.sessions import ask_for_session
from tinkex._runtime.single_flight import SingleFlight
from tinkex.config import Config
from tinkex.errors import (
    APIStatusError,
    ClientClosedError,
    RequestFailedError,
    ResultExpiredError,
    SessionLostError,
    TinkexError,
)

if TYPE_CHECKING:
    from tinkex._sessions.manager import SessionManager
    from tinkex._transport.transport import Transport

logger = logging.getLogger(__name__)

#: How a session may end.
STATUSES = ("success", "errored", "interrupted")

#: The HTTP statuses of a response about something that the server does not have (any more).
GONE = (404, 410)

#: When work fails, the server is asked whether the session still lives, with a timeout of
#: ASK_TIMEOUT_S seconds.  Without a response, it is not asked again for ASK_AGAIN_S seconds.
ASK_TIMEOUT_S, ASK_AGAIN_S = 2.0, 5.0

#: If many operations fail at once, each would ask.  After ALIVE_IN_A_ROW responses that the session
#: lives, each asked for less than a second after the one before, the latest response is trusted for
#: ALIVE_FOR_S seconds.
ALIVE_IN_A_ROW, ALIVE_FOR_S = 3, 0.2
_ROW_GAP_S = 1.0


class Session:
    """A live session.  Thread-safe.

    Args:
        config: the server, and the labels of the session.
        manager: keeps the session alive as long as this object is referenced.
        transport: used to ask the server whether the session still lives.
        session_id: a session that another process opened, to be kept alive but not ended here.

    The constructor blocks until the server has created the session, unless *session_id* is given.

    Raises:
        APIError: the session could not be created; nothing is left behind.

    Attributes:
        session_id: the server's id.
        owned: False if another process opened the session, and will end it.
        last_checkpoint: path of the checkpoint saved last, to resume from.
    """

    def __init__(
        self,
        config: Config,
        manager: SessionManager,
        transport: Transport,
        session_id: Optional[str] = None,
    ) -> None:
        self.manager = manager
        self.owned = session_id is None
        self.last_checkpoint: Optional[str] = None
        self._transport = transport
        # next() on a count is atomic; an id is used up even if its request fails.
        self._model_seq_ids = itertools.count()
        self._sampler_seq_ids = itertools.count()
        # One thread at a time asks the server whether the session lives; after a question without a
        # response, none asks before _ask_again_at.  _alive_at is when the latest question was sent
        # that found the session alive.
        self._asking: SingleFlight[None] = SingleFlight()
        self._alive_at = self._ask_again_at = 0.0
        self._alive_in_a_row = 0
        # The owner is given so that a client that is merely dropped ends its session, too.
        if session_id is None:
            session_id = manager.start_session(config, owner=self)
        else:
            manager.adopt_session(config, session_id, owner=self)
        self.session_id = session_id

    def next_model_seq_id(self) -> int:
        """Reserve the next ``model_seq_id`` of the session: 0, 1, ..."""
        return next(self._model_seq_ids)

    def next_sampler_seq_id(self) -> int:
        """Reserve the next ``sampling_session_seq_id`` of the session: 0, 1, ..."""
        return next(self._sampler_seq_ids)

    def stop(self, status: str, detail: Optional[str], *, timeout_s: float) -> None:
        """End the session; see `SessionManager.stop_session`."""
        self.manager.stop_session(self.session_id, status, detail, timeout_s=timeout_s)

    def explain(self, error: TinkexError) -> TinkexError:
        """Return the error to show for failed work: SessionLostError if the session was lost.

        Asks the server, and so blocks for a few seconds at most, if the work failed with status 404
        or 410, or after it was accepted.
        """
        if error.session_id is None:
            error.session_id = self.session_id
        if not isinstance(error, (APIStatusError, RequestFailedError, ResultExpiredError)):
            return error
        # Losing a session fails no work by itself; the server's response to the work does.  When it
        # arrives, the loss may still be unknown here: the next heartbeat may be seconds away.
        if error.status in GONE or isinstance(error, RequestFailedError):
            self._ask_after_failure()
        reason = self.manager.lost_reason(self.session_id)
        if reason is None:
            return error
        return SessionLostError(
            f"session {self.session_id} was lost ({reason}); then: {error.message}",
            status=error.status,
            request_id=error.request_id,
            session_id=self.session_id,
            hint=self._how_to_replace(),
        )

    def how_to_resume(self) -> str:
        """Return a sentence on how to resume a run that has failed."""
        last = self.last_checkpoint
        if last:
            return f"Resume with create_training_client_from_state_with_optimizer({last!r})."
        return "No checkpoint was saved by this client: start again, and call save_state regularly."

    def _how_to_replace(self) -> str:
        if self.owned:
            return f"Create a new ServiceClient. {self.how_to_resume()}"
        # Only the process that opened the session knows what was saved and where to resume.
        return (
            "Another process opened this session and has ended or lost it: have that process "
            "make a new sampler, and keep its ServiceClient open while the sampler is used."
        )

    def _ask_after_failure(self) -> None:
        """Ask whether the session still lives, unless it is known to be lost."""
        failed_at = time.monotonic()
        if self._alive_in_a_row >= ALIVE_IN_A_ROW and failed_at - self._alive_at < ALIVE_FOR_S:
            return
        # Up to twice: the first answer may be to another thread's question, which was sent before
        # this failure, when the session may still have been alive.
        for _ in range(2):
            lost = self.manager.lost_reason(self.session_id) is not None
            if lost or self._alive_at >= failed_at:
                return
            with contextlib.suppress(ClientClosedError):
                self._asking.run(self._ask_whether_gone, self._transport.closing)

    def _ask_whether_gone(self) -> None:
        """Send a heartbeat, and note whether the session is alive, gone, or not known to be."""
        asked_at = time.monotonic()
        # During an outage, thousands of failing futures would each wait for a timeout.
        if asked_at < self._ask_again_at:
            return
        try:
            ask_for_session(self._transport, self.session_id, timeout_s=ASK_TIMEOUT_S)
        except APIStatusError as error:
            if error.status in GONE:
                self._alive_in_a_row = 0
                self.manager.mark_lost(self.session_id, error.status)
                return
            self._note_no_response(error)
        except TinkexError as error:
            self._note_no_response(error)
        else:
            in_a_row = asked_at - self._alive_at < _ROW_GAP_S
            self._alive_in_a_row = self._alive_in_a_row + 1 if in_a_row else 1
            self._alive_at = asked_at

    def _note_no_response(self, error: TinkexError) -> None:
        logger.debug("cannot tell whether session %s lives: %s", self.session_id, error)
        self._alive_in_a_row = 0
        self._ask_again_at = time.monotonic() + ASK_AGAIN_S
