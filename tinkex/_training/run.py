"""TrainingRun: what a training client asks of its run, queued in the run's lane.

Calls return futures at once.  The lane (`NumberedLane`) has the only thread; it sends in call order
and gives the numbers.  Its first rule for them: no number is ever used for another body once the
server may have taken a request under it.

The requests of a batch in parts go one after the other, whatever the server's flag says of sending
them at once: sent at once they may arrive in any order, which some servers refuse, and one that
fails would leave a gap behind.

Before an optimizer step is sent, all parts of the batches before it must have been done: if only
some were, the run takes no step, and no other batch, until the rest has been sent by the same call
again, or a checkpoint has been loaded, which drops the gradient.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Callable, List, Mapping, Optional, Sequence, TypeVar, Union

from tinkex._results.pending import AcceptedRequest
from tinkex._sessions.runtime import Runtime
from tinkex._training.batch import Chunk, PassReader, check_encoding, cut
from tinkex._training.gradient import Gradient
from tinkex._training.run_queue import NumberedLane, Send, Work
from tinkex._training.split_batch import Contents, SplitBatch, in_indices_of_batch
from tinkex._transport.server_flags import ServerFlags, flags_for
from tinkex._transport.transport import Reply
from tinkex.errors import APIError
from tinkex.futures import APIFuture, gather
from tinkex.types import Datum, ForwardBackwardOutput, ForwardBackwardRequest, UntypedFuture
from tinkex.wire.chunking import combine

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Makes one result of those of several requests.
Join = Callable[[List[ForwardBackwardOutput]], ForwardBackwardOutput]

LossSettings = Mapping[str, Union[float, str]]

#: What drops the gradient of a run.
_LOADING = ("load_state", "load_state_with_optimizer")


class TrainingRun:
    """Sends the requests of one run, in the order of the calls.  Thread-safe.

    Args:
        first_seq_id: the first number, if some were used while the run was made.

    Attributes:
        model_id: the server's id of the run.
        transport: what the requests of this run must be sent with.
        last_update: identifies the last request that was queued to change the weights; compared by
            identity.
    """

    def __init__(self, runtime: Runtime, model_id: str, first_seq_id: int = 1) -> None:
        self.model_id = model_id
        self._runtime = runtime
        self._lane = NumberedLane(runtime, model_id, first_seq_id)
        self.transport = self._lane.transport
        self.last_update = object()
        self._results = PassReader(model_id)
        # Used by the lane's thread alone; the server's flags once they are needed.
        self._gradient = Gradient(self._lane)
        self._flags: Optional[ServerFlags] = None

    # Called from any thread

    def new_future(self, kind: str, *, counted: bool = False) -> APIFuture[Any]:
        """Make a future for a request of this run; ClientClosedError if the session is closed.

        *counted* as for `Poller.new_future`: it is the caller's, who may have to wait for it.
        """
        self._runtime.ensure_open(kind)
        return self._runtime.poller.new_future(kind, counted=counted)

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
            if kind == "optim_step" or kind in _LOADING:
                self._wait_for_split_batches(future)
            if after is not None and after.failed():
                future.cancel()
            if kind == "optim_step" and not future.done():
                self.ensure_trainable()
            self._lane.send(Work(future, send, decode))
            if kind in _LOADING and self._gradient.is_incomplete:
                self.wait_for([future])
                if not future.failed():
                    self._gradient.drop()

        future = self.queue(kind, task, counted=after is None)
        if kind == "optim_step" or kind in _LOADING:
            self.last_update = object()
        return future

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
                future.try_set_result(accepted)
                return
            request = AcceptedRequest(future, decode, f"run {self.model_id}", accepted.request_id)
            self._runtime.poller.watch(self.model_id, request)

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

    def run_pass(
        self, kind: str, data: List[Datum], loss_fn: str, config: LossSettings
    ) -> ForwardBackwardOutput:
        """Like `submit_pass`, sent at once, from a task of the lane's thread; wait for the result.

        Meanwhile the lane goes on doing what only it can do: a plain wait might wait for itself.
        """
        whole: APIFuture[ForwardBackwardOutput] = self.new_future(kind)
        self._send_batch(whole, data, loss_fn, config)
        self.wait_for([whole])
        return whole.result()

    def send_gradient(
        self,
        future: APIFuture[ForwardBackwardOutput],
        data: List[Datum],
        loss_fn: str,
        join: Join,
    ) -> None:
        """Send a backward pass whose results, made one by *join*, are those of *future*."""
        self.ensure_trainable()
        chunks = self._cut(data)
        parts = [self.new_future("forward_backward") for _ in chunks]
        if len(parts) > 1:
            batch = SplitBatch(self.model_id, future, parts, join, self._lane.may_repeat)
            self._gradient.add(batch)
        else:
            gather(future, parts, join)
        self._send_parts(parts, chunks, loss_fn, {})

    def wait_for(self, futures: Sequence[APIFuture[Any]]) -> None:
        """Wait until all *futures*, of requests of this run, are settled."""
        self._lane.wait_for(futures)

    def ensure_trainable(self) -> None:
        """Raise IncompleteGradientError if only a part of a batch was added to the gradient."""
        self._gradient.ensure_complete()

    def _wait_for_split_batches(self, future: APIFuture[Any]) -> None:
        """Wait for the batches in several requests, on behalf of *future*."""
        future.waiting_for = lambda: "waits for all parts of the batch before it"
        self._gradient.wait()
        future.waiting_for = None

    # Passes

    def _send_batch(
        self,
        whole: APIFuture[ForwardBackwardOutput],
        data: List[Datum],
        loss_fn: str,
        config: LossSettings,
    ) -> None:
        """Send a batch in as many requests as it takes, one after the other."""
        if not whole.begin():  # cancelled while it waited its turn
            return
        if whole.kind == "forward_backward":
            self._send_gradient_batch(whole, data, loss_fn, config)
            return
        chunks = self._cut(data)
        parts = [whole]
        if len(chunks) > 1:
            parts = [self.new_future(whole.kind) for _ in chunks]
            gather(whole, parts, combine)
        self._send_parts(parts, chunks, loss_fn, config)

    def _send_gradient_batch(
        self,
        whole: APIFuture[ForwardBackwardOutput],
        data: List[Datum],
        loss_fn: str,
        config: LossSettings,
    ) -> None:
        """Send a batch, or what is missing of one that was added in part.

        Raises IncompleteGradientError if one was, and this is not its rest.
        """
        completed, pieces = self._gradient.plan(data, loss_fn, config)
        chunks: List[Chunk] = []
        added: List[Optional[APIFuture[ForwardBackwardOutput]]] = []
        for piece, part in pieces:
            cuts = self._cut(piece) if part is None else [(piece, 0)]  # the latter is not sent
            chunks += cuts
            added += [part] * len(cuts)
        if whole.done():  # cancelled meanwhile
            return
        parts = [whole]
        if completed is not None or len(chunks) > 1:
            parts = [part or self.new_future(whole.kind) for part in added]
            contents = Contents([chunk for chunk, _ in chunks], loss_fn, config)
            may_repeat = self._lane.may_repeat
            batch = SplitBatch(self.model_id, whole, parts, combine, may_repeat, contents)
            self._gradient.add(batch, completed)
        self._send_parts(parts, chunks, loss_fn, config)

    def _cut(self, data: List[Datum]) -> List[Chunk]:
        """Cut a batch into requests, all of which can be encoded if there is more than one."""
        codec = self._runtime.dialect.codec
        chunks = cut(data, self._server_flags(), codec)
        if len(chunks) > 1:
            check_encoding(chunks, codec)
        return chunks

    def _send_parts(
        self,
        parts: Sequence[APIFuture[ForwardBackwardOutput]],
        chunks: Sequence[Chunk],
        loss_fn: str,
        config: LossSettings,
    ) -> None:
        """Send the requests of a batch; after one that is known to have failed, no more of them."""
        first = 0
        for index, (part, (chunk, nbytes)) in enumerate(zip(parts, chunks)):
            if any(earlier.failed() for earlier in parts[:index]):
                for later in parts[index:]:
                    later.cancel()
                return
            self._lane.send(self._pass_over(part, chunk, nbytes, first, loss_fn, config))
            first += len(chunk)

    def _pass_over(
        self,
        future: APIFuture[ForwardBackwardOutput],
        chunk: List[Datum],
        nbytes: int,
        first: int,
        loss_fn: str,
        config: LossSettings,
    ) -> Work[ForwardBackwardOutput]:
        """The request over *chunk*, which begins at *first* in the caller's batch."""
        compress, stop = self._server_flags().proto_compress_fwdbwd, first + len(chunk)

        def send(seq_id: int) -> UntypedFuture:
            request = ForwardBackwardRequest(
                self.model_id, seq_id, chunk, loss_fn, config, forward_only=future.kind == "forward"
            )
            batches = self.transport.pressure.batches
            with batches.holding(nbytes, lambda: future.done() or self._runtime.closed, future):
                return self._runtime.dialect.submit(self.transport, request, compress=compress)

        def decode(reply: Reply) -> ForwardBackwardOutput:
            return self._results.read(reply, chunk, loss_fn, first)

        def explain(error: BaseException) -> BaseException:
            return in_indices_of_batch(error, first, stop)

        return Work(future, send, decode, binary=True, explain=explain)

    def _server_flags(self) -> ServerFlags:
        """The server's flags; the usual ones if it does not tell."""
        if self._flags is None:
            try:
                self._flags = flags_for(self._runtime.transport, once=True)
            except APIError as error:
                logger.info("using the usual limits for batches: %s", error)
                self._flags = ServerFlags()
            self.transport.pressure.adjust()
        return self._flags
