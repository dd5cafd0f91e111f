"""TrainingRun: the work of one training run, in the order of the calls.

Calls return futures without blocking.  The run's queue has the only thread: it sends in call order
and assigns the sequence numbers (`tinkex._training.sequence`).  `tinkex._training.gradient` keeps
track of batches of which only a part may have been added to the gradient.
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Collection,
    List,
    Optional,
    Sequence,
    Type,
    TypeVar,
)

from tinkex._api import training as api
from tinkex._api._call import read
from tinkex._api.encoding_choice import batch_codec
from tinkex._results.notices import NaNWarning
from tinkex._results.pending import AcceptedRequest
from tinkex._training.batch import Chunk, Loss, check_encoding, cut
from tinkex._training.gradient import Contents, Gradient, Piece, SplitBatch
from tinkex._training.requests import EndpointRequest, Pass
from tinkex._training.run_queue import RunQueue
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
        # Weak: a future that the caller drops logs its failure itself.
        self._unread_failure: Optional[weakref.ref[APIFuture[Any]]] = None
        self._runtime = runtime
        self._queue = RunQueue(runtime, model_id, first_seq_id)
        self._nan_warning = NaNWarning(f"run {model_id}")
        # Used by the queue's thread alone, so without a lock.
        self._gradient = Gradient(self._queue)
        self._flags: Optional[ServerFlags] = None  # once they are needed

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
        # Those that change the weights: a pipeline compares `last_update` to know whether a
        # checkpoint that is queued now would still be that of its step.
        if request_type.waits_for_batches:
            self.last_update = object()
            self.has_gradient = False
            future.on_settled(self._note_update)
        return future

    def unload(self) -> APIFuture[UnloadModelResponse]:
        """Queue unloading the run, once all requests before it are settled."""
        return self.queue("unload", self._send_unload)

    def queue(
        self, kind: str, task: Callable[..., None], *args: Any, counted: bool = True
    ) -> APIFuture[Any]:
        """Have the queue's thread call ``task(future, *args)`` with a new future of *kind*.

        What it raises becomes the future's error.  *counted* as for `Poller.new_future`.
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
        failed = None if self._unread_failure is None else self._unread_failure()
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

    def send_batch(
        self,
        future: APIFuture[Output],
        data: List[Datum],
        loss: Loss,
        breaks: Collection[int] = (),
    ) -> None:
        """Send a pass over an entire batch, in as many requests as it takes; *data* was checked.

        A task of its own, so that no other request comes between those of a batch.  The kind of
        *future* is ``"forward"`` or ``"forward_backward"``.  At each index in *breaks* a new
        request begins, besides where the server's limits demand one.

        Raises:
            IncompleteGradientError: a batch was added to the gradient in part, and *data* is not
                its rest.
        """
        if not future.begin():  # cancelled while it was queued
            return
        completed, pieces = None, [Piece(data, 0, None)]
        if future.kind == "forward_backward":
            completed, pieces = self._gradient.plan(data, loss)
        chunks: List[Chunk] = []
        added: List[Optional[APIFuture[Output]]] = []  # by an earlier call, for each of the chunks
        for piece in pieces:
            if piece.part is None:
                cuts = self._cut(piece.data, breaks, piece.first)
            else:
                cuts = [Chunk(piece.data, 0, piece.first)]  # not sent: its future is settled
            chunks += cuts
            added += [piece.part] * len(cuts)
        if future.done():  # cancelled during the waits above
            return
        parts = [future]
        if completed is not None or len(chunks) > 1:
            # Requests of an earlier call keep their places: the result is that of the whole batch.
            parts = [part or self.new_future(future.kind) for part in added]
            # A forward pass changes nothing, so that its parts may be cancelled one by one.
            if future.kind == "forward":
                gather(future, parts, combine)
            else:
                contents = Contents([chunk.data for chunk in chunks], loss)
                self._add_split(future, parts, combine, contents, completed)
        self._send_parts(parts, chunks, loss)

    def run_pass(
        self, kind: str, data: List[Datum], loss: Loss, breaks: Collection[int] = ()
    ) -> Output:
        """Like a `send_batch` that was queued, but send it now, and wait for the result."""
        future: APIFuture[Output] = self.new_future(kind)
        self.send_batch(future, data, loss, breaks)
        # Not `result` alone: this very thread has to resend what is refused meanwhile (rule 5).
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
        """Send a backward pass whose results, made one by *join*, are those of *future*.

        Unlike that of `send_batch`, it is not completed by the same call again, which computes the
        loss again and may not send the same.
        """
        # Again: a part of an earlier batch may have failed during the forward pass before this.
        self.ensure_trainable()
        chunks = self._cut(data, breaks)
        parts = [self.new_future("forward_backward") for _ in chunks]
        if len(parts) > 1:
            self._add_split(future, parts, join)
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
            # A step that is sent while a part of a batch may still fail would train on the others.
            future.waiting_for = _describe_wait
            self._gradient.wait()
            future.waiting_for = None
        # What is cancelled uses no seq_id: `send` returns immediately.
        if after is not None and after.failed():
            future.cancel()
        if request_type.needs_gradient and not future.done():
            self.ensure_trainable()
        self._queue.send(request_type(self._queue, future, *args))
        if request_type.drops_gradient and self._gradient.is_incomplete:
            # What comes next depends on whether the gradient was dropped: it must not be sent
            # before that is known.
            self._queue.wait_for([future])
            if not future.failed():
                self._gradient.drop()

    def _send_unload(self, future: APIFuture[UnloadModelResponse]) -> None:
        # It has no seq_id by which the server could put it after what is in flight.
        self._queue.wait_for(None)
        if future.done():  # cancelled while it was queued
            return
        future.enter("submitting")
        accepted = api.unload_model(self._runtime.transport, self.model_id)
        if not isinstance(accepted, UntypedFuture):
            future.try_set_result(accepted)
            return
        decode = functools.partial(read, UnloadModelResponse, name="unload")
        request = AcceptedRequest(future, decode, f"run {self.model_id}", accepted.request_id)
        self._runtime.poller.watch(self.model_id, request)

    def _add_split(
        self,
        future: APIFuture[Output],
        parts: Sequence[APIFuture[Output]],
        join: Join,
        contents: Optional[Contents] = None,
        completed: Optional[SplitBatch] = None,
    ) -> None:
        batch = SplitBatch(self.model_id, future, parts, join, self._queue.may_repeat, contents)
        self._gradient.add(batch, completed)

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
        # One after the other, even where the server's flags allow them in parallel: sent in
        # parallel they may arrive in any order, which some servers refuse, and one that fails
        # would leave a gap in the seq_ids.
        for index, (part, chunk) in enumerate(zip(parts, chunks)):
            if any(earlier.failed() for earlier in parts[:index]):
                for later in parts[index:]:
                    later.cancel()
                return
            self._queue.send(Pass(self._queue, part, chunk, loss, self._nan_warning, compress))

    def _server_flags(self) -> ServerFlags:
        """The server's flags; the usual ones if it does not report them."""
        if self._flags is None:
            # A pass must not fail because the flags cannot be had: they only set limits.
            try:
                self._flags = flags_for(self._runtime.transport, once=True)
            except APIError as error:
                logger.info("using the usual limits for batches: %s", error)
                self._flags = ServerFlags()
            self._runtime.resources.limits.adjust()
        return self._flags


def _describe_wait() -> str:
    return "waits for all parts of the batch before it"
