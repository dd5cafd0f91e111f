"""A sampler on the server, and the requests that a sampling client sends to it."""

from __future__ import annotations

import itertools
import random
import secrets
from typing import TYPE_CHECKING, Iterator, List, Optional, Sequence, TypeVar

from tinkex._api import sampling as api
from tinkex._results.notices import NaNWarning
from tinkex._results.pending import PendingRequest, SamplerId
from tinkex._runtime.single_flight import SingleFlight
from tinkex._sampling.sample_checks import (
    check_counts,
    complete_response,
    has_unknown_logprobs,
    unsupported_by,
)
from tinkex._transport.request import Reply
from tinkex._transport.server_flags import ABSENT, flags_for
from tinkex.errors import APIStatusError, ResponseDecodeError, UnprocessableEntityError
from tinkex.futures import APIFuture
from tinkex.retry import RetryConfig
from tinkex.usage import Reservation, Tokens
from tinkex.wire.codec import codec_for

if TYPE_CHECKING:
    from tinkex import types
    from tinkex._transport.fast_connection import AnyChannel
    from tinkex._transport.resources import ClientResources
    from tinkex.types import SampleResponse, UntypedFuture

T = TypeVar("T")

#: If a result may take more bytes than this, its size is requested first.
_LARGE_BYTES = 1 << 20
#: The number of sampled tokens assumed if max_tokens does not limit it.
_UNLIMITED = 32_768
#: The seq_ids of clone n start at n times this (docs/protocol.md, "Clones").
CLONE_BLOCK = 10**9


class Sampler:
    """A sampler on the server, as one client uses it, with the seq_ids of that client's requests.

    Thread-safe.

    Attributes:
        nan_warning: shown once, if logprobs of the sampler are NaN.

    Args:
        clone: True if another client created the sampler.  The seq_ids are then in a block of
            their own, which is known once the first request is sent.
    """

    def __init__(
        self,
        resources: ClientResources,
        sampling_session_id: str,
        retries: RetryConfig,
        *,
        clone: bool,
    ) -> None:
        self.transport = resources.transport
        self.limits = resources.limits
        self.sampling_session_id = sampling_session_id
        self.retries = retries
        self.nan_warning = NaNWarning(f"sampler {sampling_session_id}")
        # Shared by all workers: next() of a count is atomic.
        self._seq_ids: Optional[Iterator[int]] = None if clone else itertools.count()
        self._clone = 0  # the number of a clone, once it has joined
        self._joining: SingleFlight[Iterator[int]] = SingleFlight()

    @property
    def id(self) -> SamplerId:
        """The sampler as the server names it; for a clone, known once it has sent a request."""
        return SamplerId(self.sampling_session_id, self._clone)

    def next_seq_id(self) -> int:
        """Return the next seq_id; for a clone, the first call may block.  Called by workers."""
        seq_ids = self._seq_ids
        if seq_ids is None:
            seq_ids = self._joining.run(self._join, self.transport.closing)
        return next(seq_ids)

    def _join(self) -> Iterator[int]:
        # Another thread may have joined after `next_seq_id` read _seq_ids and before this call.
        if self._seq_ids is None:
            self._clone = self._clone_id()
            # Set last: a thread that finds it set sends at once, and then needs the right `id`.
            self._seq_ids = itertools.count(self._clone * CLONE_BLOCK)
        return self._seq_ids

    def _clone_id(self) -> int:
        if flags_for(self.transport).sample_join_sampling_session:
            try:
                joined = api.join_sampling_session(self.transport, self.sampling_session_id)
            except APIStatusError as error:
                if error.status not in ABSENT:
                    raise
            else:
                if 0 < joined.client_counter <= CLONE_BLOCK:
                    return joined.client_counter
                raise ResponseDecodeError(
                    f"join_sampling_session: the client_counter {joined.client_counter} is not the "
                    "number of a clone"
                )
        # The server does not number clones: most likely, no other clone uses a random block.
        return 1 + secrets.randbelow(CLONE_BLOCK)


class SamplingRequest(PendingRequest[T]):
    """One request to a sampler; subclasses select the result from the response."""

    __slots__ = ("_request", "_reservation", "_sampler", "_sequence_ids")

    binary = True
    pause_grace_s = 0.0
    #: Whether the sequences matter: they do not if only the logprobs of the prompt are wanted.
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
        """Return the part of *response* that is the result."""
        raise NotImplementedError

    def send(self, channel: Optional[AnyChannel] = None) -> UntypedFuture:
        """Send it under a new seq_id; blocks while too many bytes are being submitted."""
        sampler, request = self._sampler, self._request
        assert channel is not None  # samples are always sent on the worker's own connection
        limits = sampler.limits
        nbytes = limits.sample_bytes(request.prompt.length)
        try:
            with limits.samples.holding(nbytes, channel.stopped.is_set, self.future):
                accepted = api.asample(
                    sampler.transport,
                    sampling_session_id=sampler.sampling_session_id,
                    # A new one even after a lost result: the old one would name the lost request
                    # (docs/protocol.md, "Sample requests").
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
        """Read the result; the tokens used are charged once the future is settled."""
        request = self._request
        response = codec_for(reply.content_type).decode_samples(reply.body)
        sampled = sum(sequence.length for sequence in response.sequences)
        # Before the checks, which may raise: the server has done the work in any case.
        self._reservation.used = Tokens(prefilled=request.prompt.length, sampled=sampled)
        check_counts(response, request, sequences=self.wants_sequences)
        response = complete_response(response, request, self._sequence_ids)
        warning = self._sampler.nan_warning
        if not warning.shown and has_unknown_logprobs(response, request):
            warning.show(f"a {self.future.kind}" if self.wants_sequences else "a prompt")
        return self.select(response)

    def retry_after_loss(self) -> Optional[float]:
        """Follow the client's RetryConfig, unless the server's flags forbid retries."""
        sampler = self._sampler
        delay_s = sampler.retries.delay_s(self.losses, random.random())
        # The flag applies to `sample` only (docs/protocol.md, "Static flags").
        if delay_s is not None and self.wants_sequences:
            return None if flags_for(sampler.transport).sample_no_retries else delay_s
        return delay_s

    def sampler_id(self) -> SamplerId:
        """Return the sampler; for a clone, known once it has sent a request."""
        return self._sampler.id


class PendingSample(SamplingRequest["SampleResponse"]):
    """A call of `SamplingClient.sample`."""

    __slots__ = ()

    def select(self, response: SampleResponse) -> SampleResponse:
        """Return the response unchanged."""
        return response


class PendingLogprobs(SamplingRequest[List[Optional[float]]]):
    """A call of `SamplingClient.compute_logprobs`."""

    __slots__ = ()

    wants_sequences = False

    def select(self, response: SampleResponse) -> List[Optional[float]]:
        """Return the logprobs of the prompt."""
        logprobs = response.prompt_logprobs
        if logprobs is None:
            raise ResponseDecodeError("compute_logprobs: the response has no prompt logprobs")
        return logprobs


def may_be_large(request: types.SampleRequest) -> bool:
    """Return whether the result may be so large that its size should be requested first."""
    tokens = request.num_samples * (request.sampling_params.max_tokens or _UNLIMITED)
    # For each token and each alternative to it: an id and a logprob, of 4 bytes each.
    values = tokens * (2 + 2 * request.topk_sample_logprobs)
    wanted = request.topk_prompt_logprobs + request.prompt_alt_tokens_k
    if request.prompt_logprobs or wanted or request.target_prompt_logprobs is not None:
        targets = request.target_prompt_logprobs
        values += request.prompt.length * (1 + 2 * wanted)
        values += 0 if targets is None else targets.values.size
    return 4 * values > _LARGE_BYTES
