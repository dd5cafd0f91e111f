"""NumberedLane: sends the requests of one training run in order, and numbers them as it does.

A thread, ``tinkex-submit-<model>``, does all the sending.  Servers differ in what a number means;
these rules fit all of them (docs/protocol.md, "Sequence numbers"):

1. Numbers are given when a request is sent, one after the other: some servers wait for a number
   that is left out.  Bad input that is noticed here takes none.
2. A request that the server has read has used its number up, also if it was refused then (400,
   404, 409, 410, 422).
3. One that was turned away before (no connection, 401, 429 and the like) leaves its number to the
   next request.  If the next one gets 409, the number was used after all: it goes on to the one
   after.
4. One that may have been taken, though no answer says so (the connection broke, or any 5xx but
   501), keeps its number for itself: some servers look at the number alone, and would answer
   another body with the first one's result.  The same call made again is the same body, and is
   done once; any other call first sends the lost one again, as it was.  If the server answers that
   with 500 once more, the lost request is given up, and its number filled with a forward pass of
   one token, which changes nothing whichever of the two the server knows by that number.
5. Some servers do not count a request that failed, and refuse those after it: "expected 20, got
   21".  What is refused so was not run.  Once all that is in flight has been answered, it is sent
   again, in the same order, from the number that the server expects.
6. "expected 22, got 21" means that an earlier attempt at 21 was taken and its answer lost: the
   work was done, and only its result is gone.
7. If the server expects a number whose work is known to be done, it has lost the run's state, and
   nothing is sent again.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import threading
import uuid
import weakref
from typing import Any, Callable, List, Optional, Sequence, Set, Tuple, TypeVar

from tinkex._results.pending import PendingRequest
from tinkex._sessions.runtime import Runtime
from tinkex._transport.transport import Reply, Request
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    ClientClosedError,
    ConflictError,
    InternalServerError,
    RequestFailedError,
    ResponseDecodeError,
    ResultExpiredError,
    RouteMissingError,
    SequenceLostError,
    TinkexError,
)
from tinkex.futures import APIFuture
from tinkex.retry import RetryPolicy
from tinkex.types import Datum, ForwardBackwardRequest, ModelInput, UntypedFuture

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Sends a request under the number it is given.
Send = Callable[[int], UntypedFuture]

#: Answers of a server that has read a request, so that its number is used up.
_READ = (400, 404, 409, 410, 422)

#: Answers to a request that was turned away unread.  They leave open what became of an earlier
#: attempt whose answer was lost, as 5xx do.
_UNREAD = (401, 402, 403, 408, 429)

_CONFLICT = re.compile(r"expected (\d+), got (\d+)")

# Who waits looks this often, in seconds, whether its session was closed.
_LOOK_S = 1.0


class Work(PendingRequest[T]):
    """One request of the run, from the call to the end; *seq_id* is what it was last sent under.

    *explain* turns the error that it fails with into the one to report.
    """

    def __init__(
        self,
        future: APIFuture[T],
        send: Send,
        decode: Callable[[Reply], T],
        binary: bool = False,
        explain: Callable[[BaseException], BaseException] = lambda error: error,
    ) -> None:
        super().__init__(future)
        self.send_as: Send = send
        self.read: Callable[[Reply], T] = decode
        self.binary = binary
        self.explain = explain
        self.lane: Optional[NumberedLane] = None
        self.seq_id = 0
        self.followed = False  # the run learns when the future is settled

    def decode(self, reply: Reply) -> T:
        """Read the result."""
        return self.read(reply)

    def on_failure(self, error: BaseException) -> Optional[BaseException]:
        """The error to report, or None if it is to be sent again."""
        assert self.lane is not None
        return self.lane._appeal(self, error)


class _AnotherBody(Exception):
    """The number belongs to a request whose answer was lost, and this is not it."""


class _Outbox:
    """Sees what is about to be sent.  Used by the lane's thread."""

    def __init__(self) -> None:
        self.last: Optional[Request] = None
        self.lost: Optional[Request] = None  # may have been taken: rule 4
        self.lost_by: Optional[APIFuture[Any]] = None  # the future that it was sent for

    def __call__(self, request: Request) -> Request:
        """Return what to send for *request*; raise _AnotherBody if it must wait."""
        lost = self.lost
        if lost is None:
            self.last = dataclasses.replace(request, idempotency_key=str(uuid.uuid4()))
            return self.last
        if (request.path, request.body) != (lost.path, lost.body):
            raise _AnotherBody
        return lost

    def lose(self, future: APIFuture[Any]) -> None:
        """Note that the last request, for *future*, may have been taken without an answer."""
        self.lost, self.lost_by = self.last, future
        if self.lost is not None:
            self.lost.keep_body()


class NumberedLane:
    """The lane of one run.  Thread-safe, except where it says otherwise.

    Args:
        first_seq_id: the first number, if some were used while the run was made.

    Attributes:
        transport: what the numbered requests must be sent with.
    """

    def __init__(self, runtime: Runtime, model_id: str, first_seq_id: int = 1) -> None:
        self._runtime = runtime
        self._model_id = model_id
        self._outbox = _Outbox()
        self.transport = runtime.transport.watched(self._outbox)
        self._lane = runtime.new_lane(f"tinkex-submit-{model_id}")
        # Used by the lane's thread alone: the next number, and whether it was turned away (rule 3).
        self._next_seq_id = first_seq_id
        self._turned_away = False
        # Guards what follows, and tells of changes to it: what was sent and is not answered, what
        # was refused for its number (with the number expected), whether the lane's thread is
        # looking out for that, the highest number known to be done, and the number that the server
        # has told to be next (0 if none).
        self._changed = threading.Condition()
        self._in_flight: Set[Work[Any]] = set()
        self._refused: List[Tuple[Work[Any], int]] = []
        self._attending = False
        self._done_seq_id = first_seq_id - 1
        self._told_seq_id = 0
        weakref.finalize(self, self._lane.finalizer_hook).atexit = False

    def queue(self, future: APIFuture[T], task: Callable[[], None]) -> APIFuture[T]:
        """Have the lane run *task*; its failure is the future's."""

        def guarded() -> None:
            try:
                task()
            except Exception as error:
                self._runtime.poller.fail(future, error)

        self._lane.submit(guarded)
        return future

    def drain(self) -> None:
        """Refuse further work; what was queued is still sent.  Returns at once."""
        self._lane.drain()

    # Sending.  On the lane's thread

    def send(self, work: Work[Any]) -> None:
        """Send one request under the next number and have it polled; a failure is its future's."""
        self._send_refused_again()
        self._transmit(work)

    def may_repeat(self, future: APIFuture[Any]) -> bool:
        """Whether the request of *future*, which has failed, is done once if it is made again.

        That is, its answer was lost, and nothing was sent since.
        """
        return self._outbox.lost is not None and self._outbox.lost_by is future

    def wait_for(self, futures: Sequence[APIFuture[Any]]) -> None:
        """Wait until *futures*, of requests of this lane, are settled.

        Meanwhile the lane goes on doing what only it can do: a plain wait might wait for itself.
        """
        for future in futures:
            future.on_settled(lambda settled: self._wake())
        self._attend(lambda: all(future.done() for future in futures))

    def finish(self) -> None:
        """Wait until all that was sent is done, also what has to be sent again."""
        self._attend(lambda: not self._in_flight)

    def _attend(self, is_over: Callable[[], bool]) -> None:
        """Send again what is refused for its number, until *is_over* and nothing is refused."""
        with self._changed:
            self._attending = True
        while True:
            self._send_refused_again()
            with self._changed:
                over = not self._refused and is_over()
                self._attending = not over and not self._runtime.closed
                if not self._attending:
                    return
                if not self._refused:
                    self._changed.wait(_LOOK_S)

    def _transmit(self, work: Work[Any]) -> None:
        future, poller = work.future, self._runtime.poller
        if future.done():  # cancelled while it waited its turn
            return
        future.enter("submitting")
        try:
            accepted = self._submit(work)
        except Exception as error:
            left = self._appeal(work, error)
            if left is not None:
                poller.fail(future, left)
            return
        work.note_accepted(accepted.request_id)
        with self._changed:
            self._in_flight.add(work)
        if not work.followed:
            work.followed = True
            future.on_settled(lambda settled: self._settled(work))
        elif future.done():  # cancelled just now, before it was in flight again
            self._settled(work)
        work.lane, work.owner = self, f"run {self._model_id}"
        poller.watch(self._model_id, work)

    def _submit(self, work: Work[Any]) -> UntypedFuture:
        """Send under the next number, and do with the number what the rules above say."""
        while True:
            work.seq_id = self._next_seq_id
            try:
                accepted = work.send_as(work.seq_id)
            except _AnotherBody:
                self._send_lost_again()
            except RouteMissingError:  # and nothing there to read it
                raise
            except ConflictError as error:
                if _read_conflict(error, work.seq_id) is not None:  # rule 5 or 6: see _appeal
                    raise
                was_lost, was_turned_away = self._outbox.lost is not None, self._turned_away
                self._use_number()
                if was_lost:
                    raise _done_already(error, work) from error
                if not was_turned_away:
                    raise
            except (APIConnectionError, APIStatusError) as error:
                self._note_failure(work.future, error)
                raise
            except ResponseDecodeError:  # the server has accepted it, but says so unreadably
                self._use_number()
                raise
            else:
                self._use_number()
                return accepted

    def _use_number(self) -> None:
        self._next_seq_id += 1
        self._turned_away = False
        self._outbox.lost = self._outbox.lost_by = None

    def _note_failure(self, future: APIFuture[Any], error: APIError) -> None:
        """Decide what a request that was not accepted means for its number."""
        answered = isinstance(error, APIStatusError)
        if answered and error.status in _READ:
            self._use_number()
            return
        self._turned_away = True
        if error.maybe_taken:
            self._outbox.lose(future)
            told = (
                "The server may have taken it all the same. The same call again is done once; any "
                "other call of this run first sends this one again."
            )
            error.hint = f"{error.hint} {told}" if error.hint else told
        elif answered and error.status not in _UNREAD:
            self._outbox.lost = None

    def _send_lost_again(self) -> None:
        """Send the request whose answer was lost, so that its number is used up for certain."""
        lost = self._outbox.lost
        assert lost is not None
        name, seq_id = lost.name, self._next_seq_id
        logger.info("%s, number %d, got no answer; sending it again first", name, seq_id)
        outage_s = self._runtime.config.max_outage_s
        policy = RetryPolicy(max_elapsed_s=outage_s, max_gateway_answers=None)
        try:
            try:
                self._runtime.transport.send(lost, policy)
            except InternalServerError as error:
                if error.status != 500:
                    raise
                self._fill_number(name)
        except (APIConnectionError, APIStatusError) as error:
            if _leaves_open(error):
                error.hint = (
                    f"This was {name}, number {seq_id} of {self._model_id}, whose answer was lost; "
                    "it must be known to have arrived before anything else of the run is sent. "
                    + self._runtime.session.how_to_resume()
                )
                raise
            if error.status not in _READ:  # 413 and the like: it never was accepted
                self._outbox.lost = None
                return
        self._use_number()

    def _fill_number(self, name: str) -> None:
        """Use up the number of a lost request with one that has no effect: the end of rule 4."""
        seq_id = self._next_seq_id
        token = Datum(ModelInput.from_ints([1]), {"target_tokens": [1], "weights": [0.0]})
        filler = ForwardBackwardRequest(
            self._model_id, seq_id, [token], "cross_entropy", forward_only=True
        )
        logger.warning(
            "%s: the server fails over %s, number %d, each time. It is given up, and may or may "
            "not have been done",
            self._model_id,
            name,
            seq_id,
        )
        self._runtime.dialect.submit(self._runtime.transport, filler)

    def _send_refused_again(self) -> None:
        """Once nothing is in flight, send what was refused for its number, as rule 5 says."""
        with self._changed:
            while self._refused and self._in_flight and not self._runtime.closed:
                self._changed.wait(_LOOK_S)
            refused, self._refused = self._refused, []
            self._next_seq_id = max(self._next_seq_id, self._told_seq_id)
            self._told_seq_id = 0
        if not refused:
            return
        self._next_seq_id = refused[-1][1]
        logger.info(
            "%s counts a request that failed as not made: sending %d again from number %d",
            self._model_id,
            len(refused),
            self._next_seq_id,
        )
        for work, _ in sorted(refused, key=lambda pair: pair[0].seq_id):
            self._transmit(work)

    # Called when an answer comes, in the poller's threads and others: quick, without I/O

    def _settled(self, work: Work[Any]) -> None:
        future = work.future
        done = not future.failed()
        work.send_as = work.read = _dropped  # they hold the batch; the future may live on
        with self._changed:
            self._in_flight.discard(work)
            if done:
                self._done_seq_id = max(self._done_seq_id, work.seq_id)
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _appeal(self, work: Work[Any], error: BaseException) -> Optional[BaseException]:
        """Return the error to report for *work*, or None if it is to be sent again."""
        expected = _read_conflict(error, work.seq_id)
        if expected is None:
            return work.explain(error)
        assert isinstance(error, TinkexError)
        if expected > work.seq_id:
            with self._changed:
                self._told_seq_id = max(self._told_seq_id, expected)
            return _from(error, _done_already(error, work))
        with self._changed:
            known = self._done_seq_id < expected < work.seq_id
            if known:
                self._in_flight.discard(work)
                self._refused.append((work, expected))
                self._changed.notify_all()
            attended = self._attending
        if not known:
            return _from(error, self._lost_place(error, work, expected))
        work.future.enter("queued")
        try:
            if not attended:
                self._lane.submit(self._send_refused_again)
        except ClientClosedError:  # nobody will send it
            with self._changed:
                self._refused = [pair for pair in self._refused if pair[0] is not work]
            return error
        return None

    def _lost_place(self, error: TinkexError, work: Work[Any], expected: int) -> SequenceLostError:
        return SequenceLostError(
            f"{work.future.kind}: the server expects request {expected} of {self._model_id}, which "
            f"was done, instead of {work.seq_id}: it has lost the state of the run",
            status=error.status,
            request_id=work.future.request_id,
            session_id=self._runtime.session.session_id,
            hint=self._runtime.session.how_to_resume(),
        )


def _dropped(*args: Any) -> Any:
    raise AssertionError("the work is over")


def _leaves_open(error: APIError) -> bool:
    """Whether *error* leaves open what became of an earlier attempt whose answer was lost."""
    if not isinstance(error, APIStatusError):
        return True
    return error.status not in _READ and (error.status in _UNREAD or error.maybe_taken)


def _read_conflict(error: BaseException, seq_id: int) -> Optional[int]:
    """The number that the server expects in place of *seq_id*, if that is what *error* says."""
    if not isinstance(error, (RequestFailedError, ConflictError)):
        return None
    if error.status != 409 and "equence conflict" not in error.message:
        return None
    found = _CONFLICT.search(error.message)
    if found is None or int(found.group(2)) != seq_id or int(found.group(1)) == seq_id:
        return None
    return int(found.group(1))


def _done_already(error: TinkexError, work: Work[Any]) -> ResultExpiredError:
    return ResultExpiredError(
        f"{work.future.kind}: an earlier attempt of it (number {work.seq_id}) was done, but its "
        "answer was lost, and the server does not give the result again",
        status=error.status,
        request_id=work.future.request_id,
        hint="Do not repeat it: the run goes on from here with the next call.",
    )


def _from(cause: BaseException, error: TinkexError) -> TinkexError:
    error.__cause__ = cause
    return error
