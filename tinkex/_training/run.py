"""TrainingRun: what a training client asks of its run, queued in the order of the calls.

Calls return futures without blocking.  The run's queue has the only thread; it sends in call order
and assigns the sequence numbers (`tinkex._training.sequence`).

The requests of a batch in parts go one after the other, even where the server's flags allow them in
parallel: sent in parallel they may arrive in any order, which some servers refuse, and one that
fails would leave a gap behind.

Before an optimizer step is sent, all parts of the batches before it must have been done: if only
some were, the run takes no step, and no other batch, until the rest has been sent by the same call
again, or a checkpoint has been loaded, which drops the gradient.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any, Callable, Collection, List, Optional, Sequence, Type, TypeVar

from tinkex._api import training as api
from tinkex._api._call import read
from tinkex._api.encoding_choice import batch_codec
from tinkex._results.notices import NaNWarning
from tinkex._results.pending import AcceptedRequest
from tinkex._training.batch import Chunk, Loss, check_encoding, cut
from tinkex._training.gradient import Contents, Gradient, SplitBatch
from tinkex._training.requests import EndpointRequest, Pass
from tinkex._training.run_queue import RunQueue
from tinkex._transport.request import Reply
from tinkex._transport.server_flags import ServerFlags, flags_for
from tinkex.errors import APIError
from tinkex.futures import APIFuture, gather
from tinkex.types import Datum, ForwardBackwardOutput, UnloadModelResponse, UntypedFuture
from tinkex.wire.chunking import combine

if TYPE_CHECKING:
    from tinkex._sessions.runtime import Runtime

logger = logging.getLogger(__name__)

T = TypeVar("T")
Output = ForwardBackwardOutput

#: Makes one result of those of several requests.
Join = Callable[[List[Output]], Output]


class TrainingRun:
    """Sends the requests of one run, in the order of the calls.  Thread-safe.

    Args:
        first_seq_id: the first one, if some were used while the run was made.

    Attributes:
        model_id: the server's id of the run.
        last_update: identifies the last request that was queued to change the weights; compared by
            identity.
        has_gradient: whether a backward pass was queued since.
        failed_updates: how many backward passes and changes of the weights have failed, or were
            cancelled.
    """

    def __init__(self, runtime: Runtime, model_id: str, first_seq_id: int = 1) -> None:
        self.model_id = model_id
        self.last_update = object()
        self.has_gradient = False
        self.failed_updates = 0
        self._unread_failure: Callable[[], Optional[APIFuture[Any]]] = _nothing
        self._runtime = runtime
        self._queue = RunQueue(runtime, model_id, first_seq_id)
        self._nan_warning = NaNWarning(f"run {model_id}")
        # Used by the queue's thread alone; the server's flags once they are needed.
        self._gradient = Gradient(self._queue)
        self._flags: Optional[ServerFlags] = None

    # Called from any thread

    def submit(
        self,
        kind: str,
        request_type: Type[EndpointRequest[T]],
        *args: Any,
        after: Optional[APIFuture[Any]] = None,
    ) -> APIFuture[T]:
        """Queue one request, a ``request_type(queue, future, *args)``.

        *after* is of an earlier request of this run, without which this one makes no sense: it is
        cancelled if that one has failed by then, and takes no place of its own among
        ``max_unread``.
        """
        future = self.queue(kind, self._send_one, request_type, args, after, counted=after is None)
        if request_type.waits_for_batches:
            self.last_update = object()
            self.has_gradient = False
            future.on_settled(self._note_update)
        return future

    def submit_pass(
        self, kind: str, data: List[Datum], loss: Loss, breaks: Collection[int] = ()
    ) -> APIFuture[Output]:
        """Queue a pass over an entire batch, as one task, so that its chunks stay together.

        *kind* is ``"forward"`` or ``"forward_backward"``; *data* was checked.  At each index in
        *breaks* a new request begins, besides where the server's limits demand one.
        """
        return self.queue(kind, self._send_batch, data, loss, breaks)

    def unload(self) -> APIFuture[UnloadModelResponse]:
        """Queue unloading the run, once all requests before it are settled."""
        return self.queue("unload", self._send_unload)

    def queue(
        self, kind: str, task: Callable[..., None], *args: Any, counted: bool = True
    ) -> APIFuture[Any]:
        """Have the queue's thread call ``task(future, *args)`` with a new future of *kind*.

        What it raises is the future's error.  *counted* as for `Poller.new_future`: it is the
        caller's, who may have to wait for it.
        """
        future = self.new_future(kind, counted=counted)
        try:
            self._queue.put(future, task, *args)
        except BaseException:  # Ctrl-C, at any call: the caller does not get it
            future.cancel()
            raise
        if kind in ("forward_backward", "forward_backward_custom"):
            self.has_gradient = True
            future.on_settled(self._note_update)
        return future

    @property
    def has_unread_failure(self) -> bool:
        """Whether an update has failed, and the caller has kept its future and not read it yet."""
        failed = self._unread_failure()
        return failed is not None and not failed.was_read

    def _note_update(self, future: APIFuture[Any]) -> None:
        """In the thread that settles *future*, of a backward pass or a change of the weights."""
        if future.failed():
            self.failed_updates += 1  # two threads may count one; it is compared for change only
            if not future.cancelled() and not self.has_unread_failure:
                self._unread_failure = weakref.ref(future)

    def new_future(self, kind: str, *, counted: bool = False) -> APIFuture[Any]:
        """Make a future for a request of this run; ClientClosedError if the session is closed."""
        self._runtime.ensure_open(kind)
        return self._runtime.poller.new_future(kind, counted=counted)

    def drain(self) -> None:
        """Refuse further work; what was queued is still sent.  Does not block."""
        self._queue.drain()

    # Called from tasks, on the queue's thread

    def run_pass(
        self, kind: str, data: List[Datum], loss: Loss, breaks: Collection[int] = ()
    ) -> Output:
        """Like `submit_pass`, but send it now, and wait for the result.

        Meanwhile refused requests are resent: in a plain wait the thread might wait for itself.
        """
        future: APIFuture[Output] = self.new_future(kind)
        self._send_batch(future, data, loss, breaks)
        self._queue.wait_for([future])
        return future.result()

    def send_gradient(
        self,
        future: APIFuture[Output],
        data: List[Datum],
        loss: Loss,
        join: Join,
        breaks: Collection[int] = (),
    ) -> None:
        """Send a backward pass whose results, made one by *join*, are those of *future*."""
        self.ensure_trainable()
        chunks = self._cut(data, breaks)
        parts = [self.new_future("forward_backward") for _ in chunks]
        if len(parts) > 1:
            batch = SplitBatch(self.model_id, future, parts, join, self._queue.may_repeat)
            self._gradient.add(batch)
        else:
            gather(future, parts, join)
        self._send_parts(parts, chunks, loss)

    def ensure_trainable(self) -> None:
        """Raise IncompleteGradientError if only a part of a batch was added to the gradient."""
        self._gradient.ensure_complete()

    def _send_one(
        self,
        future: APIFuture[T],
        request_type: Type[EndpointRequest[T]],
        args: Sequence[Any],
        after: Optional[APIFuture[Any]],
    ) -> None:
        if request_type.waits_for_batches:
            future.waiting_for = _describe_wait
            self._gradient.wait()
            future.waiting_for = None
        if after is not None and after.failed():
            future.cancel()
        if request_type.needs_gradient and not future.done():
            self.ensure_trainable()
        self._queue.send(request_type(self._queue, future, *args))
        if request_type.drops_gradient and self._gradient.is_incomplete:
            self._queue.wait_for([future])
            if not future.failed():
                self._gradient.drop()

    def _send_unload(self, future: APIFuture[UnloadModelResponse]) -> None:
        self._queue.finish()
        if future.done():  # cancelled while it was queued
            return
        future.enter("submitting")
        accepted = api.unload_model(self._runtime.transport, self.model_id)
        if not isinstance(accepted, UntypedFuture):
            future.try_set_result(accepted)
            return
        owner = f"run {self.model_id}"
        request = AcceptedRequest(future, _read_unloaded, owner, accepted.request_id)
        self._runtime.poller.watch(self.model_id, request)

    # Passes

    def _send_batch(
        self, future: APIFuture[Output], data: List[Datum], loss: Loss, breaks: Collection[int]
    ) -> None:
        """Send a batch in as many requests as it takes, one after the other."""
        if not future.begin():  # cancelled while it was queued
            return
        if future.kind == "forward_backward":
            self._send_gradient_batch(future, data, loss, breaks)
            return
        chunks = self._cut(data, breaks)
        parts = [future]
        if len(chunks) > 1:
            parts = [self.new_future(future.kind) for _ in chunks]
            gather(future, parts, combine)
        self._send_parts(parts, chunks, loss)

    def _send_gradient_batch(
        self, future: APIFuture[Output], data: List[Datum], loss: Loss, breaks: Collection[int]
    ) -> None:
        """Send a batch, or what is missing of one that was added in part.

        Raises IncompleteGradientError if one was, and this is not its rest.
        """
        completed, pieces = self._gradient.plan(data, loss)
        chunks: List[Chunk] = []
        added: List[Optional[APIFuture[Output]]] = []
        for piece in pieces:
            if piece.part is None:
                cuts = self._cut(piece.data, breaks, piece.first)
            else:
                cuts = [Chunk(piece.data, 0, piece.first)]  # not sent: its future is settled
            chunks += cuts
            added += [piece.part] * len(cuts)
        if future.done():  # cancelled meanwhile
            return
        parts = [future]
        if completed is not None or len(chunks) > 1:
            parts = [part or self.new_future(future.kind) for part in added]
            contents = Contents([chunk.data for chunk in chunks], loss)
            may_repeat = self._queue.may_repeat
            batch = SplitBatch(self.model_id, future, parts, combine, may_repeat, contents)
            self._gradient.add(batch, completed)
        self._send_parts(parts, chunks, loss)

    def _cut(self, data: List[Datum], breaks: Collection[int], first: int = 0) -> List[Chunk]:
        """Cut a batch into requests, all of which can be encoded if there is more than one."""
        codec = batch_codec(self._runtime.transport)
        chunks = cut(data, self._server_flags(), codec, first, breaks)
        if len(chunks) > 1:
            check_encoding(chunks, codec)
        return chunks

    def _send_parts(
        self, parts: Sequence[APIFuture[Output]], chunks: Sequence[Chunk], loss: Loss
    ) -> None:
        """Send the requests of a batch; after one that is known to have failed, no more of them."""
        compress = self._server_flags().proto_compress_fwdbwd
        for index, (part, chunk) in enumerate(zip(parts, chunks)):
            if any(earlier.failed() for earlier in parts[:index]):
                for later in parts[index:]:
                    later.cancel()
                return
            self._queue.send(Pass(self._queue, part, chunk, loss, self._nan_warning, compress))

    def _server_flags(self) -> ServerFlags:
        """The server's flags; the usual ones if it does not report them."""
        if self._flags is None:
            try:
                self._flags = flags_for(self._runtime.transport, once=True)
            except APIError as error:
                logger.info("using the usual limits for batches: %s", error)
                self._flags = ServerFlags()
            self._runtime.resources.limits.adjust()
        return self._flags


def _nothing() -> None:
    return None


def _describe_wait() -> str:
    return "waits for all parts of the batch before it"


def _read_unloaded(reply: Reply) -> UnloadModelResponse:
    return read(UnloadModelResponse, reply, "unload")
