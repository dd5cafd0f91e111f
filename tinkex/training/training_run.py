"""TrainingRun: what a training client asks of its run, queued in the run's lane.

Calls return futures at once.  The lane (`NumberedLane`) has the only thread; it sends in call order
and gives the numbers.  Its first rule for them: no number is ever used for another body once the
server may have taken a request under it.

The requests of a batch in parts go one after the other, whatever the server's flag says of sending
them at once: sent at once they may arrive in any order, which some servers refuse, and one that
fails would leave a gap behind.
"""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any, Callable, List, Mapping, Optional, Sequence, TypeVar, Union

from tinkex.errors import APIError, IncompleteGradientError
from tinkex.futures import APIFuture, gather
from tinkex.poller import Operation
from tinkex.server_flags import ServerFlags, flags_for
from tinkex.session import Session
from tinkex.training.numbered_lane import NumberedLane, Send, Work
from tinkex.training.training_pass import PassReader, cut
from tinkex.transport import Reply
from tinkex.types import Datum, ForwardBackwardOutput, ForwardBackwardRequest, UntypedFuture
from tinkex.wire.chunking import combine

logger = logging.getLogger(__name__)

T = TypeVar("T")

LossSettings = Mapping[str, Union[float, str]]

#: What adds to the gradient of a run, or applies it.
_USING_GRADIENT = ("forward_backward", "optim_step")


class TrainingRun:
    """Sends the requests of one run, in the order of the calls.  Thread-safe.

    Args:
        first_seq_id: the first number, if some were used while the run was made.

    Attributes:
        model_id: the server's id of the run.
        transport: what the requests of this run must be sent with.
    """

    def __init__(self, session: Session, model_id: str, first_seq_id: int = 1) -> None:
        self.model_id = model_id
        self._session = session
        self._lane = NumberedLane(session, model_id, first_seq_id)
        self.transport = self._lane.transport
        self._results = PassReader(model_id)
        # Used by the lane's thread alone: the server's flags, once they are needed, and why the
        # run cannot be trained any more, if so.
        self._flags: Optional[ServerFlags] = None
        self._spoilt: Optional[IncompleteGradientError] = None

    # Called from any thread

    def new_future(self, kind: str, *, counted: bool = False) -> APIFuture[Any]:
        """Make a future for a request of this run; ClientClosedError if the session is closed.

        *counted* as for `Poller.new_future`: it is the caller's, who may have to wait for it.
        """
        self._session.ensure_open(kind)
        return self._session.poller.new_future(kind, counted=counted)

    def submit(
        self,
        kind: str,
        send: Send,
        decode: Callable[[Reply], T],
        *,
        after: Optional[APIFuture[Any]] = None,
    ) -> APIFuture[T]:
        """Queue one request.

        *send* sends it, with ``transport``, under the number it is given; it may be called again,
        with another number.  *decode* reads the answer with the result.  *after* is of an earlier
        request of this run, without which this one makes no sense: it is cancelled if that one has
        failed by then, and takes no place of its own among ``max_unread``.
        """

        def task(future: APIFuture[T]) -> None:
            if after is not None and after.failed():
                future.cancel()
            self._send(Work(future, send, decode))

        return self.queue(kind, task, counted=after is None)

    def submit_unnumbered(
        self, kind: str, send: Callable[[], Union[UntypedFuture, T]], decode: Callable[[Reply], T]
    ) -> APIFuture[T]:
        """Queue a request that has no number, to be sent when all before it is done.

        *send* sends it, with the session's transport, and returns what to poll for, or the result.
        """

        def task(future: APIFuture[T]) -> None:
            self._lane.finish()
            if future.done():  # cancelled while it waited its turn
                return
            future.enter("submitting")
            accepted = send()
            if not isinstance(accepted, UntypedFuture):
                future.settle(accepted)
                return
            future.enter("waiting", accepted.request_id)
            operation = Operation(future, decode, owner=f"run {self.model_id}")
            self._session.poller.watch(self.model_id, operation)

        return self.queue(kind, task)

    def submit_pass(
        self, kind: str, data: List[Datum], loss_fn: str, config: LossSettings
    ) -> APIFuture[ForwardBackwardOutput]:
        """Queue a pass over a whole batch, in one task, so that its chunks stay together.

        *kind* is ``"forward"`` or ``"forward_backward"``; *data* was checked.
        """
        return self.queue(kind, lambda whole: self._send_batch(whole, data, loss_fn, config))

    def queue(
        self, kind: str, task: Callable[[APIFuture[Any]], None], *, counted: bool = True
    ) -> APIFuture[Any]:
        """Have the lane run *task* with a new future of *kind*; its failure is the future's.

        *counted* as for `new_future`.
        """
        future = self.new_future(kind, counted=counted)
        try:
            return self._lane.queue(future, functools.partial(task, future))
        except BaseException:  # Ctrl-C, at any call: nobody knows of it
            future.cancel()
            raise

    def drain(self) -> None:
        """Refuse further work; what was queued is still sent.  Returns at once."""
        self._lane.drain()

    # Called from tasks of the lane

    def send_pass(
        self, kind: str, data: List[Datum], loss_fn: str, config: LossSettings
    ) -> APIFuture[ForwardBackwardOutput]:
        """Like `submit_pass`, at once, from a task of the lane's thread."""
        whole = self.new_future(kind)
        self._send_batch(whole, data, loss_fn, config)
        return whole

    def run_pass(
        self, kind: str, data: List[Datum], loss_fn: str, config: LossSettings
    ) -> ForwardBackwardOutput:
        """Like `send_pass`, and wait for the result.

        Meanwhile the lane goes on doing what only it can do: a plain wait might wait for itself.
        """
        whole = self.send_pass(kind, data, loss_fn, config)
        self.wait_for([whole])
        return whole.result()

    def send_parts(
        self, kind: str, data: List[Datum], loss_fn: str, config: LossSettings
    ) -> List[APIFuture[ForwardBackwardOutput]]:
        """Like `send_pass`; return the futures of the single requests.

        After one that cannot be sent the others are not: their futures are cancelled.
        """
        flags = self._server_flags()
        chunks = cut(data, flags, self._session.dialect.codec)
        futures = [self.new_future(kind) for _ in chunks]
        for index, (future, chunk) in enumerate(zip(futures, chunks)):
            self._send(self._pass_over(future, *chunk, loss_fn, config, flags))
            if future.failed():
                for later in futures[index + 1 :]:
                    later.cancel()
                break
        return futures

    def wait_for(self, futures: Sequence[APIFuture[Any]]) -> None:
        """Wait until all *futures*, of requests of this run, are settled."""
        self._lane.wait_for(futures)

    def spoil(self, error: IncompleteGradientError) -> None:
        """Refuse, from now on, what adds to the run's gradient or applies it."""
        self._spoilt = error

    def ensure_trainable(self) -> None:
        """Raise IncompleteGradientError if the run was spoilt."""
        if self._spoilt is not None:
            raise copy.copy(self._spoilt) from self._spoilt

    # Passes

    def _send_batch(
        self,
        whole: APIFuture[ForwardBackwardOutput],
        data: List[Datum],
        loss_fn: str,
        config: LossSettings,
    ) -> None:
        """Send a batch in as many requests as it takes, one after the other."""
        if whole.done():  # cancelled while it waited its turn
            return
        flags = self._server_flags()
        chunks = cut(data, flags, self._session.dialect.codec)
        futures = [whole]
        if len(chunks) > 1:
            futures = [self.new_future(whole.kind) for _ in chunks]
            gather(whole, futures, combine)
        for future, chunk in zip(futures, chunks):
            self._send(self._pass_over(future, *chunk, loss_fn, config, flags))

    def _pass_over(
        self,
        future: APIFuture[ForwardBackwardOutput],
        chunk: List[Datum],
        nbytes: int,
        loss_fn: str,
        config: LossSettings,
        flags: ServerFlags,
    ) -> Work[ForwardBackwardOutput]:
        def send(seq_id: int) -> UntypedFuture:
            request = ForwardBackwardRequest(
                self.model_id, seq_id, chunk, loss_fn, config, forward_only=future.kind == "forward"
            )
            compress = flags.proto_compress_fwdbwd
            batches = self.transport.pressure.batches
            with batches.holding(nbytes, lambda: future.done() or self._session.closed, future):
                return self._session.dialect.submit(self.transport, request, compress=compress)

        def decode(reply: Reply) -> ForwardBackwardOutput:
            return self._results.read(reply, chunk, loss_fn)

        return Work(future, send, decode, binary=True)

    def _server_flags(self) -> ServerFlags:
        """The server's flags; the usual ones if it does not tell."""
        if self._flags is None:
            try:
                self._flags = flags_for(self._session.transport, once=True)
            except APIError as error:
                logger.info("using the usual limits for batches: %s", error)
                self._flags = ServerFlags()
            self.transport.pressure.adjust()
        return self._flags

    def _send(self, work: Work[Any]) -> None:
        if work.future.done():  # cancelled while it waited its turn
            return
        if work.future.kind in _USING_GRADIENT:
            try:
                self.ensure_trainable()
            except IncompleteGradientError as error:
                self._session.poller.fail(work.future, error)
                return
        self._lane.send(work)
