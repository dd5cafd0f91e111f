"""PendingSample and PendingLogprobs: the requests of a sampling client."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, List, Optional, Sequence, TypeVar

from tinkex._api import sampling as api
from tinkex._results.pending import PendingRequest, SamplerId
from tinkex._sampling.sample_checks import (
    check_counts,
    complete_response,
    has_unknown_logprobs,
    unsupported_by,
)
from tinkex._sampling.sampler import Sampler
from tinkex._transport.fast_connection import AnyChannel
from tinkex._transport.server_flags import flags_for
from tinkex._transport.transport import Reply
from tinkex.errors import ResponseDecodeError, UnprocessableEntityError
from tinkex.futures import APIFuture
from tinkex.usage import Reservation, Tokens
from tinkex.wire.codec import codec_for

if TYPE_CHECKING:
    from tinkex import types
    from tinkex.types import SampleResponse, UntypedFuture

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: A result that may take more than this, in bytes, is announced by its size first.
_LARGE_BYTES = 1 << 20
#: The number of tokens assumed where nothing limits them.
_UNLIMITED = 32_768


class SamplingRequest(PendingRequest[T]):
    """One request of a sampler; subclasses choose what of the response is the result."""

    __slots__ = ("_request", "_reservation", "_sampler", "_sequence_ids")

    binary = True
    pause_grace_s = 0.0
    #: The sequences matter; they do not where only the logprobs of the prompt are asked for.
    wants_sequences = True

    def __init__(
        self,
        future: APIFuture[T],
        owner: str,
        sampler: Sampler,
        request: types.SampleRequest,
        reservation: Reservation,
        no_progress_timeout_s: Optional[float] = None,
    ) -> None:
        large = may_be_large(request)
        super().__init__(future, owner, large=large, no_progress_timeout_s=no_progress_timeout_s)
        self._sampler = sampler
        self._request = request
        self._reservation = reservation
        self._sequence_ids: Sequence[str] = ()

    def select(self, response: SampleResponse) -> T:
        """Return what of *response* is the result."""
        raise NotImplementedError

    def send(self, channel: Optional[AnyChannel] = None) -> UntypedFuture:
        """Send it under a new seq_id; blocks while too many bytes are being submitted."""
        sampler, request = self._sampler, self._request
        assert channel is not None
        limits = sampler.limits
        nbytes = limits.sample_bytes(request.prompt.length)
        try:
            with limits.samples.holding(nbytes, channel.stopped.is_set, self.future):
                accepted = api.asample(
                    sampler.transport,
                    sampling_session_id=sampler.sampling_session_id,
                    seq_id=sampler.next_seq_id(),
                    request=request,
                    channel=channel,
                )
        except UnprocessableEntityError as error:
            unsupported = unsupported_by(error, request)
            if unsupported is None:
                raise
            raise unsupported from error
        self._sequence_ids = accepted.sample_sequence_ids or ()
        return accepted

    def decode(self, reply: Reply) -> T:
        """Read the result; the tokens it used are charged once the future is settled."""
        request = self._request
        response = codec_for(reply.content_type).decode_samples(reply.body)
        sampled = sum(sequence.length for sequence in response.sequences)
        self._reservation.used = Tokens(prefilled=request.prompt.length, sampled=sampled)
        check_counts(response, request, sequences=self.wants_sequences)
        response = complete_response(response, request, self._sequence_ids)
        self._warn_of_nan(response)
        return self.select(response)

    def _warn_of_nan(self, response: SampleResponse) -> None:
        sampler = self._sampler
        if sampler.warned_of_nan or not has_unknown_logprobs(response, self._request):
            return
        sampler.warned_of_nan = True
        logger.warning(
            "%s by sampler %s: some logprobs are NaN, which usually means that the prompt "
            "holds token ids that the model does not have",
            self.future.kind,
            sampler.sampling_session_id,
        )

    def retry_after_loss(self) -> Optional[float]:
        """As the client's RetryConfig says, unless the server's flags forbid retries."""
        sampler = self._sampler
        delay_s = sampler.retries.delay_s(self.losses, random.random())
        if delay_s is not None and self.wants_sequences:
            return None if flags_for(sampler.transport).sample_no_retries else delay_s
        return delay_s

    def sampler_id(self) -> SamplerId:
        """The sampler; a clone's number is known once a request of it was sent."""
        return self._sampler.id


class PendingSample(SamplingRequest["SampleResponse"]):
    """A call of `SamplingClient.sample`."""

    __slots__ = ()

    def select(self, response: SampleResponse) -> SampleResponse:
        """The response as it is."""
        return response


class PendingLogprobs(SamplingRequest[List[Optional[float]]]):
    """A call of `SamplingClient.compute_logprobs`."""

    __slots__ = ()

    wants_sequences = False

    def select(self, response: SampleResponse) -> List[Optional[float]]:
        """The logprobs of the prompt."""
        logprobs = response.prompt_logprobs
        if logprobs is None:
            raise ResponseDecodeError("compute_logprobs: the response has no prompt logprobs")
        return logprobs


def may_be_large(request: types.SampleRequest) -> bool:
    """Whether the result may take so much memory that its size should be asked for first."""
    tokens = request.num_samples * (request.sampling_params.max_tokens or _UNLIMITED)
    values = tokens * (2 + 2 * request.topk_sample_logprobs)
    wanted = request.topk_prompt_logprobs + request.prompt_alt_tokens_k
    if request.prompt_logprobs or wanted or request.target_prompt_logprobs is not None:
        targets = request.target_prompt_logprobs
        values += request.prompt.length * (1 + 2 * wanted)
        values += 0 if targets is None else targets.values.size
    return 4 * values > _LARGE_BYTES
