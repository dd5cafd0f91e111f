"""TrainingClient: one training run (an adapter over a base model) on the server.

Methods check their arguments and pass requests to a `TrainingRun`, whose queue owns the thread that
sends them.
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

    Created by ServiceClient.  Methods raise InvalidInputError for bad input, before anything is
    sent, and ClientClosedError once the ServiceClient is closed.  Futures raise RequestFailedError
    if the server could not do the work, and APIError if the work could not be submitted.

    Attributes:
        model_id: the server's id of the run.
        usage_tag: `ServiceClient.usage` counts this client's tokens under this tag from the moment
            it is set.
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
                client.get_info()  # fills the cache here, in a background thread that may block
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

        Gradients accumulate until the next `optim_step`.  Outputs come back in input order:
        ``loss_fn_outputs[i]["logprobs"]`` is float32, with the shape of ``data[i]``'s
        target_tokens.  A batch over 1024 datums or 5 MB is sent in several requests, whose results
        are joined.  A later `optim_step` is sent only when all of these requests are done, and
        cancelling the future stops none of them once the first has been sent.

        Args:
            data: at least one Datum, each with the loss inputs that *loss_fn* needs.
            loss_fn: ``"cross_entropy"``, ``"importance_sampling"``, ``"ppo"``, ``"cispo"``,
                ``"dro"``, or any other loss that the server offers.
            loss_fn_config: settings of the loss.

        The future raises IncompleteGradientError if only some of several requests were executed, or
        may have been.  The run then refuses `optim_step` and any other batch until the gradient is
        complete or has been dropped.  To complete it, if possible, make the same call again: only
        the missing requests are sent, and refused examples may be replaced.  To drop it, call
        `load_state` or `load_state_with_optimizer`.  `save_state` still works, and saves the
        unchanged weights.
        """
        return self._pass("forward_backward", data, loss_fn, loss_fn_config)

    def forward_backward_custom(
        self,
        data: Sequence[Datum],
        loss_fn: Union[CustomLoss, LossHandle],
        *,
        loss_type_input: Optional[str] = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Queue a pass with your own loss, computed here with torch; return immediately.

        ``loss_fn(data, logprobs)`` gets one float32 leaf tensor per datum, with the shape of its
        target_tokens, and returns a scalar tensor and a dict of metrics.  These are added to the
        result's metrics: numbers as float, other values unchanged.  *loss_fn* runs on the run's
        queue thread, so later calls wait for it.  The result's ``loss:sum`` is your loss.

        If *loss_fn* comes from `ServiceClient.create_custom_loss` and the server has accepted it,
        the server computes it, in a single pass, like any other loss.

        Args:
            data: at least one Datum, each with ``target_tokens`` and whatever the loss reads.
            loss_fn: the function, or the handle that `ServiceClient.create_custom_loss` returned.
            loss_type_input: has no effect; deprecated.

        If *loss_fn* raises, the future raises the same error, and nothing was added to the
        gradient.  The future raises IncompleteGradientError as in `forward_backward`, except that
        making the same call again does not complete the gradient.
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
        # A forward pass for the logprobs, then a backward pass.
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
            optim_params: parameters of the run's optimizer: `AdamParams`, `DimuonParams`, or, if
                only the server knows that optimizer, a mapping or object with a ``type``.
            adam_params: the older name of *optim_params*.
        """
        if (optim_params is None) == (adam_params is None):
            raise InvalidInputError("give optim_step one set of parameters, such as AdamParams()")
        return self._optim_step(adam_params if optim_params is None else optim_params)

    def _optim_step(
        self, optim_params: object, after: Optional[APIFuture[ForwardBackwardOutput]] = None
    ) -> APIFuture[OptimStepResponse]:
        """Queue one optimizer step; cancelled if *after*, the pass before it, has failed."""
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

        Takes one round trip instead of two.  Blocks; raises the first failure.  If the pass cannot
        be submitted, the optimizer step is not sent.  Ctrl-C cancels both if neither has been sent;
        otherwise the server still executes what was sent.
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
        """Train on *batches*, one after the other; return an iterator of `PipelineStep`.

        Before it waits for a step, the pipeline submits the next *depth* - 1 steps, so the server
        never waits for the client: those steps are in progress while you handle this one::

            for step in trainer.pipeline(batches, "cross_entropy", AdamParams(), depth=2):
                print(step.index, step.metrics)

        A failure or Ctrl-C ends the pipeline.  Unsent steps are cancelled, and the error of a
        failed step names it.  Steps already sent are not undone: the log names them, and
        ``drain()`` waits for them.  Leaving a ``with`` block over the pipeline also cancels the
        unsent steps and logs the others; leaving a loop without such a block may leave up to
        *depth* - 1 steps queued.

        A checkpoint saved by the loop's body holds every step submitted so far, including those
        after the step being handled.  With *save_every* the pipeline itself saves: it queues the
        checkpoint directly behind its step, so that the checkpoint holds no later step, and later
        steps do not wait for it::

            for step in trainer.pipeline(batches, "cross_entropy", AdamParams(), save_every=100):
                if step.index % 100 == 99:
                    print(step.save_state().result().path)

        To use the weights of exactly one step in another way, such as with
        `save_weights_and_get_sampling_client`, name the step in *save_after*: the pipeline then
        submits nothing after it until you request the next step.  The step's ``save_state(name)``
        and ``save_weights_for_sampler(name)`` work there, too; they raise InvalidInputError if a
        later step has been submitted.

        Args:
            batches: read one by one, *depth* - 1 steps ahead.  If a batch is a list of lists of
                Datum, each inner list is one pass, and their gradients add up.  The optimizer step
                is sent when all passes are done; if only some were executed,
                IncompleteGradientError is raised, as in `forward_backward`.  Errors and results
                number the examples across all passes.
            loss_fn, loss_fn_config: as for `forward_backward`, or `forward_backward_custom`.
            adam_params: as for `optim_step`, or a function of the step's index, from 0.
            depth: how many steps are in progress at a time; 1 finishes each before the next.
            save_after: the steps whose weights the loop's body needs: 100 for those with index 99,
                199 and so on, or a function of the step's index that returns True for them.
            save_every: the steps to save: 100 for those with index 99, 199 and so on, under the
                names ``step-100``, ``step-200`` and so on; or a function of the step's index that
                returns a name, or None if the step is not to be saved.
            save_ttl_seconds: how long the server keeps the checkpoints of *save_every*; None is for
                ever.
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
        """Submit a pass, ``submit_pass(*args)``, and an optimizer step: both or neither."""
        optim_params_to_wire(optim_params)  # checked before the pass is sent
        passed = submit_pass(*args)
        try:
            # Not counted towards max_unread: train_step and Pipeline read the future in this very
            # thread, which would otherwise block until it is read.
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
            ttl_seconds: how long the server keeps the checkpoint; None means for ever.
            overwrite: replace a checkpoint of that name, and its metadata.
            user_metadata: strings to keep with the checkpoint, by name.
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
            age_encryption_recipients: the age public keys to encrypt the files for.

        The future raises RouteMissingError if the server has no such route.
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
        """Queue loading the weights and optimizer state at *path* into this run."""
        return self._load("load_state_with_optimizer", path, weights_access_token, optimizer=True)

    def save_weights_and_get_sampling_client(
        self,
        name: Optional[str] = None,
        retry_config: Optional[RetryConfig] = None,
        record_stability_info: bool = False,
        kind: str = "snapshot",
    ) -> SamplingClient:
        """Save the current weights for this session only, and return a client of their sampler.

        Blocks.

        Args:
            name: has no effect; accepted for scripts written for the official SDK.
            retry_config, record_stability_info: as for `ServiceClient.create_sampling_client`.
            kind: ``"snapshot"``: the client always samples from these weights.  ``"inflight"``: it
                samples from the run's newest weights saved with this kind, which are never older
                than these; a generation may span an update.
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
        """Return a client that samples from the checkpoint at *model_path*.  Blocks.

        The other arguments are as for `ServiceClient.create_sampling_client`.
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
        """Queue unloading this run from the server, and close this client; return immediately.

        The request is sent once all earlier ones are done.  Unsaved weights are lost.  The future
        raises RouteMissingError if the server has no such route; the run then ends with its
        session.
        """
        self._ensure_open("unload")
        unloaded = self._run.unload()
        self.close()
        return unloaded

    def get_info(self) -> GetInfoResponse:
        """Return what the server reports about this run.  Blocks the first time; then cached."""
        self._ensure_open("get_info")
        if self._info is None:
            self._info = api.get_info(self._runtime.transport, self.model_id)
            self._base_model = self._info.model_data.model_name or self._base_model
        return self._info

    def get_tokenizer(self) -> Any:
        """Return the base model's Hugging Face tokenizer (needs transformers).  May block."""
        info = self.get_info()
        name = info.model_data.model_name or info.model_name or self._base_model or ""
        return load_tokenizer(name, info.model_data.tokenizer_id)

    def get_console_url(self) -> str:
        """Return the URL of the run's page in the hosted service's console."""
        return training_run_url(self.model_id)

    def close(self) -> None:
        """Refuse further work; queued requests are still sent.  Idempotent; does not block."""
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
        """Queue a pass; a new request begins at each index in *breaks*, which are ascending.

        *handle* is given for a custom loss that the server computes.
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
        """Queue a pass with `TrainingRun.queue`, and reserve *most* tokens of the budget for it."""
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

    # Awaitable variants, under the official SDK's names.
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
