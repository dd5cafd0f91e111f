"""SamplingClient: samples from a base model or a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterable, List, Optional, Tuple, Type, TypeVar

from tinkex import types
from tinkex._api import sampling as api
from tinkex._api.rest import get_weights_info
from tinkex._results.concurrency_gate import SampleGate
from tinkex._runtime.awaiting import in_thread, result_of
from tinkex._runtime.numeric import as_int
from tinkex._sampling.requests import PendingLogprobs, PendingSample, Sampler, SamplingRequest
from tinkex._sampling.sample_checks import check_request
from tinkex._sampling.sampler_handle import (
    SamplerHandle,
    config_of_handle,
    read_handle,
    warn_of_withheld_key,
    write_handle,
)
from tinkex._sessions.manager import default_manager
from tinkex._sessions.runtime import Runtime
from tinkex._transport.server_flags import ABSENT
from tinkex.clients.base import BaseClient
from tinkex.clients.tokenizers import load_tokenizer
from tinkex.errors import APIStatusError, InvalidInputError
from tinkex.futures import APIFuture
from tinkex.retry import RetryConfig, check_retry_config
from tinkex.types.checkpoint_path import check_model_name, check_tinker_path
from tinkex.usage import Account, Reservation, Tokens

if TYPE_CHECKING:
    from tinkex.clients.sample_stream import Progress, SampleStream
    from tinkex.types import (
        GetSamplerResponse,
        ModelInput,
        SampleResponse,
        SamplingParams,
        TensorData,
    )

T = TypeVar("T")


class SamplingClient(BaseClient):
    """Samples from one set of weights.  Thread-safe; requests run in any order.

    Created by ServiceClient or TrainingClient.  Methods raise InvalidInputError for bad input,
    before anything is sent, and ClientClosedError once the ServiceClient is closed.

    Attributes:
        sampling_session_id: the server's id of the sampler.
        usage_tag: `ServiceClient.usage` counts this client's tokens under this tag from the moment
            it is set.

    Args:
        retry_config: limits and retries of this client; with None, the retries are those of a
            default RetryConfig, and the limits come from the session's settings.
        record_stability_info: as for `ServiceClient.create_sampling_client`.
        clone: whether another client of this sampler already exists.
    """

    usage_tag: Optional[str] = None

    def __init__(
        self,
        runtime: Runtime,
        sampling_session_id: str,
        base_model: Optional[str] = None,
        *,
        model_path: Optional[str] = None,
        retry_config: Optional[RetryConfig] = None,
        record_stability_info: bool = False,
        clone: bool = False,
    ) -> None:
        super().__init__(runtime)
        self.sampling_session_id = sampling_session_id
        self._base_model = base_model
        self._model_path = model_path
        self._record_stability_info = record_stability_info
        self._no_progress_s = None if retry_config is None else retry_config.no_progress_timeout_s
        limit = None if retry_config is None else retry_config.max_connections
        self._gate = SampleGate(limit)
        self._sampler = Sampler(
            runtime.resources, sampling_session_id, retry_config or RetryConfig(), clone=clone
        )
        # The account of the latest request, cached because thousands of reservations share it.
        self._account = Account(f"sampler {sampling_session_id}", None, base_model)

    @classmethod
    def create_future(
        cls,
        runtime: Runtime,
        *,
        model_path: Optional[str] = None,
        base_model: Optional[str] = None,
        known_base_model: Optional[str] = None,
        retry_config: Optional[RetryConfig] = None,
        record_stability_info: bool = False,
    ) -> APIFuture[SamplingClient]:
        """Create the server's sampler; return immediately.  See `ServiceClient`."""
        check_retry_config(retry_config)
        if model_path is None and base_model is None:
            raise InvalidInputError("give model_path or base_model")
        if model_path is not None:
            if isinstance(model_path, str) and "://" not in model_path:
                raise InvalidInputError(
                    f"model_path is {model_path!r}, which is not the path of a checkpoint",
                    hint=f"A base model is given by name: base_model={model_path!r}.",
                )
            model_path = check_tinker_path(model_path)
        if base_model is not None:
            base_model = check_model_name(base_model)
        runtime.ensure_open("create_sampling_client")
        # Taken here rather than in the background thread, so that samplers are numbered in call
        # order.
        seq_id = runtime.session.next_sampler_seq_id()

        def create() -> SamplingClient:
            created = api.create_sampling_session(
                runtime.transport,
                session_id=runtime.session.session_id,
                sampling_session_seq_id=seq_id,
                base_model=base_model,
                model_path=model_path,
            )
            if isinstance(created, types.UntypedFuture):
                from tinkex._training.create_run import wait_for_result

                created = wait_for_result(
                    runtime, "create_sampling_session", created, types.CreateSamplingSessionResponse
                )
            return cls(
                runtime,
                created.sampling_session_id,
                base_model or known_base_model,
                model_path=model_path,
                retry_config=retry_config,
                record_stability_info=record_stability_info,
            )

        return runtime.run("create_sampling_client", create)

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: Optional[SamplingParams] = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: Optional[TensorData] = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: Optional[int] = None,
    ) -> APIFuture[SampleResponse]:
        """Draw *num_samples* continuations of *prompt*; return immediately.

        Cancelling the future frees its slot immediately, and cancels the work on the server if the
        server supports that.

        Args:
            prompt: n tokens, at least one.
            num_samples: how many continuations to draw, as one batch.
            sampling_params: how to draw tokens; the defaults of SamplingParams if None.
            include_prompt_logprobs: also return the logprob of each prompt token.
            topk_prompt_logprobs, topk_sample_logprobs: also return this many of the likeliest
                tokens at each prompt position, or at each sampled one.
            target_prompt_logprobs: also return the logprobs of these token ids: int64, shape
                ``(n - 1, k)``, dense or CSR.  Row r belongs to prompt token r + 1; -1 skips a cell.
            prompt_alt_tokens_k: how many alternative tokens to draw per prompt position.
            prompt_logprobs_last_n: how many of the last prompt tokens to return logprobs for, 1 to
                n - 1; needs *include_prompt_logprobs*.

        The future raises RequestFailedError if the server rejects the request, UnsupportedError if
        the server is too old for an option and ignored it, and ResponseDecodeError if the result
        does not have *num_samples* sequences, or lacks the prompt logprobs.
        """
        request = types.SampleRequest(
            prompt=prompt,
            num_samples=num_samples,
            sampling_params=sampling_params or types.SamplingParams(),
            prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
            target_prompt_logprobs=target_prompt_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            record_stability_info=self._record_stability_info,
        )
        return self._submit("sample", request, PendingSample)

    def sample_many(
        self,
        prompts: Iterable[ModelInput],
        sampling_params: Optional[SamplingParams] = None,
        *,
        num_samples: int = 1,
        max_in_flight: Optional[int] = None,
        order: str = "completion",
        on_error: str = "raise",
        progress: Progress = False,
        **options: Any,
    ) -> SampleStream:
        """Sample from every prompt, many at a time; return an iterator of `Sampled`.

        Nothing is submitted until the first result is requested.  The iterating thread reads
        *prompts* as it takes results, so memory does not grow with their number.  Requests in
        flight are cancelled when the iterator is closed, when a ``with`` block over it is left, on
        Ctrl-C, and when the last reference to the iterator is dropped.  Threads may share it.

        Args:
            prompts: any iterable, of any length.
            sampling_params, num_samples: as for `sample`, for every prompt.
            max_in_flight: how many prompts may be in flight at a time; with ``order="input"``, up
                to four times as many may be submitted or finished ahead of the next result.  None
                is the session's ``max_concurrent_samples``.
            order: ``"completion"`` returns results as they arrive, ``"input"`` in the order of
                *prompts*.
            on_error: what happens if a prompt fails: ``"raise"`` raises its error immediately and
                ends the iteration; ``"yield"`` returns a `Sampled` with the error; ``"skip"`` omits
                the prompt, and logs one warning at the end.  A closed client always raises; an
                exhausted budget raises once the results of all submitted prompts were returned.
            progress: True shows a progress bar if stderr is a terminal; a function is called as
                ``progress(done, failed, total)`` after each prompt, with None for an unknown total.
            options: further arguments of `sample`.

        Raises:
            InvalidInputError: an argument is invalid; for a bad prompt, *on_error* decides.
        """
        from tinkex.clients.sample_stream import SampleStream

        self._ensure_open("sample_many")
        config = self._runtime.config
        if max_in_flight is None:
            max_in_flight = config.max_concurrent_samples
        max_in_flight = as_int("max_in_flight", max_in_flight, 1, text=False)
        if config.max_unread is not None:
            # Beyond max_unread, submitting blocks until a future is read, and only this thread
            # reads these futures.
            max_in_flight = min(max_in_flight, config.max_unread)

        def sample(prompt: ModelInput) -> APIFuture[SampleResponse]:
            return self.sample(prompt, num_samples, sampling_params, **options)

        return SampleStream(
            sample,
            prompts,
            max_in_flight=max_in_flight,
            order=order,
            on_error=on_error,
            progress=progress,
            notice_after_s=config.notice_after_s,
        )

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: Optional[int] = None
    ) -> APIFuture[List[Optional[float]]]:
        """Compute the logprob of each token of *prompt*; return immediately.

        The result has one entry per token; the first is None, because nothing predicts that token.
        With *prompt_logprobs_last_n* = k, only the last k entries are logprobs; the others are
        None.
        """
        request = types.SampleRequest(
            prompt=prompt,
            sampling_params=types.SamplingParams(max_tokens=1),  # the token is discarded
            prompt_logprobs=True,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
            record_stability_info=self._record_stability_info,
        )
        return self._submit("compute_logprobs", request, PendingLogprobs)

    def get_base_model(self) -> str:
        """Return the name of the base model.  May block the first time; then cached."""
        if self._base_model is None:
            sampler = self._get_sampler("get_base_model")
            self._base_model = self._ask_base_model() if sampler is None else sampler.base_model
        return self._base_model

    def get_tokenizer(self) -> Any:
        """Return the base model's Hugging Face tokenizer (needs transformers).  May block."""
        sampler = self._get_sampler("get_tokenizer")
        if sampler is None:
            return load_tokenizer(self._base_model or self._ask_base_model())
        return load_tokenizer(sampler.base_model, sampler.tokenizer_id)

    def _get_sampler(self, what: str) -> Optional[GetSamplerResponse]:
        """Return what the server reports about the sampler.

        None if it does not support that, and the base model can be found in another way.
        """
        self._ensure_open(what)
        try:
            return api.get_sampler(self._runtime.transport, self.sampling_session_id)
        except APIStatusError as error:
            dispensable = self._base_model is not None or self._model_path is not None
            if not dispensable or error.status not in ABSENT:
                raise
            return None

    def _ask_base_model(self) -> str:
        return get_weights_info(self._runtime.transport, self._model_path or "").base_model

    def get_sampler_handle(self, *, include_api_key: bool = False) -> str:
        """Return a text from which another process can create a client of the same sampler.

        The handle is valid while the session lives.  It contains no retry_config, and no key unless
        *include_api_key*; without a key, the receiver uses its own, provided that it is configured
        for the same server (see `from_sampler_handle`).  Pickling a client has the same effect,
        except that the process that unpickles it always uses its own key.
        """
        facts = SamplerHandle(
            self._runtime.session.session_id,
            self.sampling_session_id,
            self._base_model,
            self._model_path,
            self._record_stability_info,
        )
        return write_handle(facts, self._runtime.config, include_api_key=include_api_key)

    @classmethod
    def from_sampler_handle(cls, handle: str, *, api_key: Optional[str] = None) -> SamplingClient:
        """Create a client from the result of `get_sampler_handle`.  Sends nothing.

        This process then also keeps the session alive, but does not end it.

        Args:
            handle: the text, which names the server.  A forged handle can make this process send
                prompts to another server, but not its key.
            api_key: the key for that server.  By default the key in the handle, if any; otherwise
                this process's own key, but only if this process is configured for the same server:
                the one that ``TINKER_BASE_URL`` names, or else the hosted service.

        Raises:
            InvalidInputError: *handle* is not a handle.
            ConfigError: a setting in the handle is out of range.
        """
        return cls._from_handle(handle, api_key)

    @classmethod
    def _from_handle(
        cls, handle: str, api_key: Optional[str] = None, *, trusted: bool = False
    ) -> SamplingClient:
        facts, settings = read_handle(handle)
        if api_key is not None:
            settings["api_key"] = api_key
        config = config_of_handle(settings, trusted=trusted)
        runtime = Runtime.attach(config, default_manager(), facts.session_id)
        if runtime.config is config and not trusted:
            warn_of_withheld_key(config)
        return cls(
            runtime,
            facts.sampling_session_id,
            facts.base_model,
            model_path=facts.model_path,
            record_stability_info=facts.record_stability_info,
            clone=True,
        )

    def __reduce__(self) -> Tuple[Any, ...]:
        return _unpickle, (self.get_sampler_handle(),)

    def __repr__(self) -> str:
        return (
            f"<SamplingClient {self.sampling_session_id} of {self._base_model or 'a checkpoint'}>"
        )

    def _submit(
        self, kind: str, request: types.SampleRequest, make: Type[SamplingRequest[T]]
    ) -> APIFuture[T]:
        check_request(request)
        runtime = self._runtime
        self._ensure_open(kind)
        reservation = self._reserve(kind, request)
        future: Optional[APIFuture[T]] = None
        try:
            future = runtime.poller.new_future(kind, counted=True)
            reservation.bind(future)
            owner = self._account.client
            pending = make(future, owner, self._sampler, request, reservation, self._no_progress_s)
            self._gate.enter(pending, runtime.poller.submit)
        except BaseException:  # Ctrl-C: nothing else would settle it
            if future is not None:
                future.cancel()
            reservation.release()
            raise
        return future

    def _reserve(self, kind: str, request: types.SampleRequest) -> Reservation:
        """Reserve tokens of the budget: the most that *request* may use."""
        ledger = self._runtime.ledger
        most_each = request.sampling_params.max_tokens
        if most_each is None and ledger.budget is not None:
            raise InvalidInputError(
                f"{kind}: with a budget, sampling_params needs max_tokens",
                hint="Without it, the most that the request may use is not known beforehand.",
            )
        most = Tokens(
            prefilled=request.prompt.length, sampled=request.num_samples * (most_each or 0)
        )
        model = self.get_base_model() if ledger.needs_model else self._base_model
        account = self._account
        if account[1:] != (self.usage_tag, model):
            account = self._account = account._replace(tag=self.usage_tag, model=model)
        return ledger.reserve(kind, account, most)

    # Awaitable variants, under the official SDK's names.
    sample_async = result_of(sample)
    compute_logprobs_async = result_of(compute_logprobs)
    get_base_model_async = in_thread(get_base_model)


def _unpickle(handle: str) -> SamplingClient:
    # Loading a pickle can already run any code, so withholding this process's key from the server
    # that it names would protect nothing.
    return SamplingClient._from_handle(handle, trusted=True)
