"""TrainingClient: one training run (an adapter over a base model) on the server.

Methods check their arguments and queue requests with a `TrainingRun`, whose queue has the thread
that sends them.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import (
    Any,
    Callable,
    Iterable,
    Mapping,
    Optional,
    Sequence,
    Type,
    TypeVar,
    Union,
)

from tinkex._api import training as api
from tinkex._runtime.awaiting import future_of, in_thread, result_of
from tinkex._runtime.numeric import as_flag
from tinkex._sessions.runtime import Runtime
from tinkex._training.batch import Loss
from tinkex._training.checks import (
    MistakeWatch,
    as_loss_config,
    check_batch,
    check_metadata,
    check_name,
    check_recipients,
    check_token,
    check_ttl,
)
from tinkex._training.create_run import FromCheckpoint, NewAdapter, prepare_run
from tinkex._training.custom_loss import (
    CustomLoss,
    LossHandle,
    check_custom_batch,
    run_custom_pass,
)
from tinkex._training.requests import (
    EndpointRequest,
    Load,
    OptimStep,
    SaveAndSample,
    SaveExternal,
    SaveForSampler,
    SaveState,
)
from tinkex._training.run import TrainingRun
from tinkex.clients.base import BaseClient
from tinkex.clients.pipeline import Pipeline, SaveAfter, SaveEvery, Schedule, Step
from tinkex.clients.sampling import SamplingClient
from tinkex.clients.tokenizers import load_tokenizer
from tinkex.errors import InvalidInputError
from tinkex.futures import APIFuture
from tinkex.retry import RetryConfig, check_retry_config
from tinkex.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    OptimParams,
    OptimStepResponse,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    UnloadModelResponse,
)
from tinkex.types.checkpoint_path import check_tinker_path, training_run_url
from tinkex.types.optimizer import optim_params_to_wire
from tinkex.usage import Account, Tokens

T = TypeVar("T")

LossConfig = Optional[Mapping[str, Union[float, str]]]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The results of one training step."""

    forward_backward: ForwardBackwardOutput
    optim: OptimStepResponse


class TrainingClient(BaseClient):
    """Trains one adapter.  Thread-safe: calls run on the server in call order.

    Made by ServiceClient.  Methods raise InvalidInputError for bad input, before anything is sent,
    and ClientClosedError once the ServiceClient is closed.  Futures raise RequestFailedError when
    the server could not do the work, APIError when it could not be submitted.

    Attributes:
        model_id: the server's id of the run.
        usage_tag: `ServiceClient.usage` counts what this client uses from then on under this tag.
    """

    usage_tag: Optional[str] = None

    def __init__(
        self,
        runtime: Runtime,
        model_id: str,
        base_model: Optional[str] = None,
        first_seq_id: int = 1,
    ) -> None:
        super().__init__(runtime)
        self.model_id = model_id
        self._base_model = base_model
        self._run = TrainingRun(runtime, model_id, first_seq_id)
        self._info: Optional[GetInfoResponse] = None
        self._mistakes = MistakeWatch(f"run {model_id}")

    @classmethod
    def create_future(
        cls, runtime: Runtime, source: Union[NewAdapter, FromCheckpoint]
    ) -> APIFuture[TrainingClient]:
        """Create a run from *source*; return immediately.  See `ServiceClient`."""
        create_run = prepare_run(runtime, source)

        def create() -> TrainingClient:
            run = create_run()
            client = cls(runtime, run.model_id, run.base_model, run.next_seq_id)
            try:
                client.get_info()  # cached: this is a background thread, and may block
            except BaseException:
                client.close()
                raise
            return client

        return runtime.run(source.kind, create)

    def forward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Compute the loss of *data* without a gradient; otherwise like `forward_backward`."""
        return self._pass("forward", data, loss_fn, loss_fn_config)

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Queue one forward and backward pass over *data*; return immediately.

        The gradient is added to what has accumulated since the last `optim_step`.  Outputs come
        back in input order: ``loss_fn_outputs[i]["logprobs"]`` is float32 of the shape of
        ``data[i]``'s target_tokens.  Batches over 1024 datums or 5 MB are sent in several requests,
        and their results joined; a later `optim_step` is sent when all of these are done, and
        cancelling the future stops none of them once the first was sent.

        Args:
            data: at least one Datum, each with the loss inputs that *loss_fn* needs.
            loss_fn: ``"cross_entropy"``, ``"importance_sampling"``, ``"ppo"``, ``"cispo"``,
                ``"dro"``, or another loss that the server has.
            loss_fn_config: the loss's own settings.

        The future raises IncompleteGradientError if only some of several requests were done, or may
        have been.  The run then takes no `optim_step` and no other batch until the same call again
        has completed the gradient, where that is possible (it sends only what is missing, and
        examples that were refused may be replaced), or `load_state` or `load_state_with_optimizer`
        has dropped it.  `save_state` still saves the weights as they were.
        """
        return self._pass("forward_backward", data, loss_fn, loss_fn_config)

    def forward_backward_custom(
        self,
        data: Sequence[Datum],
        loss_fn: Union[CustomLoss, LossHandle],
        *,
        loss_type_input: Optional[str] = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Train on a loss of your own, computed here with torch; return immediately.

        ``loss_fn(data, logprobs)`` gets one float32 leaf tensor per datum, of the shape of its
        target_tokens, and returns a scalar tensor and a dict of metrics, which are added to those
        of the result: numbers as float, other values unchanged.  It runs on the queue's thread, and
        calls made after this one wait for it.  The result's ``loss:sum`` is your loss.

        A loss from `ServiceClient.create_custom_loss` that the server has is computed there, in
        one pass like any other.

        Args:
            data: each with ``target_tokens``, and whatever the loss reads.
            loss_fn: the function, or what `ServiceClient.create_custom_loss` returned.
            loss_type_input: has no effect; deprecated.

        The future raises what *loss_fn* raises, and then no gradient was added.  It raises
        IncompleteGradientError as for `forward_backward`, but the same call again does not complete
        the gradient.
        """
        if loss_type_input is not None:
            warnings.warn(
                "loss_type_input has no effect: custom losses are computed from logprobs",
                DeprecationWarning,
                stacklevel=2,
            )
        return self._custom_pass(data, loss_fn)

    def _custom_pass(
        self,
        data: Sequence[Datum],
        loss_fn: Union[CustomLoss, LossHandle],
        breaks: Sequence[int] = (),
    ) -> APIFuture[ForwardBackwardOutput]:
        """Queue a pass with a custom loss; *breaks* as for `_pass`."""
        kind = "forward_backward_custom"
        self._ensure_open(kind)
        handle = loss_fn if isinstance(loss_fn, LossHandle) else None
        if handle is not None and handle.is_at_server(self._runtime.session.session_id):
            config = {"loss_id": str(handle.loss_id)}
            return self._pass("forward_backward", data, "custom", config, breaks, handle)
        batch = check_batch(data, "cross_entropy")
        check_custom_batch(batch, loss_fn)
        self._mistakes.check_targets(batch)
        length = _length(batch)
        # The forward pass for the logprobs, and the backward pass.
        most = Tokens(length, prefilled=length)
        return self._queue(kind, most, run_custom_pass, self._run, batch, loss_fn, breaks)

    def optim_step(
        self,
        optim_params: Optional[OptimParams] = None,
        *,
        adam_params: Optional[AdamParams] = None,
    ) -> APIFuture[OptimStepResponse]:
        """Queue one optimizer step with the accumulated gradient; return immediately.

        Args:
            optim_params: of the run's own optimizer: `AdamParams`, `DimuonParams`, or a mapping
                or object with a ``type`` for one that only the server knows.
            adam_params: the older name for it.
        """
        if (optim_params is None) == (adam_params is None):
            raise InvalidInputError("give optim_step one set of parameters, such as AdamParams()")
        return self._optim_step(adam_params if optim_params is None else optim_params)

    def _optim_step(
        self, optim_params: object, after: Optional[APIFuture[ForwardBackwardOutput]] = None
    ) -> APIFuture[OptimStepResponse]:
        """Queue one optimizer step; not sent if the pass *after* which it comes fails before."""
        fields = optim_params_to_wire(optim_params)
        return self._submit("optim_step", OptimStep, fields, after=after)

    def train_step(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        adam_params: OptimParams,
        loss_fn_config: LossConfig = None,
    ) -> TrainStep:
        """Submit `forward_backward` and `optim_step` together, and wait for both.

        One round trip instead of two.  Blocks; raises the first failure.  If the pass cannot be
        submitted, the optimizer step is not sent.  Ctrl-C cancels both if neither was sent; the
        server still does what was sent.
        """
        step = self._submit_step(adam_params, self.forward_backward, data, loss_fn, loss_fn_config)
        try:
            return TrainStep(step.forward_backward.result(), step.optim.result())
        except BaseException:
            step.cancel_if_unsent()
            raise

    def pipeline(
        self,
        batches: Iterable[Sequence[Datum]],
        loss_fn: Union[str, CustomLoss, LossHandle],
        adam_params: Schedule,
        loss_fn_config: LossConfig = None,
        *,
        depth: int = 2,
        save_after: SaveAfter = None,
        save_every: SaveEvery = None,
        save_ttl_seconds: Optional[int] = None,
    ) -> Pipeline:
        """Train on one batch after the other; return an iterator of `PipelineStep`.

        Before one step is waited for, the *depth* - 1 after it are submitted, so that the server
        never waits for the client; while you handle a step, those are in progress::

            for step in trainer.pipeline(batches, "cross_entropy", AdamParams(), depth=2):
                print(step.index, step.metrics)

        A failure, or Ctrl-C, ends it: what was not sent is cancelled, and the error names the step.
        What was sent is not undone: the log names those steps, and ``drain()`` waits for them.
        Leaving a ``with`` block over it does the same; a loop that is left otherwise may leave up
        to *depth* - 1 steps queued.

        A checkpoint that the loop's body saves holds all steps that were submitted, also those
        after the one it handles.  With *save_every* the pipeline saves: each checkpoint is queued
        directly behind its step, which it holds and none after it, and the steps after it do not
        wait::

            for step in trainer.pipeline(batches, "cross_entropy", AdamParams(), save_every=100):
                if step.index % 100 == 99:
                    print(step.save_state().result().path)

        To do something else with the weights of exactly one step, such as
        `save_weights_and_get_sampling_client`, name the step in *save_after*: after it nothing is
        submitted until the next step is requested.  There its ``save_state(name)`` and
        ``save_weights_for_sampler(name)`` work, too, which raise InvalidInputError if a later step
        was submitted.

        Args:
            batches: taken one by one, *depth* - 1 ahead.  A list of lists of Datum is a batch of
                several passes, whose gradients add up before the optimizer step.  That is sent when
                all of them are done; if only some were, IncompleteGradientError is raised, as for
                a batch of `forward_backward` in several requests.  Errors and results count the
                examples through all passes.
            loss_fn, loss_fn_config: as for `forward_backward`, or `forward_backward_custom`.
            adam_params: as for `optim_step`, or a function of the step's index, from 0.
            depth: steps under way together; 1 does one after the other.
            save_after: the steps after which the body needs their weights: 100 for those of index
                99, 199 and so on, or a function of the step's index that returns True for them.
            save_every: the steps to be saved: 100 for those of index 99, 199 and so on, under the
                names ``step-100``, ``step-200`` and so on, or a function of the step's index that
                returns a name, or None not to save it.
            save_ttl_seconds: how long the server keeps what *save_every* saves; None is for ever.
        """
        self._ensure_open("pipeline")
        return Pipeline(
            self,
            batches,
            loss_fn,
            loss_fn_config,
            adam_params,
            depth,
            save_after,
            save_every,
            save_ttl_seconds,
        )

    def _submit_step(
        self,
        optim_params: OptimParams,
        submit_pass: Callable[..., APIFuture[ForwardBackwardOutput]],
        *args: Any,
    ) -> Step:
        """Submit a pass, ``submit_pass(*args)``, and an optimizer step after it, or neither."""
        optim_params_to_wire(optim_params)  # checked before the pass is sent
        passed = submit_pass(*args)
        try:
            # Not counted among max_unread: train_step and Pipeline read it themselves, in the
            # thread that would otherwise wait for it to be read.
            passed.uncount()
            return Step(passed, self._optim_step(optim_params, passed))
        except BaseException:
            passed.cancel()
            raise

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
            overwrite: replace a checkpoint of that name, and its metadata.
            user_metadata: to be kept with it.
        """
        fields = {
            "path": check_name(name),
            "ttl_seconds": check_ttl(ttl_seconds),
            "overwrite": as_flag("overwrite", overwrite) or None,
            "user_metadata": check_metadata(user_metadata),
        }
        return self._submit("save_state", SaveState, fields)

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: Optional[int] = None,
        user_metadata: Optional[Mapping[str, str]] = None,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Queue saving weights for sampling under *name*; the result has the ``path``.

        Arguments as for `save_state`.
        """
        fields = {
            "path": check_name(name),
            "ttl_seconds": check_ttl(ttl_seconds),
            "user_metadata": check_metadata(user_metadata),
        }
        return self._submit("save_weights_for_sampler", SaveForSampler, fields)

    def save_weights_external(
        self,
        name: str,
        ttl_seconds: Optional[int] = None,
        age_encryption_recipients: Optional[Sequence[str]] = None,
    ) -> APIFuture[SaveWeightsExternalResponse]:
        """Queue saving weights for download under *name*; the result has the ``path``.

        Args:
            name, ttl_seconds: as for `save_state`.
            age_encryption_recipients: public keys of age; the files are encrypted for them.

        The future raises RouteMissingError where the server has no such route.
        """
        fields = {
            "path": check_name(name),
            "ttl_seconds": check_ttl(ttl_seconds),
            "age_encryption_recipients": check_recipients(age_encryption_recipients),
        }
        return self._submit("save_weights_external", SaveExternal, fields)

    def load_state(
        self, path: str, weights_access_token: Optional[str] = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Queue loading the weights at *path* into this run, with a fresh optimizer."""
        return self._load("load_state", path, weights_access_token, optimizer=False)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: Optional[str] = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Queue loading weights and optimizer state at *path* into this run."""
        return self._load("load_state_with_optimizer", path, weights_access_token, optimizer=True)

    def save_weights_and_get_sampling_client(
        self,
        name: Optional[str] = None,
        retry_config: Optional[RetryConfig] = None,
        record_stability_info: bool = False,
        kind: str = "snapshot",
    ) -> SamplingClient:
        """Save the present weights for this session only, and return a client that samples them.

        Blocks.

        Args:
            name: has no effect; it is there for scripts of the official SDK.
            retry_config, record_stability_info: as for `ServiceClient.create_sampling_client`.
            kind: ``"snapshot"``: the client always samples these weights.  ``"inflight"``: it
                samples the newest weights that were saved in this way, never older ones than these;
                a generation may span an update.
        """
        return self.save_weights_and_get_sampling_client_future(
            name, retry_config, record_stability_info, kind
        ).result()

    def save_weights_and_get_sampling_client_future(
        self,
        name: Optional[str] = None,
        retry_config: Optional[RetryConfig] = None,
        record_stability_info: bool = False,
        kind: str = "snapshot",
    ) -> APIFuture[SamplingClient]:
        """Like `save_weights_and_get_sampling_client`, without blocking."""
        if kind not in ("snapshot", "inflight"):
            raise InvalidInputError(f"kind is {kind!r}; it must be 'snapshot' or 'inflight'")
        check_retry_config(retry_config)
        make_client = functools.partial(
            SamplingClient,
            self._runtime,
            base_model=self._base_model,
            retry_config=retry_config,
            record_stability_info=record_stability_info,
        )
        fields = {"kind": None if kind == "snapshot" else kind}
        what = "save_weights_and_get_sampling_client"
        return self._submit(what, SaveAndSample, fields, make_client)

    def create_sampling_client(
        self,
        model_path: str,
        retry_config: Optional[RetryConfig] = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """Return a client that samples the checkpoint at *model_path*.  Blocks.

        Further arguments as for `ServiceClient.create_sampling_client`.
        """
        return self.create_sampling_client_future(
            model_path, retry_config, record_stability_info
        ).result()

    def create_sampling_client_future(
        self,
        model_path: str,
        retry_config: Optional[RetryConfig] = None,
        record_stability_info: bool = False,
    ) -> APIFuture[SamplingClient]:
        """Like `create_sampling_client`, without blocking."""
        self._ensure_open("create_sampling_client")
        own = isinstance(model_path, str) and model_path.startswith(f"tinker://{self.model_id}/")
        return SamplingClient.create_future(
            self._runtime,
            model_path=model_path,
            known_base_model=self._base_model if own else None,
            retry_config=retry_config,
            record_stability_info=record_stability_info,
        )

    def unload(self) -> APIFuture[UnloadModelResponse]:
        """Queue unloading this run at the server, and close this client; return immediately.

        It is sent once all requests before it are done.  What was not saved is lost.  The future
        raises RouteMissingError where the server has no such route; the run then ends with its
        session.
        """
        self._ensure_open("unload")
        unloaded = self._run.unload()
        self.close()
        return unloaded

    def get_info(self) -> GetInfoResponse:
        """What the server reports about this run.  Blocks the first time; then cached."""
        self._ensure_open("get_info")
        if self._info is None:
            self._info = api.get_info(self._runtime.transport, self.model_id)
            self._base_model = self._info.model_data.model_name or self._base_model
        return self._info

    def get_tokenizer(self) -> Any:
        """A Hugging Face tokenizer of the base model (needs transformers).  May block."""
        info = self.get_info()
        name = info.model_data.model_name or info.model_name or self._base_model or ""
        return load_tokenizer(name, info.model_data.tokenizer_id)

    def get_console_url(self) -> str:
        """The run's page in the hosted service's console."""
        return training_run_url(self.model_id)

    def close(self) -> None:
        """Refuse further work; what was queued is still submitted.  See BaseClient."""
        super().close()
        self._run.drain()

    def __repr__(self) -> str:
        return f"<TrainingClient {self.model_id} of {self._base_model or 'unknown model'}>"

    def _pass(
        self,
        kind: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: LossConfig,
        breaks: Sequence[int] = (),
        handle: Optional[LossHandle] = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Queue a pass; at each index in *breaks*, in ascending order, a new request begins.

        *handle* is of a custom loss that the server computes.
        """
        config = as_loss_config(loss_fn_config)
        batch = check_batch(data, loss_fn)
        if handle is not None:
            handle.check(batch)
        self._mistakes.check_targets(batch)
        if kind == "forward_backward" and loss_fn == "cross_entropy":
            self._mistakes.check_weights(batch)
        self._ensure_open(kind)
        length = _length(batch)
        most = Tokens(prefilled=length) if kind == "forward" else Tokens(trained=length)
        return self._queue(kind, most, self._run.send_batch, batch, Loss(loss_fn, config), breaks)

    def _load(
        self, kind: str, path: str, token: Optional[str], *, optimizer: bool
    ) -> APIFuture[LoadWeightsResponse]:
        fields = {
            "path": check_tinker_path(path),
            "optimizer": optimizer,
            "weights_access_token": check_token(token),
        }
        return self._submit(kind, Load, fields)

    def _submit(
        self,
        kind: str,
        request_type: Type[EndpointRequest[T]],
        *args: Any,
        after: Optional[APIFuture[Any]] = None,
    ) -> APIFuture[T]:
        """Queue one request; *after* as for `TrainingRun.submit`."""
        self._ensure_open(kind)
        return self._run.submit(kind, request_type, *args, after=after)

    def _queue(
        self, kind: str, most: Tokens, task: Callable[..., None], *args: Any
    ) -> APIFuture[ForwardBackwardOutput]:
        """Queue a pass, as `TrainingRun.queue` does; reserves *most* of the budget for it."""
        ledger = self._runtime.ledger
        if self._base_model is None and ledger.needs_model:
            self.get_info()  # the price depends on the model
        account = Account(f"run {self.model_id}", self.usage_tag, self._base_model)
        reservation = ledger.reserve(kind, account, most)
        future: Optional[APIFuture[ForwardBackwardOutput]] = None
        try:
            future = self._run.queue(kind, task, *args)
            reservation.bind(future)
        except BaseException:  # Ctrl-C too
            if future is not None:
                future.cancel()
            reservation.release()
            raise
        return future

    # The official SDK's names for programs with an event loop of their own.
    forward_async = future_of(forward)
    forward_backward_async = future_of(forward_backward)
    forward_backward_custom_async = future_of(forward_backward_custom)
    optim_step_async = future_of(optim_step)
    save_state_async = future_of(save_state)
    save_weights_for_sampler_async = future_of(save_weights_for_sampler)
    save_weights_external_async = future_of(save_weights_external)
    load_state_async = future_of(load_state)
    load_state_with_optimizer_async = future_of(load_state_with_optimizer)
    save_weights_and_get_sampling_client_async = result_of(
        save_weights_and_get_sampling_client_future
    )
    create_sampling_client_async = result_of(create_sampling_client_future)
    get_info_async = in_thread(get_info)


def _length(data: Sequence[Datum]) -> int:
    return sum(datum.model_input.length for datum in data)
