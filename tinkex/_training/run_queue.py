"""RunQueue: sends the requests of one training run, in order.

One thread, ``tinkex-submit-<model>``, sends everything.  `SequenceRules` decides which ``seq_id``
each request gets, and what each response means for it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import uuid
from typing import TYPE_CHECKING, Any, Callable, Optional, Sequence, TypeVar

from tinkex._api.encoding_choice import submit_batch
from tinkex._training.sequence import (
    Action,
    Lost,
    LostAction,
    Outcome,
    SequenceRules,
    classify,
    expected_seq_id,
)
from tinkex._transport.request import Request
from tinkex._transport.tracing import active
from tinkex._transport.transport import ThreadTransport
from tinkex.errors import (
    APIError,
    ClientClosedError,
    ResultExpiredError,
    SequenceLostError,
    TinkexError,
)
from tinkex.futures import APIFuture
from tinkex.retry import RetryPolicy
from tinkex.types import Datum, ForwardBackwardRequest, ModelInput, UntypedFuture

if TYPE_CHECKING:
    from tinkex._sessions.runtime import Runtime
    from tinkex._training.requests import RunRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Waits check this often, in seconds, whether the session was closed.
_CHECK_CLOSED_S = 1.0

_MAYBE_DONE = (
    "The server may have accepted it nevertheless. The same call again is executed only once; any "
    "other call of this run first resends this one."
)


class BodyMismatch(Exception):
    """A lost request must be resent before the one that was about to be sent."""


class SendGate:
    """Lets the transport send only what the rules allow.  Called on the queue's thread.

    It refers to the rules rather than to the queue, to avoid a reference cycle of queue and
    transport: a dropped client must be freed without the help of the garbage collector.
    """

    def __init__(self, rules: SequenceRules[Any, Request], lock: threading.Condition) -> None:
        self._rules = rules
        self._lock = lock

    def __call__(self, request: Request) -> Request:
        """Return what to send for *request*; raise BodyMismatch if it must wait."""
        # The key is set here rather than by the transport: the rules keep the message, because a
        # lost request must be resent under its old key (docs/protocol.md, "Idempotency keys").
        keyed = dataclasses.replace(request, idempotency_key=str(uuid.uuid4()))
        with self._lock:
            allowed = self._rules.before_send(keyed)
        if allowed is None:
            raise BodyMismatch
        return allowed


class RunQueue:
    """The queue of one run, and the thread that sends.  Thread-safe, except where noted.

    Args:
        first_seq_id: the seq_id of the first request; greater than 1 if creating the run used some.

    Attributes:
        runtime: the runtime that the run belongs to.
        model_id: the server's id of the run.
        transport: sends the numbered requests, which must not bypass it.
    """

    def __init__(self, runtime: Runtime, model_id: str, first_seq_id: int = 1) -> None:
        self.runtime = runtime
        self.model_id = model_id
        # Guards _rules, to which the poller's threads report results, and _services_resends.
        # Notified when a request is settled or refused.  Never held during I/O, or while a future
        # is settled.
        self._changed = threading.Condition()
        self._rules: SequenceRules[RunRequest[Any], Request] = SequenceRules(first_seq_id)
        self._services_resends = False  # the thread is in wait_for, and will see a refusal itself
        self.transport = ThreadTransport(runtime.transport, SendGate(self._rules, self._changed))
        # A pool with one thread runs its tasks in call order.
        self._lane = runtime.resources.pools.make(f"tinkex-submit-{model_id}", 1)

    def put(self, future: APIFuture[T], task: Callable[..., None], *args: Any) -> None:
        """Have the thread call ``task(future, *args)``; if it raises, the future fails."""
        self._lane.submit(functools.partial(self._run, task, future, args))

    def _run(self, task: Callable[..., None], future: APIFuture[Any], args: Sequence[Any]) -> None:
        try:
            with active(future.operation):
                task(future, *args)
        except Exception as error:  # any error: nothing else would settle the future
            self.runtime.poller.fail(future, error)

    def drain(self) -> None:
        """Refuse further work; queued requests are still sent.  Does not block."""
        self._lane.drain()

    # Called from tasks, on the queue's thread

    def send(self, request: RunRequest[Any]) -> None:
        """Send *request* under the next seq_id and have it polled; a failure fails its future."""
        self._resend_refused()
        self._send_and_poll(request)

    def may_repeat(self, future: APIFuture[Any]) -> bool:
        """Whether making the failed request of *future* again is safe: it is executed only once.

        True if its response was lost, and nothing else was sent since.
        """
        lost = self._rules.lost  # without the lock, since only this thread changes it
        return lost is not None and lost.request.future is future

    def wait_for(self, futures: Optional[Sequence[APIFuture[Any]]]) -> None:
        """Wait until *futures*, or with None all requests in flight, are settled.

        The thread also resends refused requests during the wait; otherwise it might wait for
        itself.  Returns early if the client is closed.
        """
        # `settled` does not report all of these futures: one may stand for several requests, or
        # fail before it is sent.
        for future in futures or ():
            future.on_settled(self._wake)
        with self._changed:
            self._services_resends = True
        while True:
            self._resend_refused()
            with self._changed:
                if futures is None:
                    settled = not self._rules.in_flight
                else:
                    settled = all(future.done() for future in futures)
                # Decided under the lock: a request refused from now on is either seen by this loop,
                # or queues its own resend (`on_failure`).
                over = settled and not self._rules.has_refused
                self._services_resends = not over and not self.runtime.closed
                if not self._services_resends:
                    return
                if not self._rules.has_refused:
                    self._changed.wait(_CHECK_CLOSED_S)

    def _resend_refused(self) -> None:
        """Once nothing is in flight, resend the requests refused for their seq_id (rule 5)."""
        rules = self._rules
        with self._changed:
            # Requests in flight may still be refused, and all must be resent in order.
            while rules.has_refused and rules.in_flight and not self.runtime.closed:
                self._changed.wait(_CHECK_CLOSED_S)
            refused = rules.take_resends()
            first = rules.next_seq_id
        if refused:
            logger.info(
                "the server does not count failed requests of %s; resending %d from seq_id %d on",
                self.model_id,
                len(refused),
                first,
            )
        # Not as new tasks, which would come after calls that are already queued.
        for request in refused:
            self._send_and_poll(request)

    def _send_and_poll(self, request: RunRequest[Any]) -> None:
        """Send *request*, and have the poller wait for its result."""
        future, poller = request.future, self.runtime.poller
        if future.done():  # cancelled while it was queued
            return
        future.enter("submitting")
        try:
            accepted = self._send_until_accepted(request)
        except Exception as error:
            unhandled = self.on_failure(request, error)
            if unhandled is not None:
                poller.fail(future, unhandled)
            return
        request.note_accepted(accepted.request_id)
        # Only once the request is in flight: if its future has been cancelled since, `watch` takes
        # it out again.
        request.watch()
        # The run is the poller's lane: its results are fetched one at a time, in the order sent.
        poller.watch(self.model_id, request)

    def _send_until_accepted(self, request: RunRequest[Any]) -> UntypedFuture:
        """Send *request* until it is accepted, or fails."""
        while True:
            with self._changed:
                # A new seq_id for each attempt: a 409, or resending a lost request, may have used
                # the last one.
                seq_id = request.seq_id = self._rules.begin()
            try:
                accepted = request.send()
            except BodyMismatch:
                self._resend_lost()
                continue
            except TinkexError as error:
                if expected_seq_id(error, seq_id) is not None:
                    raise  # on_failure handles it, like the failure of a poll
                with self._changed:
                    action = self._rules.send_failed(request, seq_id, classify(error))
                    lost = self._rules.lost
                if action is Action.SEND_AGAIN:
                    continue
                if action is Action.REPORT_DONE:
                    raise _done_already(error, request) from error
                if lost is not None and lost.request is request:
                    # The body refers to the datums' arrays, which may change, but it must be resent
                    # as the same bytes.
                    lost.message.keep_body()
                    error.hint = f"{error.hint} {_MAYBE_DONE}" if error.hint else _MAYBE_DONE
                raise
            with self._changed:
                # Before the poller gets the request: `settled` ignores any that is not in flight.
                self._rules.accepted(request, seq_id)
            return accepted

    def _resend_lost(self) -> None:
        """Resend the request whose response was lost, to be certain that its seq_id is used."""
        lost = self._rules.lost
        assert lost is not None
        name = lost.message.name
        logger.info("no response to %s, seq_id %d; resending it first", name, lost.seq_id)
        # A gateway's response never counts as the server's here: by a wrong guess, the seq_id would
        # wrongly count as free, or as used.
        outage_s = self.runtime.config.max_outage_s
        policy = RetryPolicy(max_elapsed_s=outage_s, max_gateway_answers=None)
        resend = functools.partial(self.runtime.transport.send, lost.message, policy)
        if self._settle_lost(lost, resend, self._rules.lost_failed) is LostAction.FILL:
            self._fill(lost)

    def _fill(self, lost: Lost[RunRequest[Any], Request]) -> None:
        """Use the seq_id of *lost* for a request that has no effect (the end of rule 4)."""
        token = Datum(ModelInput.from_ints([1]), {"target_tokens": [1], "weights": [0.0]})
        filler = ForwardBackwardRequest(
            self.model_id, lost.seq_id, [token], "cross_entropy", forward_only=True
        )
        logger.warning(
            "%s: the server fails each time it gets %s, seq_id %d. The request is abandoned; it "
            "may or may not have been executed",
            self.model_id,
            lost.message.name,
            lost.seq_id,
        )
        # Through the runtime's own transport: the queue's would hold the filler back, because its
        # body differs from the lost one.
        send = functools.partial(submit_batch, self.runtime.transport, filler)
        self._settle_lost(lost, send, self._rules.filler_failed)

    def _settle_lost(
        self,
        lost: Lost[RunRequest[Any], Request],
        send: Callable[[], object],
        failed: Callable[[Outcome, Optional[int]], LostAction],
    ) -> LostAction:
        """Call *send*, which sends *lost* or its filler; *failed* decides about a failure.

        Return what to do next.  If the failure is to be reported, raise it: the request that had to
        wait for *lost* then fails with it.
        """
        try:
            send()
        except Exception as error:
            expected = expected_seq_id(error, lost.seq_id)
            with self._changed:
                action = failed(classify(error), expected)
            if action is LostAction.REPORT:
                if isinstance(error, APIError):
                    error.hint = (
                        f"This was {lost.message.name}, seq_id {lost.seq_id} of {self.model_id}, "
                        "whose response was lost; nothing else of the run is sent until it is "
                        f"known to have arrived. {self.runtime.session.how_to_resume()}"
                    )
                raise
            return action
        with self._changed:
            self._rules.lost_accepted()
        return LostAction.CONTINUE

    # Called when a response arrives, on the poller's threads and others: must be quick, without I/O

    def settled(self, request: RunRequest[Any]) -> None:
        """Note that the future of *request* is settled."""
        # A cancelled request may have been executed, but rule 7 needs work that is certainly done.
        done = not request.future.failed()
        with self._changed:
            self._rules.settled(request, done=done)
            self._changed.notify_all()

    def _wake(self, settled: object) -> None:
        with self._changed:
            self._changed.notify_all()

    def on_failure(self, request: RunRequest[Any], error: BaseException) -> Optional[BaseException]:
        """See `RunRequest.on_failure`."""
        expected = expected_seq_id(error, request.seq_id)
        if expected is None:
            return request.explain(error)
        assert isinstance(error, TinkexError)
        with self._changed:
            action = self._rules.out_of_order(request, request.seq_id, expected)
            # Outside of `wait_for` the thread may be idle, and only a new task makes it resend.
            wakes_thread = action is Action.RESEND_LATER and not self._services_resends
            self._changed.notify_all()
        if action is Action.REPORT_DONE:
            return _from(error, _done_already(error, request))
        if action is Action.REPORT_LOST_RUN:
            return _from(error, self._run_lost(error, request, expected))
        # A request refused like this was not executed (rule 5).  Until it is resent it counts as
        # unsent, so that cancelling it costs nothing.
        request.future.enter("queued")
        if wakes_thread:
            try:
                self._lane.submit(self._resend_refused)
            except ClientClosedError:  # the request will not be resent
                with self._changed:
                    self._rules.withdraw(request)
                return error
        return None

    def _run_lost(
        self, error: TinkexError, request: RunRequest[Any], expected: int
    ) -> SequenceLostError:
        return SequenceLostError(
            f"{request.future.kind}: the server expects request {expected} of {self.model_id}, "
            f"which is done, instead of {request.seq_id}: it has lost the state of the run",
            status=error.status,
            request_id=request.future.request_id,
            session_id=self.runtime.session.session_id,
            hint=self.runtime.session.how_to_resume(),
        )


def _done_already(error: TinkexError, request: RunRequest[Any]) -> ResultExpiredError:
    return ResultExpiredError(
        f"{request.future.kind}: an earlier attempt (seq_id {request.seq_id}) was done, but "
        "its response was lost, and the server does not return the result again",
        status=error.status,
        request_id=request.future.request_id,
        hint="Do not repeat it: the run continues from here with the next call.",
    )


def _from(cause: BaseException, error: TinkexError) -> TinkexError:
    error.__cause__ = cause
    return error
