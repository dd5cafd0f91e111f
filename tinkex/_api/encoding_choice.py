"""The encoding in which a server takes training batches, found out from its responses.

Today's servers take only protobuf or only JSON (docs/servers.md).  With ``wire="auto"`` the first
batch goes out as protobuf; if the response means "I cannot read this", we send the same batch,
under the same seq_id, as JSON.  Other batches wait for the outcome, and the encoding that worked is
kept in the `ServerState`.  Nothing is sent again after a success, or after a refusal of the
contents.

No threads of its own: this runs in the submission threads of training runs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Optional

from tinkex._api._optional import is_missing_route
from tinkex._api.training import forward_backward
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
    from tinkex._transport.server_state import ServerDialect
    from tinkex._transport.transport import Sender
    from tinkex.types import ForwardBackwardRequest, UntypedFuture

#: What servers write about a body that they cannot read (or they write nothing at all), and rarely
#: about its contents.  A batch is always complete: if a server misses a field, it could not read
#: it.
_ABOUT_READING = re.compile(
    r"\bpars|decod|deseriali|encoding|malformed|json|protobuf|utf-?8|(content|media).?type"
    r"|missing|required|dictionary|\['body'\]|^(None)?$",
    re.IGNORECASE,
)


# The codecs are imported when first used: a program that only samples does not need them.


def _json() -> Codec:
    return codec_for(JSON_CONTENT_TYPE)


def _protobuf() -> Codec:
    return codec_for(PROTOBUF_CONTENT_TYPE)


def _forced(sender: Sender) -> Optional[Codec]:
    """Return the encoding that the settings prescribe, if any."""
    wire = sender.config.wire
    return _json() if wire == "json" else _protobuf() if wire == "protobuf" else None


def batch_codec(sender: Sender) -> Optional[Codec]:
    """Return the encoding of batches in use, or None while it is unknown."""
    return _forced(sender) or sender.server.codec


def server_dialect(sender: Sender) -> ServerDialect:
    """Return what is known about how the server speaks the protocol."""
    return sender.server.dialect(_forced(sender))


def submit_batch(
    sender: Sender, request: ForwardBackwardRequest, *, compress: bool = False
) -> UntypedFuture:
    """Submit a batch in the right encoding.  Blocks until the server has accepted it.

    *compress* asks for zstd if the encoding is protobuf.

    Raises:
        APIStatusError: the server refused the batch.
        ClientClosedError: the client was closed in the meantime.
    """
    # Loop: a search by another thread may have failed and decided nothing.
    while True:
        codec = batch_codec(sender)
        if codec is not None:
            return _submit_as(codec, sender, request, compress)
        first = _FirstBatch(sender, request)
        sender.server.encoding_search.run(first.send, sender.closing)
        if first.was_sent:
            return first.outcome()


def _submit_as(
    codec: Codec, sender: Sender, request: ForwardBackwardRequest, compress: bool = False
) -> UntypedFuture:
    policy = RetryPolicy(max_elapsed_s=sender.config.max_outage_s, max_gateway_answers=None)
    wanted = compress and codec is _protobuf() and not sender.server.refuses_compression
    if not (wanted and can_compress()):
        return forward_backward(sender, codec, request, policy)
    try:
        accepted = forward_backward(sender, codec, request, policy, compressed=True)
    except APIStatusError as error:
        if error.status != 415:
            raise
        # Never compress for this server again (docs/protocol.md, "Compression").
        sender.server.compression, sender.server.refuses_compression = None, True
        return forward_backward(sender, codec, request, policy)
    sender.server.compression = "zstd"
    return accepted


class _FirstBatch:
    """One caller's attempt to be the first to submit a batch to a server."""

    def __init__(self, sender: Sender, request: ForwardBackwardRequest) -> None:
        self._sender = sender
        self._server = sender.server
        self._request = request
        self._accepted: Optional[UntypedFuture] = None
        self._error: Optional[Exception] = None

    def send(self) -> None:
        """Submit the batch unless the encoding is already known; store the outcome."""
        if self._server.codec is not None:
            return
        try:
            self._accepted = self._find_encoding()
        except ClientClosedError:  # SingleFlight lets another thread search instead
            raise
        except Exception as error:
            # Stored, not raised: SingleFlight would also raise it in the waiting threads, though
            # the error is not about their batches.
            self._error = error

    @property
    def was_sent(self) -> bool:
        """True if this caller's batch was submitted."""
        return self._accepted is not None or self._error is not None

    def outcome(self) -> UntypedFuture:
        """Return the future of the batch's result, or raise the batch's error."""
        if self._accepted is None:
            assert self._error is not None
            raise self._error
        return self._accepted

    def _find_encoding(self) -> UntypedFuture:
        """Submit the batch, and record the encoding that the server accepted."""
        # A plain 500 may mean "unreadable", so try JSON before retrying.
        policy = RetryPolicy(
            max_elapsed_s=self._sender.config.max_outage_s,
            max_server_errors=1,
            max_gateway_answers=None,
        )
        try:
            accepted = forward_backward(self._sender, _protobuf(), self._request, policy)
        except APIStatusError as first:
            if not _is_unreadable(first):
                raise
            return self._try_json(first)
        self._server.codec = _protobuf()
        return accepted

    def _try_json(self, first: APIStatusError) -> UntypedFuture:
        """Submit the batch as JSON after the error *first*; raise the error that fits the batch."""
        try:
            accepted = _submit_as(_json(), self._sender, self._request)
        except InvalidInputError as error:  # e.g. spans, which JSON cannot express
            first.hint = first.hint or f"It was not sent as JSON: {error.message}"
            raise first from error
        except APIStatusError as second:
            if _means_protobuf(self._request, second):
                self._server.codec = _protobuf()
                if first.status == 500:  # the server reads protobuf: now with retries
                    return _submit_as(_protobuf(), self._sender, self._request)
                raise first from None
            # 415 itself says that the server takes JSON; *second* is about the contents of the
            # batch.
            if first.status == 415:
                self._server.codec = _json()
            if (first.status, first.body) != (second.status, second.body):
                second.hint = second.hint or f"As protobuf, the response was: {first.message}"
            raise second from first
        self._server.codec = _json()
        return accepted


def _is_unreadable(error: APIStatusError) -> bool:
    """True if *error*, for a batch in protobuf, may mean that the server cannot read it.

    These are 415, a plain 500, and 400 or 422 with words about reading.
    """
    if error.status in (400, 422):
        return _ABOUT_READING.search(str(error.body)) is not None
    return error.status in (415, 500)


def _means_protobuf(request: ForwardBackwardRequest, error: APIStatusError) -> bool:
    """True if *error*, for a batch in JSON, means that the server speaks protobuf.

    415 is about the encoding; 409 means that the first body was read and has used the seq_id; and
    only servers that take JSON have the route ``forward``.
    """
    return error.status in (409, 415) or (request.forward_only and is_missing_route(error))
