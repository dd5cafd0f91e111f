"""SequenceRules: which ``seq_id`` each request of a training run gets, as a pure state machine.

Servers differ in what a ``seq_id`` means; these rules fit all known servers (docs/protocol.md,
"Sequence numbers"):

1. A ``seq_id`` is assigned when a request is sent.  The numbers are consecutive, because some
   servers wait for a missing one.  Input that the client itself rejects uses no ``seq_id``.
2. A request that the server has read has used its ``seq_id``, even if the server then refused it
   (400, 404, 409, 410, 422).
3. A request that was rejected unread (no connection, 401, 429 and the like) leaves its ``seq_id``
   to the next request.  If that gets 409, the ``seq_id`` was used after all, and the request is
   sent again under the next ``seq_id``.
4. A request that may have been executed although no response says so (the connection broke, or any
   5xx but 501) keeps its ``seq_id``: some servers look only at the ``seq_id``, and would return the
   first result for a different body.  Making the same call again sends the same body, which is
   executed only once; any other call first resends the lost request.  If the server responds with
   500 once more, the lost request is abandoned, and its ``seq_id`` is filled by a forward pass over
   one token, which has no effect.  Whichever of the two the server executes, the ``seq_id`` is then
   used.
5. Some servers do not count a failed request, and refuse the requests after it: "expected 20, got
   21".  The refused requests were not executed.  Once nothing is in flight, they are resent in the
   same order, starting at the ``seq_id`` that the server expects.
6. "expected 22, got 21" means that an earlier attempt at 21 was executed and its response was lost:
   the work is done, and only its result is gone.
7. If the server expects a ``seq_id`` whose work is known to be done, it has lost the state of the
   run, and nothing is resent.

Each event is a method call, and the method returns what to do about it.  No threads, no I/O:
`tinkex._training.run_queue` sends, and holds its lock around each call.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
import re
from typing import Any, Dict, Generic, List, NamedTuple, Optional, Protocol, TypeVar

from tinkex.errors import (
    APIConnectionError,
    APIStatusError,
    ConflictError,
    RequestFailedError,
    ResponseDecodeError,
    RouteMissingError,
)

#: Statuses that show that the server has read the request, so that its seq_id is used.  So does
#: 409, which has its own outcome.
_READ = (400, 404, 410, 422)

#: Statuses of a request that was rejected unread.  Like 5xx, they do not show whether an earlier
#: attempt, whose response was lost, was executed.
_UNREAD = (401, 402, 403, 408, 429)

_CONFLICT = re.compile(r"expected (\d+), got (\d+)")


class Outcome(enum.Enum):
    """What a failure to send a request means for the ``seq_id`` that it was sent under."""

    NOT_SENT = "nothing was sent, or the server has no such route"
    REFUSED = "the server has read the request, and refused it"
    CONFLICT = "the server knows the seq_id already"
    UNREAD = "this attempt was not read, but an earlier one may have been"
    NOT_ACCEPTED = "no attempt was accepted, and none will be"
    UNKNOWN = "it may have been executed"
    CRASHED = "like UNKNOWN, with a plain 500"
    UNREADABLE = "it was accepted, with a response that cannot be read"


class Action(enum.Enum):
    """What to do about a failed request."""

    REPORT = "fail it with its own error"
    SEND_AGAIN = "send it under the next seq_id, now"
    RESEND_LATER = "keep it for take_resends"
    REPORT_DONE = "fail it: an earlier attempt was executed, and the result is gone"
    REPORT_LOST_RUN = "fail it: the server has lost the state of the run"


class LostAction(enum.Enum):
    """What to do if the lost request could not be resent."""

    CONTINUE = "send the request that waits for it: the outcome of the lost one is known"
    FILL = "use its seq_id for something that has no effect"
    REPORT = "fail the request that waits for it"


class Message(Protocol):
    """An HTTP request, as far as the rules compare it."""

    @property
    def path(self) -> str:
        """The route."""

    @property
    def body(self) -> Any:
        """The body, compared by ``==``."""


R = TypeVar("R")
M = TypeVar("M", bound=Message)


@dataclasses.dataclass(frozen=True)
class Lost(Generic[R, M]):
    """A request that may have been executed although no response says so (rule 4).

    Attributes:
        filler_sent: whether a filler was sent under its ``seq_id`` and may have been executed.
    """

    request: R
    message: M
    seq_id: int
    filler_sent: bool = False


class _Refused(NamedTuple):
    """A request that was refused for its seq_id, and the seq_id that was expected (rule 5)."""

    request: Any
    seq_id: int
    expected: int


class SequenceRules(Generic[R, M]):
    """The state of one run's sequence numbers.  Not thread-safe; requests must be hashable.

    Attributes:
        next_seq_id: the ``seq_id`` of the next request.
        lost: the request whose outcome is unknown, if any; it keeps its ``seq_id``.
    """

    def __init__(self, first_seq_id: int = 1) -> None:
        self.next_seq_id = first_seq_id
        self.lost: Optional[Lost[R, M]] = None
        self._sent: Optional[M] = None  # the message of the request that is being sent
        self._last_rejected = False  # the last attempt at next_seq_id was rejected unread: rule 3
        self._in_flight: Dict[R, int] = {}  # accepted and not settled, with their seq_ids
        self._refused: List[_Refused] = []
        self._done_seq_id = first_seq_id - 1  # the highest seq_id whose work is known to be done
        self._expected_seq_id = 0  # reported by the server, not adopted yet; 0 if none

    @property
    def in_flight(self) -> bool:
        """Whether any request is accepted and not settled."""
        return bool(self._in_flight)

    @property
    def has_refused(self) -> bool:
        """Whether requests must be resent once nothing is in flight."""
        return bool(self._refused)

    # Sending, one request after the other

    def begin(self) -> int:
        """Begin to send a request, and return its ``seq_id``."""
        self._sent = None
        return self.next_seq_id

    def before_send(self, message: M) -> Optional[M]:
        """Return what to send for *message*, which belongs to the request begun last.

        If the lost message has the same body, it is returned instead, with its own key.  None means
        that the lost request must be resent first: its ``seq_id`` must not get another body.
        """
        lost = self.lost
        # Compared by route and body alone: each message has a new idempotency key, but the lost
        # message must be resent under its own.
        if lost is None:
            self._sent = message
        elif (message.path, message.body) == (lost.message.path, lost.message.body):
            self._sent = lost.message
        else:
            return None
        return self._sent

    def accepted(self, request: R, seq_id: int) -> None:
        """Note that the server has accepted *request*, sent under *seq_id*."""
        self._use(seq_id)
        self._in_flight[request] = seq_id

    def send_failed(self, request: R, seq_id: int, outcome: Outcome) -> Action:
        """Note that *request*, sent under *seq_id*, was not accepted, or not readably."""
        if outcome is Outcome.NOT_SENT:
            return Action.REPORT
        if outcome in (Outcome.REFUSED, Outcome.UNREADABLE):  # rule 2
            self._use(seq_id)
            return Action.REPORT
        if outcome is Outcome.CONFLICT:
            was_lost, was_rejected = self.lost is not None, self._last_rejected
            self._use(seq_id)  # a 409 shows that the seq_id is taken, by whatever request
            if was_lost:  # it had the same body, so this very request has used the seq_id
                return Action.REPORT_DONE
            return Action.SEND_AGAIN if was_rejected else Action.REPORT  # rule 3
        # The seq_id stays free.  If the next request gets 409, it was used after all (rule 3).
        self._last_rejected = True
        # If a filler may have used the seq_id, no failure of the lost request itself can show that
        # the seq_id is free.
        filler_sent = self.lost is not None and self.lost.filler_sent
        if outcome in (Outcome.UNKNOWN, Outcome.CRASHED):  # rule 4
            if self._sent is not None:
                self.lost = Lost(request, self._sent, seq_id, filler_sent)
        elif outcome is Outcome.NOT_ACCEPTED and not filler_sent:
            self.lost = None
        return Action.REPORT

    def lost_accepted(self) -> None:
        """Note that the server has accepted the lost request, or its filler."""
        assert self.lost is not None
        self._use(self.lost.seq_id)

    def lost_failed(self, outcome: Outcome, expected: Optional[int] = None) -> LostAction:
        """Note that resending the lost request has failed.

        *expected* is the ``seq_id`` that the server expects, if its response names one.
        """
        assert self.lost is not None
        if outcome is Outcome.CRASHED:
            return LostAction.FILL
        if outcome is Outcome.NOT_ACCEPTED:
            if self.lost.filler_sent:  # the filler may have been accepted
                return LostAction.FILL
            self.lost = None
            return LostAction.CONTINUE
        return self._resolve_lost(outcome, expected)

    def filler_failed(self, outcome: Outcome, expected: Optional[int] = None) -> LostAction:
        """Note that sending the filler has failed; *expected* as for `lost_failed`."""
        action = self._resolve_lost(outcome, expected)
        if self.lost is not None and outcome in (Outcome.UNKNOWN, Outcome.CRASHED):
            self.lost = dataclasses.replace(self.lost, filler_sent=True)
        return action

    def _resolve_lost(self, outcome: Outcome, expected: Optional[int]) -> LostAction:
        """Note what a failed attempt to resend or fill shows about the lost request.

        If the server did not read the attempt, it shows nothing: the request stays lost, and the
        failure must be reported.
        """
        assert self.lost is not None
        if expected is not None:
            if expected > self.lost.seq_id:  # rule 6
                self._use(expected - 1)
            self.lost = None  # otherwise it was not executed, and never will be
        elif outcome in (Outcome.REFUSED, Outcome.CONFLICT, Outcome.UNREADABLE):
            self._use(self.lost.seq_id)
        else:
            return LostAction.REPORT
        return LostAction.CONTINUE

    # Later responses, in any order

    def out_of_order(self, request: R, seq_id: int, expected: int) -> Action:
        """Note that the server refused *request*, sent under *seq_id*; it expects *expected*."""
        if expected > seq_id:  # rule 6
            self._expected_seq_id = max(self._expected_seq_id, expected)
            if self.lost is not None and self.lost.seq_id == seq_id:
                self.lost = None  # it had the same body, so it is done
            return Action.REPORT_DONE
        if expected <= self._done_seq_id:  # rule 7
            return Action.REPORT_LOST_RUN
        # A request refused when it was sent, by a 409, was never in flight.
        self._in_flight.pop(request, None)
        self._refused.append(_Refused(request, seq_id, expected))
        return Action.RESEND_LATER

    def settled(self, request: R, *, done: bool) -> None:
        """Note that *request* has its outcome, or was cancelled; *done* if it has a result."""
        seq_id = self._in_flight.pop(request, 0)
        if done:
            self._done_seq_id = max(self._done_seq_id, seq_id)

    # Resending

    def take_resends(self) -> List[R]:
        """Return the requests to resend, in order, before any other is begun (rule 5).

        Call it when nothing is in flight, or nothing in flight will be settled any more.
        """
        self.next_seq_id = max(self.next_seq_id, self._expected_seq_id)
        self._expected_seq_id = 0
        refused, self._refused = self._refused, []
        if refused:
            # The latest refusal shows the server's latest state.
            self.next_seq_id = refused[-1].expected
        # Not in the order of their reports: a submission may get its 409 before earlier requests
        # are polled.
        return [entry.request for entry in sorted(refused, key=operator.attrgetter("seq_id"))]

    def withdraw(self, request: R) -> None:
        """Note that *request* will not be resent."""
        self._refused = [entry for entry in self._refused if entry.request is not request]

    def _use(self, seq_id: int) -> None:
        """Count *seq_id* as used."""
        self.next_seq_id = max(self.next_seq_id, seq_id + 1)
        self._last_rejected = False
        self.lost = self._sent = None  # also frees the body, which may be large


def classify(error: BaseException) -> Outcome:
    """Return what *error*, raised by sending a request, means for its ``seq_id``."""
    if isinstance(error, ResponseDecodeError):
        return Outcome.UNREADABLE
    # Before its base class below: without a route, nothing has read the request.
    if isinstance(error, RouteMissingError):
        return Outcome.NOT_SENT
    if isinstance(error, APIConnectionError):
        return Outcome.UNKNOWN if error.maybe_taken else Outcome.UNREAD
    # The client's own errors, such as input that can't be encoded, use no seq_id (rule 1).
    if not isinstance(error, APIStatusError):
        return Outcome.NOT_SENT
    if error.status == 409:
        return Outcome.CONFLICT
    if error.status in _READ:
        return Outcome.REFUSED
    if error.maybe_taken:
        return Outcome.CRASHED if error.status == 500 else Outcome.UNKNOWN
    # The rest, such as 413, is rejected unread, and would be rejected each time.
    return Outcome.UNREAD if error.status in _UNREAD else Outcome.NOT_ACCEPTED


def expected_seq_id(error: BaseException, seq_id: int) -> Optional[int]:
    """Return the ``seq_id`` that the server expects instead of *seq_id*, if *error* names one."""
    if not isinstance(error, (RequestFailedError, ConflictError)):
        return None
    # Some servers report it with a 409, others as the failure of a request that they have accepted
    # (docs/servers.md).
    if error.status != 409 and "equence conflict" not in error.message:
        return None
    # A message that does not name the seq_id that was sent is not about this request.
    found = _CONFLICT.search(error.message)
    if found is None or int(found.group(2)) != seq_id or int(found.group(1)) == seq_id:
        return None
    return int(found.group(1))
