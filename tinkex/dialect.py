"""Dialect: in which encoding a server takes training batches, found out from its answers.

Servers of today take protobuf only, or JSON only (servers table).  With ``wire="auto"`` the
first batch goes out as protobuf; an answer that means "I cannot read this" makes us send the
same batch, under the same number, as JSON.  What worked is remembered per base URL.
"""

from __future__ import annotations

from typing import Dict, Optional

from tinkex import lifecycle
from tinkex.api.training import forward_backward
from tinkex.config import Config
from tinkex.errors import APIStatusError
from tinkex.retry import RetryPolicy
from tinkex.transport import Transport
from tinkex.types import ForwardBackwardRequest, UntypedFuture
from tinkex.wire.codec import Codec
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

#: What servers that cannot read a body answer: 415 or 422, 400 about decoding, or a plain 500.
_UNREADABLE = (400, 415, 422, 500)

# Base URL -> the encoding that worked.  Guarded by lifecycle.module_lock().
_settled: Dict[str, Codec] = {}


class Dialect:
    """The encoding of training batches for one server.  Thread-safe."""

    def __init__(self, config: Config) -> None:
        self._base_url = config.base_url
        forced: Dict[str, Codec] = {"json": JSON, "protobuf": PROTOBUF}
        self._forced = forced.get(config.wire)

    @property
    def codec(self) -> Optional[Codec]:
        """The encoding in use, or None while it is not known."""
        if self._forced is not None:
            return self._forced
        with lifecycle.module_lock():
            return _settled.get(self._base_url)

    def submit(self, transport: Transport, request: ForwardBackwardRequest) -> UntypedFuture:
        """Submit a batch in the right encoding.  Blocks until the server has accepted it.

        Raises:
            APIStatusError: the server refused it (in both encodings, if it was not settled).
        """
        policy = RetryPolicy(max_elapsed_s=transport.config.max_outage_s)
        known = self.codec
        if known is not None:
            return forward_backward(transport, known, request, policy)
        # A plain 500 may mean "unreadable": look at the first one.
        curious = RetryPolicy(max_elapsed_s=transport.config.max_outage_s, max_server_errors=1)
        try:
            accepted = forward_backward(transport, PROTOBUF, request, curious)
        except APIStatusError as first:
            if first.status not in _UNREADABLE:
                raise
            return self._try_json(transport, request, policy, first)
        self._settle(PROTOBUF)
        return accepted

    def _try_json(
        self,
        transport: Transport,
        request: ForwardBackwardRequest,
        policy: RetryPolicy,
        first: APIStatusError,
    ) -> UntypedFuture:
        try:
            accepted = forward_backward(transport, JSON, request, policy)
        except APIStatusError as second:
            # 415 names the wrong encoding, and 409 says that the first body was read and has used
            # the number up: then the first answer is about the batch itself.
            told = first if second.status in (409, 415) else second
            if told is first:
                self._settle(PROTOBUF)
                if first.status == 500:  # which may pass, after all
                    return forward_backward(transport, PROTOBUF, request, policy)
            elif first.status == 415:
                self._settle(JSON)
            other = second if told is first else first
            told.hint = told.hint or f"Sent in the other encoding, the answer was: {other.message}"
            raise told from other
        self._settle(JSON)
        return accepted

    def _settle(self, codec: Codec) -> None:
        with lifecycle.module_lock():
            _settled[self._base_url] = codec
