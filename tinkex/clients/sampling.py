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

    Made by ServiceClient or TrainingClient.  Methods raise InvalidInputError for bad input, before
    anything is sent, and ClientClosedError once the ServiceClient is closed.

    Attributes:
        sampling_session_id: the server's id of the sampler.
        usage_tag: `ServiceClient.usage` counts what this client uses from then on under this tag.

    Args:
        retry_config: limits and retries of this client; None takes RetryConfig's for the retries,
            and the session's settings for the limits.
        record_stability_info: as for `ServiceClient.create_sampling_client`.
        clone: this is another client of a sampler that exists already.
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
        # Of the latest request: thousands of reservations share one account.
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
        # Taken here rather than in the background, so that samplers are numbered in the order of
        # the calls.
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

        Cancelling the future frees its place immediately, and cancels the work at the server if
        that supports it.

        Args:
            prompt: n tokens, at least one.
            num_samples: how many, drawn as one batch.
            sampling_params: how tokens are drawn; the defaults of SamplingParams if None.
            include_prompt_logprobs: also return the logprob of each prompt token.
            topk_prompt_logprobs, topk_sample_logprobs: also return the likeliest tokens at each
                prompt, or sampled, position.
            target_prompt_logprobs: int64 token ids ``(n - 1, k)``, dense or CSR, to get logprobs
                of; row r belongs to prompt token r + 1, and -1 skips a cell.
            prompt_alt_tokens_k: alternative draws per prompt position.
            prompt_logprobs_last_n: logprobs of the last 1 .. n - 1 prompt tokens only; needs
                *include_prompt_logprobs*.

        The future raises RequestFailedError if the server rejects the request, UnsupportedError if
        the server is too old for an option and ignored it, and ResponseDecodeError if the result
        does not hold *num_samples* sequences, or lacks the prompt logprobs.
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
        """Sample every prompt, many at a time; return an iterator of `Sampled`.

        Nothing is submitted before the first result is asked for.  *prompts* is read in the thread
        that iterates, as results are taken, so memory does not grow with its length.  Closing the
        iterator, leaving a ``with`` block over it, Ctrl-C, and dropping the last reference to it
        cancel what is in flight.  Threads may share the iterator.

        Args:
            prompts: any iterable, of any length.
            sampling_params, num_samples: as for `sample`, of every prompt.
            max_in_flight: how many prompts may be submitted and not returned yet; with
                ``order="input"`` up to four times as many may be held, waiting for an earlier one.
                None is the session's ``max_concurrent_samples``.
            order: ``"completion"`` returns results as they arrive, ``"input"`` in the order of
                *prompts*.
            on_error: what a failed prompt does.  ``"raise"`` raises its error immediately and ends
                the iteration; ``"yield"`` returns a `Sampled` with the error; ``"skip"`` leaves it
                out, with one warning at the end.  A closed client always raises; a used-up budget
                raises once everything submitted before was returned.
            progress: True shows a bar on stderr if that is a terminal; a function is called as
                ``progress(done, failed, total)`` after each prompt, *total* None if unknown.
            options: further arguments of `sample`.

        Raises:
            InvalidInputError: an argument is wrong; for a bad prompt, *on_error* decides.
        """
        from tinkex.clients.sample_stream import SampleStream

        self._ensure_open("sample_many")
        config = self._runtime.config
        if max_in_flight is None:
            max_in_flight = config.max_concurrent_samples
        max_in_flight = as_int("max_in_flight", max_in_flight, 1, text=False)
        if config.max_unread is not None:
            # Beyond it, submitting blocks until a future is read, which only this thread would do.
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

        The result has one entry per token; the first, which nothing predicts, is None, and so are
        those before the last *prompt_logprobs_last_n* tokens.
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
        """Name of the base model.  Blocks if it has to be requested; then cached."""
        if self._base_model is None:
            sampler = self._get_sampler("get_base_model")
            self._base_model = self._ask_base_model() if sampler is None else sampler.base_model
        return self._base_model

    def get_tokenizer(self) -> Any:
        """A Hugging Face tokenizer of the base model (needs transformers).  May block."""
        sampler = self._get_sampler("get_tokenizer")
        if sampler is None:
            return load_tokenizer(self._base_model or self._ask_base_model())
        return load_tokenizer(sampler.base_model, sampler.tokenizer_id)

    def _get_sampler(self, what: str) -> Optional[GetSamplerResponse]:
        """What the server reports about the sampler; None if it cannot, and that is dispensable."""
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
        """Text from which another process can make a client of the same sampler.

        It is valid while the session lives.  It holds no retry_config, and no key unless
        *include_api_key*; the receiver then uses its own key if this is its own server, too (see
        `from_sampler_handle`).  Pickling a client does the same, except that the receiver of a
        pickle always uses its own key.
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
        """Make a client from what `get_sampler_handle` returned.  Sends nothing.

        The session is kept alive from this process too, and not ended with it.

        Args:
            handle: names the server.  A forged one can make this process send prompts to another
                server, but not its key.
            api_key: of that server.  By default the one in the handle, if there is one; else this
                process's own, but only if the server is this process's too: the one that
                ``TINKER_BASE_URL`` names, or else the hosted service.

        Raises:
            InvalidInputError: *handle* is not one.
            ConfigError: a setting in it is out of its range.
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
        """Set aside, of the budget, the most that *request* may use."""
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

    # The official SDK's names for programs with an event loop of their own.
    sample_async = result_of(sample)
    compute_logprobs_async = result_of(compute_logprobs)
    get_base_model_async = in_thread(get_base_model)


def _unpickle(handle: str) -> SamplingClient:
    # A pickle that is loaded can run any code: its server is trusted with this process's own key.
    return SamplingClient._from_handle(handle, trusted=True)
