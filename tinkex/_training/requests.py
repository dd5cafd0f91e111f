"""The requests of a training run: one class per kind, which sends the request and reads its result.

A request is created and sent on the thread of the run's queue, and its result is read on a thread
of the poller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, ClassVar, Mapping, Optional, Type, TypeVar

from tinkex._api._call import read
from tinkex._api._optional import optional_route
from tinkex._api.encoding_choice import submit_batch
from tinkex._api.training import submit
from tinkex._results.notices import NaNWarning
from tinkex._results.pending import PendingRequest
from tinkex._training.batch import Chunk, Loss, in_indices_of_batch, read_pass
from tinkex._transport.request import Reply
from tinkex.errors import ResponseDecodeError
from tinkex.futures import APIFuture
from tinkex.types import (
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    UntypedFuture,
)

if TYPE_CHECKING:
    from tinkex._training.run_queue import RunQueue
    from tinkex._transport.fast_connection import AnyChannel

T = TypeVar("T")


class RunRequest(PendingRequest[T]):
    """One request of a run, from the call until its future is settled.

    `send` uses the queue's transport, and may be called again, with another ``seq_id``.

    Attributes:
        queue: the queue that sends the request.
        seq_id: the ``seq_id`` it was last sent under; 0 if it was not sent yet.
    """

    def __init__(self, queue: RunQueue, future: APIFuture[T]) -> None:
        super().__init__(future, f"run {queue.model_id}")
        self.queue = queue
        self.seq_id = 0
        self._is_watched = False

    def explain(self, error: BaseException) -> BaseException:
        """Return the error to report in place of *error*."""
        return error

    def on_failure(self, error: BaseException) -> Optional[BaseException]:
        """Return the error to report for *error*, or None if the request will be resent."""
        return self.queue.on_failure(self, error)

    def watch(self) -> None:
        """Report to the queue once the future is settled.  Call this after each acceptance."""
        if not self._is_watched:  # a request that is resent must not be reported twice
            self._is_watched = True
            self.future.on_settled(self._settled)
        elif self.future.done():  # cancelled while it was being resent, so not yet in flight
            self._settled(self.future)

    def _settled(self, future: object) -> None:
        self.queue.settled(self)


class EndpointRequest(RunRequest[T]):
    """A request in JSON.

    Args:
        fields: the fields of its body, besides ``model_id`` and ``seq_id``.
    """

    #: The route that the request is sent to.
    route: ClassVar[str]
    #: The type that the response is read as.
    response_type: ClassVar[Type[Any]]
    #: All parts of earlier batches must be settled before it is sent.
    waits_for_batches: ClassVar[bool] = False
    #: It must not be sent if a batch was added to the gradient only in part.
    needs_gradient: ClassVar[bool] = False
    #: It empties the run's gradient.
    drops_gradient: ClassVar[bool] = False

    def __init__(self, queue: RunQueue, future: APIFuture[T], fields: Mapping[str, Any]) -> None:
        super().__init__(queue, future)
        self._fields = fields

    def send(self, channel: Optional[AnyChannel] = None) -> UntypedFuture:
        queue = self.queue
        # Through the queue's transport: its `SendGate` holds the request back if a lost one must be
        # resent first.
        return submit(
            queue.transport,
            self.route,
            model_id=queue.model_id,
            seq_id=self.seq_id,
            **self._fields,
        )

    def decode(self, reply: Reply) -> T:
        result: T = read(self.response_type, reply, self.future.kind)
        return result


class OptimStep(EndpointRequest[OptimStepResponse]):
    """See `TrainingClient.optim_step`."""

    route = "optim_step"
    response_type = OptimStepResponse
    # A step on a part of a batch would succeed, and train on a wrong gradient.
    waits_for_batches = needs_gradient = True


class SaveState(EndpointRequest[SaveWeightsResponse]):
    """See `TrainingClient.save_state`."""

    route = "save_weights"
    response_type = SaveWeightsResponse

    def decode(self, reply: Reply) -> SaveWeightsResponse:
        """Read the result, and remember the path as the one to resume from."""
        saved = super().decode(reply)
        # Noted even if the caller never reads the result: if the run is lost, the error names it.
        self.queue.runtime.session.last_checkpoint = saved.path
        return saved


class SaveForSampler(EndpointRequest[SaveWeightsForSamplerResponse]):
    """See `TrainingClient.save_weights_for_sampler`."""

    route = "save_weights_for_sampler"
    response_type = SaveWeightsForSamplerResponse

    def decode(self, reply: Reply) -> SaveWeightsForSamplerResponse:
        """Read the result, which must have a path."""
        saved = super().decode(reply)
        if not saved.path:
            raise ResponseDecodeError(f"{self.future.kind}: the response has no path")
        return saved


class SaveAndSample(EndpointRequest[T]):
    """Saves weights for this session only; the result is a client of their sampler.

    Args:
        make_client: creates the client; called with the ``sampling_session_id``.
    """

    route = "save_weights_for_sampler"
    response_type = SaveWeightsForSamplerResponse

    def __init__(
        self,
        queue: RunQueue,
        future: APIFuture[T],
        fields: Mapping[str, Any],
        make_client: Callable[[str], T],
    ) -> None:
        super().__init__(queue, future, fields)
        self._make_client = make_client

    def send(self, channel: Optional[AnyChannel] = None) -> UntypedFuture:
        # All attempts use one number, so that a repetition under the same seq_id is the same bytes.
        # It is drawn here, so that samplers are numbered in the order in which they are created.
        if "sampling_session_seq_id" not in self._fields:
            sampler_seq_id = self.queue.runtime.session.next_sampler_seq_id()
            self._fields = {"sampling_session_seq_id": sampler_seq_id, **self._fields}
        return super().send(channel)

    def decode(self, reply: Reply) -> T:
        """Read the id of the sampler, and create its client."""
        saved = read(SaveWeightsForSamplerResponse, reply, self.future.kind)
        if not saved.sampling_session_id:
            raise ResponseDecodeError(
                f"{self.future.kind}: the response has no sampling_session_id"
            )
        return self._make_client(saved.sampling_session_id)


class SaveExternal(EndpointRequest[SaveWeightsExternalResponse]):
    """See `TrainingClient.save_weights_external`."""

    route = "save_weights_external"
    response_type = SaveWeightsExternalResponse

    def send(self, channel: Optional[AnyChannel] = None) -> UntypedFuture:
        """Send the request; raise RouteMissingError if the server does not have the route."""
        with optional_route(self.queue.transport, f"POST {self.route}"):
            return super().send(channel)


class Load(EndpointRequest[LoadWeightsResponse]):
    """See `TrainingClient.load_state`."""

    route = "load_weights"
    response_type = LoadWeightsResponse
    # Form 2 clears the gradient (docs/protocol.md, "Loading weights").  Before it is sent, the
    # outcome of all batches must be known, so that those added in part can be forgotten.
    waits_for_batches = drops_gradient = True


class Pass(RunRequest[ForwardBackwardOutput]):
    """A forward or backward pass over a batch or a part of one; the future's kind says which.

    Args:
        chunk: the datums of the pass.
        nan_warning: shown once, if logprobs are NaN.
        compress: use zstd, if the encoding allows it.
    """

    binary = True

    def __init__(
        self,
        queue: RunQueue,
        future: APIFuture[ForwardBackwardOutput],
        chunk: Chunk,
        loss: Loss,
        nan_warning: NaNWarning,
        compress: bool,
    ) -> None:
        super().__init__(queue, future)
        self._chunk = chunk
        self._loss = loss
        self._nan_warning = nan_warning
        self._compress = compress

    def send(self, channel: Optional[AnyChannel] = None) -> UntypedFuture:
        """Send it under its ``seq_id``, once the bytes in flight allow."""
        queue, chunk = self.queue, self._chunk
        request = ForwardBackwardRequest(
            queue.model_id,
            self.seq_id,
            chunk.data,
            self._loss.name,
            self._loss.config,
            forward_only=self.future.kind == "forward",
        )
        # Wait here rather than in the call that queues the pass, because queued batches do not
        # burden the server.  The bytes are held until the server accepts the pass: only passes on
        # their way to it are limited (docs/protocol.md, "Back-pressure").
        batches = queue.runtime.resources.limits.batches
        with batches.holding(chunk.nbytes, self._is_over, self.future):
            return submit_batch(queue.transport, request, compress=self._compress)

    def decode(self, reply: Reply) -> ForwardBackwardOutput:
        return read_pass(reply, self._chunk, self._loss, self._nan_warning)

    def explain(self, error: BaseException) -> BaseException:
        """Return *error* with its indices changed to those of the caller's batch."""
        return in_indices_of_batch(error, self._chunk.first, self._chunk.stop)

    def _is_over(self) -> bool:
        return self.future.done() or self.queue.runtime.closed
