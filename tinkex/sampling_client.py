"""SamplingClient: samples from a base model or a checkpoint."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import secrets
from typing import Any, Callable, List, Optional, Tuple, TypeVar

import orjson

from tinkex.api import sampling as api
from tinkex.channel import Channel
from tinkex.child_client import ChildClient
from tinkex.config import Config
from tinkex.errors import APIStatusError, InvalidInputError, ResponseDecodeError
from tinkex.futures import APIFuture
from tinkex.poller import Operation
from tinkex.session import Session
from tinkex.session_manager import default_manager
from tinkex.tokenizers import load_tokenizer
from tinkex.transport import Reply
from tinkex.types import (
    GetSamplerResponse,
    ModelInput,
    SampleRequest,
    SampleResponse,
    SamplingParams,
    TensorData,
    UntypedFuture,
)
from tinkex.types.checkpoint_path import check_tinker_path
from tinkex.wire.codec import align_prompt_logprobs
from tinkex.wire.codecs import codec_for

T = TypeVar("T")

#: Samples may be asked for a logprob only; this draws one token and throws it away.
_ONE_TOKEN = SamplingParams(max_tokens=1)

#: Sequence numbers of clone n start at n times this (reference, section 5.6).
CLONE_BLOCK = 10**9

#: What a handle tells of the settings.  Not the key, nor what may hold a secret or a path.
_HANDED_ON = (
    "base_url",
    "wire",
    "heartbeat_interval_s",
    "heartbeat_warn_after_s",
    "max_outage_s",
    "max_concurrent_samples",
)


class SamplingClient(ChildClient):
    """Samples from one set of weights.  Thread-safe; requests run in any order.

    Made by ServiceClient or TrainingClient.  Methods raise InvalidInputError for bad input, before
    anything is sent, and ClientClosedError once the ServiceClient is closed.

    Attributes:
        sampling_session_id: the server's id of the sampler.
    """

    def __init__(
        self,
        session: Session,
        sampling_session_id: str,
        base_model: Optional[str] = None,
        clone_id: int = 0,
    ) -> None:
        super().__init__(session)
        self.sampling_session_id = sampling_session_id
        self._base_model = base_model
        # next() is atomic.  Clones in other processes count in blocks of their own.
        self._seq_ids = itertools.count(clone_id * CLONE_BLOCK)

    @classmethod
    def create_future(
        cls,
        session: Session,
        *,
        model_path: Optional[str] = None,
        base_model: Optional[str] = None,
        known_base_model: Optional[str] = None,
    ) -> APIFuture[SamplingClient]:
        """Create the server's sampler; return at once.  See `ServiceClient`."""
        if (model_path is None) == (base_model is None):
            raise InvalidInputError("give either model_path or base_model")
        if model_path is not None:
            check_tinker_path(model_path)
        elif not isinstance(base_model, str) or not base_model:
            raise InvalidInputError(f"base_model is {base_model!r}; give the name of a model")
        session.ensure_open("create_sampling_client")
        number = session.next_sampler_number()

        def create() -> SamplingClient:
            created = api.create_sampling_session(
                session.transport,
                session_id=session.session_id,
                sampling_session_seq_id=number,
                base_model=base_model,
                model_path=model_path,
            )
            return cls(session, created.sampling_session_id, base_model or known_base_model)

        return session.run("create_sampling_client", create)

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
        """Draw *num_samples* continuations of *prompt*; return at once.

        Args:
            prompt: at least one token.
            num_samples: how many, drawn as one batch.
            sampling_params: how tokens are drawn; the defaults of SamplingParams if None.
            include_prompt_logprobs: also return the logprob of each prompt token.
            topk_prompt_logprobs, topk_sample_logprobs: also return the likeliest tokens at each
                prompt, or sampled, position.
            target_prompt_logprobs: int64 token ids ``(len(prompt) - 1, k)`` to get logprobs of.
            prompt_alt_tokens_k: alternative draws per prompt position.
            prompt_logprobs_last_n: logprobs of the last n prompt tokens only.
        """
        request = SampleRequest(
            prompt=prompt,
            num_samples=num_samples,
            sampling_params=sampling_params or SamplingParams(),
            prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
            target_prompt_logprobs=target_prompt_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
        )
        return self._submit("sample", request, lambda response: response)

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: Optional[int] = None
    ) -> APIFuture[List[Optional[float]]]:
        """Compute the logprob of each token of *prompt*; return at once.

        The result has one entry per token; the first, which nothing predicts, is None.
        """
        request = SampleRequest(
            prompt=prompt,
            sampling_params=_ONE_TOKEN,
            prompt_logprobs=True,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        return self._submit("compute_logprobs", request, _prompt_logprobs)

    def get_base_model(self) -> str:
        """Name of the base model.  Blocks if the server must be asked; then cached."""
        if self._base_model is None:
            self._base_model = self._get_sampler("get_base_model").base_model
        return self._base_model

    def get_tokenizer(self) -> Any:
        """A Hugging Face tokenizer of the base model (needs transformers).  May block."""
        try:
            sampler = self._get_sampler("get_tokenizer")
        except APIStatusError as error:
            if self._base_model is None or error.status not in (404, 405, 501):
                raise
            return load_tokenizer(self._base_model)  # a server without this route
        return load_tokenizer(sampler.base_model, sampler.tokenizer_id)

    def _get_sampler(self, what: str) -> GetSamplerResponse:
        self._ensure_open(what)
        return api.get_sampler(self._session.transport, self.sampling_session_id)

    def get_sampler_handle(self, *, include_api_key: bool = False) -> str:
        """Text from which another process can make a client of the same sampler.

        It works while the session lives.  The key is left out unless asked for; the receiver then
        uses its own.  Pickling a client does the same.
        """
        config = self._session.config
        settings = {name: getattr(config, name) for name in _HANDED_ON}
        if include_api_key:
            settings["api_key"] = config.api_key
        state = {
            "session_id": self._session.session_id,
            "sampling_session_id": self.sampling_session_id,
            "base_model": self._base_model,
            "settings": settings,
        }
        return base64.urlsafe_b64encode(orjson.dumps(state)).decode("ascii")

    @classmethod
    def from_sampler_handle(cls, handle: str, *, api_key: Optional[str] = None) -> SamplingClient:
        """Make a client from what `get_sampler_handle` returned.  Sends nothing.

        The session is kept alive from this process too, and not ended with it.

        Raises:
            InvalidInputError: *handle* is not one.
        """
        try:
            state = orjson.loads(base64.urlsafe_b64decode(handle))
            settings = dict(state["settings"])
            session_id, sampler_id = state["session_id"], state["sampling_session_id"]
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInputError(f"this is not a sampler handle: {error}") from error
        if api_key is not None:
            settings["api_key"] = api_key
        session = Session.attach(Config.resolve(**settings), default_manager(), session_id)
        clone_id = 1 + secrets.randbelow(CLONE_BLOCK)
        return cls(session, sampler_id, state.get("base_model"), clone_id)

    def __reduce__(self) -> Tuple[Any, ...]:
        return SamplingClient.from_sampler_handle, (self.get_sampler_handle(),)

    def __repr__(self) -> str:
        return (
            f"<SamplingClient {self.sampling_session_id} of {self._base_model or 'a checkpoint'}>"
        )

    def _submit(
        self, kind: str, request: SampleRequest, pick: Callable[[SampleResponse], T]
    ) -> APIFuture[T]:
        _check(request)
        session = self._session
        self._ensure_open(kind)
        future: APIFuture[T] = session.poller.new_future(kind)
        seq_id = next(self._seq_ids)
        sequence_ids: List[str] = []

        def send(channel: Channel) -> UntypedFuture:
            accepted = api.asample(
                session.transport,
                sampling_session_id=self.sampling_session_id,
                seq_id=seq_id,
                request=request,
                channel=channel,
            )
            sequence_ids.extend(accepted.sample_sequence_ids or ())
            return accepted

        def decode(reply: Reply) -> T:
            response = codec_for(reply.content_type).decode_samples(reply.body)
            if response.prompt_logprobs_np is not None:
                response = align_prompt_logprobs(response, request.prompt.length)
            return pick(_with_ids(response, sequence_ids))

        session.poller.submit_sample(Operation(future, decode, binary=True), send)
        return future


def _prompt_logprobs(response: SampleResponse) -> List[Optional[float]]:
    logprobs = response.prompt_logprobs
    if logprobs is None:
        raise ResponseDecodeError("compute_logprobs: the answer has no prompt logprobs")
    return logprobs


def _with_ids(response: SampleResponse, sequence_ids: List[str]) -> SampleResponse:
    """The ids come with the submission's answer, not with the result; some servers send none."""
    if len(sequence_ids) != len(response.sequences):
        return response
    pairs = zip(response.sequences, sequence_ids)
    named = [dataclasses.replace(sequence, sequence_id=name) for sequence, name in pairs]
    return dataclasses.replace(response, sequences=named)


def _check(request: SampleRequest) -> None:
    if not isinstance(request.prompt, ModelInput):
        raise InvalidInputError(
            f"the prompt is a {type(request.prompt).__name__}, not a ModelInput",
            hint="Encode text first: ModelInput.from_ints(tokenizer.encode(text)).",
        )
    if request.prompt.length == 0:
        raise InvalidInputError("the prompt has no tokens")
    if not isinstance(request.sampling_params, SamplingParams):
        raise InvalidInputError(
            f"sampling_params is a {type(request.sampling_params).__name__}, not SamplingParams"
        )
    if not isinstance(request.target_prompt_logprobs, (TensorData, type(None))):
        raise InvalidInputError(
            f"target_prompt_logprobs is a {type(request.target_prompt_logprobs).__name__}; "
            "it must be a TensorData"
        )
    request.check()
    last_n = request.prompt_logprobs_last_n
    if last_n is not None and last_n >= request.prompt.length:
        raise InvalidInputError(
            f"prompt_logprobs_last_n is {last_n}; it must lie in 1 .. len(prompt) - 1"
        )
