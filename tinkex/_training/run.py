"""TrainingRun: the requests of one training run, in call order.

Calls return futures without blocking.  The only thread belongs to the run's queue: it sends
requests in call order and assigns their sequence numbers (`tinkex._training.sequence`).
`tinkex._training.gradient` tracks batches that may have been added to the gradient only in part.
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

#: Joins the results of several requests into one.
Join = Callable[[List[Output]], Output]


class TrainingRun:
    """Sends the requests of one run, in call order.  Thread-safe.

    Args:
        first_seq_id: the seq_id of the first request; greater than 1 if creating the run used some.

    Attributes:
        model_id: the server's id of the run.
        last_update: identifies the last queued request that changes the weights; compare it with
            ``is``.
        has_gradient: whether a backward pass was queued since that request.
        failed_updates: how many backward passes and changes of the weights have failed or were
            cancelled.
    """

    def __init__(self, runtime: Runtime, model_id: str, first_seq_id: int = 1) -> None:
        self.model_id = model_id
        self.last_update = object()
        self.has_gradient = False
        self.failed_updates = 0
        # Weak: if the caller drops the future, the future logs its failure itself.
        self._unread_failure: Optional[weakref.ref[APIFuture[Any]]] = None
        self._runtime = runtime
        self._queue = RunQueue(runtime, model_id, first_seq_id)
        self._nan_warning = NaNWarning(f"run {model_id}")
        # Used only by the queue's thread, so without a lock.
        self._gradient = Gradient(self._queue)
        self._flags: Optional[ServerFlags] = None  # requested when first needed

    # Called from any thread

    def submit(
        self,
        kind: str,
        request_type: Type[EndpointRequest[T]],
        *args: Any,
        after: Optional[APIFuture[Any]] = None,
    ) -> APIFuture[T]:
        """Queue one request, ``request_type(queue, future, *args)``.

        *after* is the future of an earlier request of this run that this request depends on.  If
        that request has failed when this one is about to be sent, this one is cancelled.  A
        dependent request does not count towards ``max_unread``.
        """
        future = self.queue(kind, self._send_one, request_type, args, after, counted=after is None)
        # These types change the weights.  A pipeline compares `last_update` to find out whether a
        # checkpoint queued now would still hold exactly its step.
        if request_type.waits_for_batches:
            self.last_update = object()
            self.has_gradient = False
            future.on_settled(self._note_update)
        return future

    def unload(self) -> APIFuture[UnloadModelResponse]:
        """Queue unloading the run; it is sent once all earlier requests are settled."""
        return self.queue("unload", self._send_unload)

    def queue(
        self, kind: str, task: Callable[..., None], *args: Any, counted: bool = True
    ) -> APIFuture[Any]:
        """Have the queue's thread call ``task(future, *args)`` with a new future of *kind*.

        If *task* raises, the future fails with its error.  *counted* as for `Poller.new_future`.
        """
        future = self.new_future(kind, counted=counted)
        try:
            self._queue.put(future, task, *args)
        except BaseException:  # such as Ctrl-C: the caller never gets the future
            future.cancel()
            raise
        if kind in ("forward_backward", "forward_backward_custom"):
            self.has_gradient = True
            future.on_settled(self._note_update)
        return future

    @property
    def has_unread_failure(self) -> bool:
        """Whether an update has failed whose future the caller still holds and has not read."""
        failed = None if self._unread_failure is None else self._unread_failure()
        return failed is not None and not failed.was_read

    def _note_update(self, future: APIFuture[Any]) -> None:
        """Note a failed backward pass or weight change; called in the thread that settles it."""
        if future.failed():
            # Racing threads may lose a count; readers only check whether the number has changed.
            self.failed_updates += 1
            if not future.cancelled() and not self.has_unread_failure:
                self._unread_failure = weakref.ref(future)

    def new_future(self, kind: str, *, counted: bool = False) -> APIFuture[Any]:
        """Return a new future for a request of this run.

        Raises ClientClosedError if the session is closed.
        """
        self._runtime.ensure_open(kind)
        return self._runtime.poller.new_future(kind, counted=counted)

    def drain(self) -> None:
        """Refuse further work; queued requests are still sent.  Does not block."""
        self._queue.drain()

    # Called from tasks, on the queue's thread

    def send_batch(
        self,
        future: APIFuture[Output],
        data: List[Datum],
        loss: Loss,
        breaks: Collection[int] = (),
    ) -> None:
        """Send a pass over an entire batch, in as many requests as needed; *data* was checked.

        One task sends them all, so that no other request comes between them.  The kind of *future*
        is ``"forward"`` or ``"forward_backward"``.  A new request begins at each index in *breaks*,
        and wherever the server's limits require one.

        Raises:
            IncompleteGradientError: an earlier batch was added to the gradient only in part, and
                *data* does not complete it.
        """
        if not future.begin():  # cancelled while it was queued
            return
        completed, pieces = None, [Piece(data, 0, None)]
        if future.kind == "forward_backward":
            completed, pieces = self._gradient.plan(data, loss)
        chunks: List[Chunk] = []
        # For each chunk, the request of an earlier call that has added it, if any.
        added: List[Optional[APIFuture[Output]]] = []
        for piece in pieces:
            if piece.part is None:
                cuts = self._cut(piece.data, breaks, piece.first)
            else:
                cuts = [Chunk(piece.data, 0, piece.first)]  # won't be sent: its future is settled
            chunks += cuts
            added += [piece.part] * len(cuts)
        if future.done():  # cancelled during the waits above
            return
        parts = [future]
        if completed is not None or len(chunks) > 1:
            # The requests of an earlier call keep their places: the result covers the whole batch.
            parts = [part or self.new_future(future.kind) for part in added]
            # A forward pass changes nothing, so its parts may be cancelled one by one.
            if future.kind == "forward":
                gather(future, parts, combine)
            else:
                contents = Contents([chunk.data for chunk in chunks], loss)
                self._add_split(future, parts, combine, contents, completed)
        self._send_parts(parts, chunks, loss)

    def run_pass(
        self, kind: str, data: List[Datum], loss: Loss, breaks: Collection[int] = ()
    ) -> Output:
        """Like queueing `send_batch`, but send the pass now, and wait for its result."""
        future: APIFuture[Output] = self.new_future(kind)
        self.send_batch(future, data, loss, breaks)
        # `result` alone might never return: this very thread must resend refused requests (rule 5).
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
        """Send a backward pass; *join* makes the result of *future* from those of its requests.

        Unlike `send_batch`, repeating the call does not complete an incomplete gradient: the loss
        is computed again, and may yield other data.
        """
        # Checked again: a part of an earlier batch may have failed during the forward pass.
        self.ensure_trainable()
        chunks = self._cut(data, breaks)
        parts = [self.new_future("forward_backward") for _ in chunks]
        if len(parts) > 1:
            self._add_split(future, parts, join)
        else:
            gather(future, parts, join)
        self._send_parts(parts, chunks, loss)

    def ensure_trainable(self) -> None:
        """Raise IncompleteGradientError if a batch was added to the gradient only in part."""
        self._gradient.ensure_complete()

    def _send_one(
        self,
        future: APIFuture[T],
        request_type: Type[EndpointRequest[T]],
        args: Sequence[Any],
        after: Optional[APIFuture[Any]],
    ) -> None:
        if request_type.waits_for_batches:
            # If the step were sent and a part of a batch failed afterwards, the step would train on
            # the other parts alone.
            future.waiting_for = _describe_wait
            self._gradient.wait()
            future.waiting_for = None
        # A cancelled request uses no seq_id: `send` returns immediately.
        if after is not None and after.failed():
            future.cancel()
        if request_type.needs_gradient and not future.done():
            self.ensure_trainable()
        self._queue.send(request_type(self._queue, future, *args))
        if request_type.drops_gradient and self._gradient.is_incomplete:
            # Later requests depend on whether the gradient was dropped, so wait until we know.
            self._queue.wait_for([future])
            if not future.failed():
                self._gradient.drop()

    def _send_unload(self, future: APIFuture[UnloadModelResponse]) -> None:
        # Unloading has no seq_id by which the server could order it after requests in flight.
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
        """Cut a batch into requests; if there are several, check that all can be encoded."""
        codec = batch_codec(self._runtime.transport)
        chunks = cut(data, self._server_flags(), codec, first, breaks)
        if len(chunks) > 1:
            check_encoding(chunks, codec)
        return chunks

    def _send_parts(
        self, parts: Sequence[APIFuture[Output]], chunks: Sequence[Chunk], loss: Loss
    ) -> None:
        """Send the requests of a batch; if one is known to have failed, cancel the rest."""
        compress = self._server_flags().proto_compress_fwdbwd
        # One after the other, even if the server's flags allow parallel requests: those may arrive
        # in any order, which some servers refuse, and a failed one would leave a gap in the
        # seq_ids.
        for index, (part, chunk) in enumerate(zip(parts, chunks)):
            if any(earlier.failed() for earlier in parts[:index]):
                for later in parts[index:]:
                    later.cancel()
                return
            self._queue.send(Pass(self._queue, part, chunk, loss, self._nan_warning, compress))

    def _server_flags(self) -> ServerFlags:
        """Return the server's flags, or the default ones if it does not report any."""
        if self._flags is None:
            # A pass must not fail for want of the flags: they only set limits.
            try:
                self._flags = flags_for(self._runtime.transport, once=True)
            except APIError as error:
                logger.info("using the usual limits for batches: %s", error)
                self._flags = ServerFlags()
            self._runtime.resources.limits.adjust()
        return self._flags


def _describe_wait() -> str:
    return "waits for all parts of the batch before it"
