"""Dialect: in which encoding a server takes training batches, found out from its answers.

Servers of today take protobuf only, or JSON only (docs/servers.md).  With ``wire="auto"`` the
first batch goes out as protobuf; an answer that means "I cannot read this" makes us send the
same batch, under the same number, as JSON.  What worked is remembered per base URL, for the whole
process; batches that come meanwhile wait for the outcome.  Nothing is sent again after a success.

No threads of its own: it works in the lanes of training runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Mapping, Optional

from tinkex._api._optional import is_missing_route
from tinkex._api.training import forward_backward
from tinkex._transport.sender import Sender
from tinkex._transport.server_state import ServerDialect as ServerDialect, state_of
from tinkex.config import Config
from tinkex.errors import APIStatusError, ClientClosedError, InvalidInputError
from tinkex.retry import RetryPolicy
from tinkex.wire.codec import (
    JSON_CONTENT_TYPE,
    PROTOBUF_CONTENT_TYPE,
    Codec,
    can_compress,
    codec_for,
)

if TYPE_CHECKING:
    from tinkex.types import ForwardBackwardRequest, UntypedFuture

#: What servers that cannot read a body answer: 415 or 422, 400 about decoding, or a plain 500.
_UNREADABLE = (400, 415, 422, 500)


# Imported by who trains, not by who samples.


def _json() -> Codec:
    return codec_for(JSON_CONTENT_TYPE)


def _protobuf() -> Codec:
    return codec_for(PROTOBUF_CONTENT_TYPE)


_FORCED: Mapping[str, Callable[[], Codec]] = {"json": _json, "protobuf": _protobuf}


class Dialect:
    """How one server speaks.  Thread-safe."""

    def __init__(self, config: Config) -> None:
        self._server = state_of(config)
        self._forced = _FORCED[config.wire]() if config.wire in _FORCED else None

    @property
    def codec(self) -> Optional[Codec]:
        """The encoding of batches in use, or None while it is not known."""
        return self._forced or self._server.codec

    def snapshot(self) -> ServerDialect:
        """What is known of the server now."""
        return self._server.dialect(self._forced)

    def submit(
        self, transport: Sender, request: ForwardBackwardRequest, *, compress: bool = False
    ) -> UntypedFuture:
        """Submit a batch in the right encoding.  Blocks until the server has accepted it.

        *compress* asks for zstd where the encoding is protobuf.

        Raises:
            APIStatusError: the server refused it (in both encodings, if it was not settled).
            ClientClosedError: the client was closed meanwhile.
        """
        while True:
            known = self.codec
            if known is not None:
                return self._submit_as(known, transport, request, compress)
            first = _FirstBatch(self, transport, request)
            self._server.encoding_search.run(first.send, transport.closing)
            if first.was_sent:
                return first.outcome()

    def _submit_as(
        self, codec: Codec, transport: Sender, request: ForwardBackwardRequest, compress: bool
    ) -> UntypedFuture:
        outage_s = transport.config.max_outage_s
        policy = RetryPolicy(max_elapsed_s=outage_s, max_gateway_answers=None)
        compress = compress and codec is _protobuf() and not self._server.refuses_compression
        if compress and can_compress():
            return self._submit_compressed(transport, request, policy)
        return forward_backward(transport, codec, request, policy)

    def _submit_compressed(
        self, transport: Sender, request: ForwardBackwardRequest, policy: RetryPolicy
    ) -> UntypedFuture:
        try:
            accepted = forward_backward(transport, _protobuf(), request, policy, compressed=True)
        except APIStatusError as error:
            if error.status != 415:
                raise
            self._server.note_compression(None)
            return forward_backward(transport, _protobuf(), request, policy)
        self._server.note_compression("zstd")
        return accepted

    def _find_out(self, transport: Sender, request: ForwardBackwardRequest) -> UntypedFuture:
        """Submit the first batch of a server, and note how it was done."""
        # A plain 500 may mean "unreadable": look at the first one.
        outage_s = transport.config.max_outage_s
        curious = RetryPolicy(max_elapsed_s=outage_s, max_server_errors=1, max_gateway_answers=None)
        try:
            accepted = forward_backward(transport, _protobuf(), request, curious)
        except APIStatusError as first:
            if first.status not in _UNREADABLE:
                raise
            return self._try_json(transport, request, first)
        self._server.note_codec(_protobuf())
        return accepted

    def _try_json(
        self, transport: Sender, request: ForwardBackwardRequest, first: APIStatusError
    ) -> UntypedFuture:
        """Submit what got the answer *first* as JSON; raise the answer that is about the batch."""
        try:
            accepted = self._submit_as(_json(), transport, request, False)
        except InvalidInputError as error:  # e.g. it has spans, which JSON cannot express
            first.hint = first.hint or f"It was not sent as JSON: {error.message}"
            raise first from error
        except APIStatusError as second:
            if _means_protobuf(request, second):
                self._server.note_codec(_protobuf())
                if first.status == 500:  # which may pass, after all
                    return self._submit_as(_protobuf(), transport, request, False)
                raise _with_other(first, second) from second
            if first.status == 415:
                self._server.note_codec(_json())
            raise _with_other(second, first) from first
        self._server.note_codec(_json())
        return accepted


class _FirstBatch:
    """One caller's attempt to be the first to submit a batch to a server."""

    def __init__(
        self, dialect: Dialect, transport: Sender, request: ForwardBackwardRequest
    ) -> None:
        self._dialect = dialect
        self._transport = transport
        self._request = request
        self._accepted: Optional[UntypedFuture] = None
        self._error: Optional[Exception] = None

    def send(self) -> None:
        """Submit the batch, unless the encoding was settled just now; keep what comes of it."""
        if self._dialect.codec is not None:
            return
        try:
            self._accepted = self._dialect._find_out(self._transport, self._request)
        except ClientClosedError:  # decides nothing for those who wait
            raise
        except Exception as error:  # about this batch; the others have their own
            self._error = error

    @property
    def was_sent(self) -> bool:
        """True if it was this caller's batch that was submitted."""
        return self._accepted is not None or self._error is not None

    def outcome(self) -> UntypedFuture:
        """What came of it."""
        if self._accepted is None:
            assert self._error is not None
            raise self._error
        return self._accepted


def _means_protobuf(request: ForwardBackwardRequest, answer: APIStatusError) -> bool:
    """Tell whether *answer* to a batch in JSON says that the server speaks protobuf.

    415 names the wrong encoding, 409 says that the first body was read and has used the number
    up, and ``forward`` is a route of servers that take JSON.
    """
    return answer.status in (409, 415) or (request.forward_only and is_missing_route(answer))


def _with_other(told: APIStatusError, other: APIStatusError) -> APIStatusError:
    if other.status == 409:
        return told  # it is about the number, which the first form has used up
    if other.body != told.body or other.status != told.status:
        told.hint = told.hint or f"Sent in the other encoding, the answer was: {other.message}"
    return told
