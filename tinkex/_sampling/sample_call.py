"""SampleCall: one request of a sampler, from its submission to its result."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Callable, Generic, Optional, Sequence, TypeVar

from tinkex._api import sampling as api
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
from tinkex.errors import UnprocessableEntityError
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
#: So many tokens are thought of where nothing limits them.
_UNLIMITED = 32_768


class SampleCall(Generic[T]):
    """One request of a sampler.  For one thread at a time."""

    __slots__ = (
        "_future",
        "_kind",
        "_pick",
        "_request",
        "_reservation",
        "_sampler",
        "_sequence_ids",
    )

    def __init__(
        self,
        sampler: Sampler,
        kind: str,
        request: types.SampleRequest,
        pick: Callable[[SampleResponse], T],
        future: APIFuture[T],
        reservation: Reservation,
    ) -> None:
        self._sampler = sampler
        self._kind = kind
        self._request = request
        self._pick = pick
        self._future = future
        self._reservation = reservation
        self._sequence_ids: Sequence[str] = ()

    def send(self, channel: AnyChannel) -> UntypedFuture:
        """Make a new request of it.  Blocks."""
        sampler, request = self._sampler, self._request
        pressure = sampler.transport.pressure
        nbytes = pressure.sample_bytes(request.prompt.length)
        try:
            with pressure.samples.holding(nbytes, channel.stopped.is_set, self._future):
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
        """Read the result."""
        sampler, request = self._sampler, self._request
        response = codec_for(reply.content_type).decode_samples(reply.body)
        sampled = sum(sequence.length for sequence in response.sequences)
        self._reservation.used = Tokens(prefilled=request.prompt.length, sampled=sampled)
        check_counts(response, request, sequences=self._kind == "sample")
        response = complete_response(response, request, self._sequence_ids)
        if not sampler.warned_of_nan and has_unknown_logprobs(response, request):
            sampler.warned_of_nan = True
            logger.warning(
                "%s by sampler %s: some logprobs are NaN, which usually means that the prompt "
                "holds token ids that the model does not have",
                self._kind,
                sampler.sampling_session_id,
            )
        return self._pick(response)

    def resubmit_after(self, times: int) -> Optional[float]:
        """After how many seconds to send it again if its result was lost; None is never."""
        sampler = self._sampler
        delay = sampler.retries.delay_s(times, random.random())
        asked = delay is not None and self._kind == "sample"
        if asked and flags_for(sampler.transport).sample_no_retries:
            return None
        return delay


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
