"""TrainingClient: one training run (an adapter over a base model) on the server.

Calls return futures at once.  A lane thread, ``tinkex-submit-<model>``, sends them in call
order and numbers them as it does, so bad input never uses up a number.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, Callable, List, Mapping, Optional, Sequence, Type, TypeVar, Union

from tinkex.api import training as api
from tinkex.api._call import read
from tinkex.batch_checks import check_batch, check_ttl
from tinkex.child_client import ChildClient
from tinkex.custom_loss import (
    CustomLoss,
    check_custom_batch,
    forward_data,
    gradient_data,
    merge_metrics,
)
from tinkex.errors import (
    APIConnectionError,
    APIStatusError,
    ConflictError,
    InvalidInputError,
    ResponseDecodeError,
)
from tinkex.futures import APIFuture, gather
from tinkex.poller import Operation
from tinkex.sampling_client import SamplingClient
from tinkex.session import Session
from tinkex.tokenizers import load_tokenizer
from tinkex.transport import Reply
from tinkex.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    GetInfoResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    UntypedFuture,
)
from tinkex.types._wire import Wire
from tinkex.types.checkpoint_path import check_tinker_path
from tinkex.wire.chunking import combine, split
from tinkex.wire.codecs import codec_for

T = TypeVar("T")
W = TypeVar("W", bound=Wire)

#: A batch is sent in several requests beyond this (reference, section 5.3).
MAX_CHUNK_DATUMS = 1024
MAX_CHUNK_BYTES = 5_000_000

LossConfig = Optional[Mapping[str, Union[float, str]]]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The results of one training step."""

    forward_backward: ForwardBackwardOutput
    optim: OptimStepResponse


class TrainingClient(ChildClient):
    """Trains one adapter.  Thread-safe: calls run on the server in call order.

    Made by ServiceClient.  Methods raise InvalidInputError for bad input, before anything is sent,
    and ClientClosedError once the ServiceClient is closed.  Futures raise RequestFailedError when
    the server could not do the work, APIError when it could not be submitted.

    Attributes:
        model_id: the server's id of the run.
    """

    def __init__(self, session: Session, model_id: str, base_model: Optional[str] = None) -> None:
        super().__init__(session)
        self.model_id = model_id
        self._base_model = base_model
        self._info: Optional[GetInfoResponse] = None
        self._lane = session.new_lane(f"tinkex-submit-{model_id}")
        # Used by the lane's thread alone: the next number, and whether the server may have a
        # request of that number already, whose answer was lost.
        self._next_seq_id = 1
        self._doubtful = False
        weakref.finalize(self, self._lane.stopper).atexit = False

    def forward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Compute the loss of *data* without a gradient; otherwise like `forward_backward`."""
        return self._pass("forward", data, loss_fn, loss_fn_config)

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Queue one forward and backward pass over *data*; return at once.

        The gradient is added to what has accumulated since the last `optim_step`.  Outputs come
        back in input order: ``loss_fn_outputs[i]["logprobs"]`` is float32 of the shape of
        ``data[i]``'s target_tokens.  Batches over 1024 datums or 5 MB are sent in several requests
        and joined.

        Args:
            data: at least one Datum, each with the loss inputs that *loss_fn* needs.
            loss_fn: ``"cross_entropy"``, ``"importance_sampling"``, ``"ppo"``, ``"cispo"``,
                ``"dro"``, or another loss that the server has.
            loss_fn_config: the loss's own settings.
        """
        return self._pass("forward_backward", data, loss_fn, loss_fn_config)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss
    ) -> APIFuture[ForwardBackwardOutput]:
        """Train on a loss of your own, computed here with torch; return at once.

        ``loss_fn(data, logprobs)`` gets one float32 leaf tensor per datum, of the shape of its
        target_tokens, and returns a scalar tensor and a dict of metrics.  It runs on the lane's
        thread; calls made after this one wait for it.  The result's ``loss:sum`` is your loss.
        """
        batch = check_batch(data, "cross_entropy")
        check_custom_batch(batch)
        future = self._new_future("forward_backward_custom")

        def task() -> None:
            if future.done():
                return
            future.enter("submitting")
            logprobs = self._send_pass("forward", forward_data(batch), "cross_entropy", {}).result()
            weighted, metrics = gradient_data(batch, logprobs, loss_fn)
            if future.done():
                return  # cancelled: the gradient must not be added
            second = self._send_pass("forward_backward", weighted, "cross_entropy", {})
            gather(future, [second], lambda outputs: merge_metrics(outputs[0], metrics))

        return self._queue(future, task)

    def optim_step(
        self,
        optim_params: Optional[AdamParams] = None,
        *,
        adam_params: Optional[AdamParams] = None,
    ) -> APIFuture[OptimStepResponse]:
        """Queue one optimizer step with the accumulated gradient; return at once."""
        if (optim_params is None) == (adam_params is None):
            raise InvalidInputError("give optim_step one AdamParams")
        params = _check_adam(adam_params if optim_params is None else optim_params)

        def send(seq_id: int) -> UntypedFuture:
            return api.optim_step(
                self._session.transport, model_id=self.model_id, seq_id=seq_id, adam_params=params
            )

        return self._submit("optim_step", send, _reader(OptimStepResponse))

    def train_step(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        adam_params: AdamParams,
        loss_fn_config: LossConfig = None,
    ) -> TrainStep:
        """Submit `forward_backward` and `optim_step` together, and wait for both.

        One waiting time instead of two.  Blocks; raises the first failure.
        """
        _check_adam(adam_params)
        forward_backward = self.forward_backward(data, loss_fn, loss_fn_config)
        optim = self.optim_step(adam_params)
        return TrainStep(forward_backward.result(), optim.result())

    def save_state(
        self,
        name: str,
        ttl_seconds: Optional[int] = None,
        overwrite: bool = False,
        user_metadata: Optional[Mapping[str, str]] = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Queue saving weights and optimizer state under *name*; the result has the ``path``.

        Args:
            name: a bare name, unique in the run unless *overwrite*.
            ttl_seconds: how long the server keeps it; None is for ever.
            overwrite: replace a checkpoint of that name.
            user_metadata: to be kept with it.
        """
        _check_save(name, ttl_seconds)

        def send(seq_id: int) -> UntypedFuture:
            return api.save_weights(
                self._session.transport,
                model_id=self.model_id,
                seq_id=seq_id,
                path=name,
                ttl_seconds=ttl_seconds,
                overwrite=overwrite,
                user_metadata=user_metadata,
            )

        def decode(reply: Reply) -> SaveWeightsResponse:
            saved = read(SaveWeightsResponse, reply, "save_state")
            self._session.last_checkpoint = saved.path
            return saved

        return self._submit("save_state", send, decode)

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: Optional[int] = None,
        user_metadata: Optional[Mapping[str, str]] = None,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Queue saving weights for sampling under *name*; the result has the ``path``."""
        _check_save(name, ttl_seconds)

        def send(seq_id: int) -> UntypedFuture:
            return api.save_weights_for_sampler(
                self._session.transport,
                model_id=self.model_id,
                seq_id=seq_id,
                path=name,
                ttl_seconds=ttl_seconds,
                user_metadata=user_metadata,
            )

        return self._submit("save_weights_for_sampler", send, _sampler_reader("path"))

    def load_state(
        self, path: str, weights_access_token: Optional[str] = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Queue loading the weights at *path* into this run, with a fresh optimizer."""
        return self._load("load_state", path, False, weights_access_token)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: Optional[str] = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Queue loading weights and optimizer state at *path* into this run."""
        return self._load("load_state_with_optimizer", path, True, weights_access_token)

    def save_weights_and_get_sampling_client(self, name: Optional[str] = None) -> SamplingClient:
        """Save the present weights for this session only, and return a client that samples them.

        Blocks.  *name* has no effect; it is there for scripts of the official SDK.
        """
        return self.save_weights_and_get_sampling_client_future(name).result()

    def save_weights_and_get_sampling_client_future(
        self, name: Optional[str] = None
    ) -> APIFuture[SamplingClient]:
        """Like `save_weights_and_get_sampling_client`; returns at once."""
        session = self._session

        def send(seq_id: int) -> UntypedFuture:
            return api.save_weights_for_sampler(
                session.transport,
                model_id=self.model_id,
                seq_id=seq_id,
                sampling_session_seq_id=session.next_sampler_number(),
            )

        def decode(reply: Reply) -> SamplingClient:
            saved = _sampler_reader("sampling_session_id")(reply)
            return SamplingClient(session, str(saved.sampling_session_id), self._base_model)

        return self._submit("save_weights_and_get_sampling_client", send, decode)

    def create_sampling_client(self, model_path: str) -> SamplingClient:
        """Return a client that samples the checkpoint at *model_path*.  Blocks."""
        return self.create_sampling_client_future(model_path).result()

    def create_sampling_client_future(self, model_path: str) -> APIFuture[SamplingClient]:
        """Like `create_sampling_client`; returns at once."""
        self._ensure_open("create_sampling_client")
        own = isinstance(model_path, str) and model_path.startswith(f"tinker://{self.model_id}/")
        return SamplingClient.create_future(
            self._session,
            model_path=model_path,
            known_base_model=self._base_model if own else None,
        )

    def get_info(self) -> GetInfoResponse:
        """What the server says of this run.  Blocks the first time; then cached."""
        self._ensure_open("get_info")
        if self._info is None:
            self._info = api.get_info(self._session.transport, self.model_id)
            self._base_model = self._info.model_data.model_name or self._base_model
        return self._info

    def get_tokenizer(self) -> Any:
        """A Hugging Face tokenizer of the base model (needs transformers).  May block."""
        info = self.get_info()
        name = info.model_data.model_name or info.model_name or self._base_model or ""
        return load_tokenizer(name, info.model_data.tokenizer_id)

    def close(self) -> None:
        """Refuse further work; what was queued is still submitted.  See ChildClient."""
        super().close()
        self._lane.drain()

    def __repr__(self) -> str:
        return f"<TrainingClient {self.model_id} of {self._base_model or 'unknown model'}>"

    def _pass(
        self, kind: str, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig
    ) -> APIFuture[ForwardBackwardOutput]:
        """Queue a pass over a whole batch, in one task, so that its chunks stay together."""
        batch = check_batch(data, loss_fn, loss_fn_config)
        config = dict(loss_fn_config or {})
        chunks = split(batch, MAX_CHUNK_DATUMS, MAX_CHUNK_BYTES)
        futures = [self._new_future(kind) for _ in chunks]
        whole = futures[0]
        if len(futures) > 1:
            whole = gather(self._new_future(kind), futures, combine)

        def task() -> None:
            for future, chunk in zip(futures, chunks):
                self._send_chunk(future, chunk, loss_fn, config)

        return self._queue(whole, task)

    def _send_pass(
        self, kind: str, data: List[Datum], loss_fn: str, config: Mapping[str, Union[float, str]]
    ) -> APIFuture[ForwardBackwardOutput]:
        """Like `_pass`, from the lane's thread, and without its checks."""
        chunks = split(data, MAX_CHUNK_DATUMS, MAX_CHUNK_BYTES)
        futures = [self._new_future(kind) for _ in chunks]
        whole = gather(self._new_future(kind), futures, combine)
        for future, chunk in zip(futures, chunks):
            self._send_chunk(future, chunk, loss_fn, config)
        return whole

    def _send_chunk(
        self,
        future: APIFuture[ForwardBackwardOutput],
        chunk: List[Datum],
        loss_fn: str,
        config: Mapping[str, Union[float, str]],
    ) -> None:
        def send(seq_id: int) -> UntypedFuture:
            request = ForwardBackwardRequest(
                self.model_id, seq_id, chunk, loss_fn, config, forward_only=future.kind == "forward"
            )
            return self._session.dialect.submit(self._session.transport, request)

        self._send(future, send, _decode_output, binary=True)

    def _load(
        self, kind: str, path: str, optimizer: bool, token: Optional[str]
    ) -> APIFuture[LoadWeightsResponse]:
        check_tinker_path(path)

        def send(seq_id: int) -> UntypedFuture:
            return api.load_weights(
                self._session.transport,
                model_id=self.model_id,
                seq_id=seq_id,
                path=path,
                optimizer=optimizer,
                weights_access_token=token,
            )

        return self._submit(kind, send, _reader(LoadWeightsResponse))

    def _new_future(self, kind: str) -> APIFuture[Any]:
        self._ensure_open(kind)
        return self._session.poller.new_future(kind)

    def _submit(
        self, kind: str, send: Callable[[int], UntypedFuture], decode: Callable[[Reply], T]
    ) -> APIFuture[T]:
        """Queue one request."""
        future: APIFuture[T] = self._new_future(kind)
        return self._queue(future, lambda: self._send(future, send, decode))

    def _queue(self, future: APIFuture[T], task: Callable[[], None]) -> APIFuture[T]:
        """Have the lane run *task*; its failure is the future's."""

        def guarded() -> None:
            try:
                task()
            except Exception as error:
                self._session.poller.fail(future, error)

        self._lane.submit(guarded)
        return future

    def _send(
        self,
        future: APIFuture[T],
        send: Callable[[int], UntypedFuture],
        decode: Callable[[Reply], T],
        binary: bool = False,
    ) -> None:
        """Send one request under the next number and have it polled.  On the lane's thread."""
        if future.done():  # cancelled while it waited its turn
            return
        poller = self._session.poller
        future.enter("submitting")
        try:
            accepted = self._send_numbered(send)
        except Exception as error:
            poller.fail(future, error)
            return
        future.enter("waiting", accepted.request_id)
        poller.watch(self.model_id, Operation(future, decode, binary))

    def _send_numbered(self, send: Callable[[int], UntypedFuture]) -> UntypedFuture:
        """Send under the next number, and use it up unless the server may never have seen it.

        A server waits for a number that is left out, and the run would hang.  So one whose
        request got no answer is used again; if the server had taken that request after all, it
        says 409, or knows the body and does the work once.
        """
        try:
            accepted = send(self._next_seq_id)
        except InvalidInputError:  # nothing was sent
            raise
        except ConflictError:
            self._next_seq_id += 1
            if not self._doubtful:
                raise
            self._doubtful = False
            return self._send_numbered(send)
        except (APIConnectionError, APIStatusError) as error:
            status = error.status
            self._doubtful = status is None or status in (408, 429) or status >= 500
            self._next_seq_id += not self._doubtful
            raise
        except Exception:
            self._next_seq_id += 1
            raise
        self._next_seq_id += 1
        self._doubtful = False
        return accepted


def _reader(answer: Type[W]) -> Callable[[Reply], W]:
    return lambda reply: read(answer, reply, answer.__name__)


def _sampler_reader(field: str) -> Callable[[Reply], SaveWeightsForSamplerResponse]:
    """A reader that insists on one of the two optional fields."""

    def decode(reply: Reply) -> SaveWeightsForSamplerResponse:
        saved = read(SaveWeightsForSamplerResponse, reply, "save_weights_for_sampler")
        if not getattr(saved, field):
            raise ResponseDecodeError(f"save_weights_for_sampler: the answer has no {field}")
        return saved

    return decode


def _decode_output(reply: Reply) -> ForwardBackwardOutput:
    return codec_for(reply.content_type).decode_output(reply.body)


def _check_adam(params: Any) -> AdamParams:
    if not isinstance(params, AdamParams):
        raise InvalidInputError(f"an optimizer step takes AdamParams, not {type(params).__name__}")
    params.check()
    return params


def _check_save(name: str, ttl_seconds: Optional[int]) -> None:
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name:
        raise InvalidInputError(
            f"checkpoint name {name!r} must be a bare name, without slashes",
            hint="The server makes the path: tinker://<run>/weights/<name>.",
        )
    check_ttl(ttl_seconds)
