"""The two dialects of bulk values behind one interface.  Pure functions, safe from any thread.

The dialects are json_codec and proto_codec; codecs.py picks one by content type.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Iterator, Protocol, Type

from tinkex._runtime.lazy_numpy import np
from tinkex.errors import ResponseDecodeError, TinkexError

if TYPE_CHECKING:
    from tinkex.types import (
        Datum,
        ForwardBackwardOutput,
        ForwardBackwardRequest,
        SampleResponse,
    )
    from tinkex.wire.parts import Parts

JSON_CONTENT_TYPE = "application/json"
PROTOBUF_CONTENT_TYPE = "application/x-protobuf"

#: What a value that is not what it should be makes Python, numpy, orjson and protobuf raise.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class Codec(Protocol):
    """One dialect.  Both ends use the same codec, so each message goes both ways.

    Encoders raise InvalidInputError if a value cannot be expressed in the dialect.  Decoded
    arrays are the caller's own: writable, native byte order, of the dtypes the types promise.
    Fields a codec does not know are ignored.
    """

    @property
    def name(self) -> str:
        """``"json"`` or ``"protobuf"``."""

    @property
    def content_type(self) -> str:
        """The media type of a body in this dialect."""

    def encode_forward_backward(self, request: ForwardBackwardRequest) -> bytes:
        """Write the body of a ``forward_backward`` or ``forward`` submission."""

    def forward_backward_parts(self, request: ForwardBackwardRequest) -> Parts:
        """The same, in parts, which hold the arrays of *request*."""

    def decode_forward_backward(self, body: bytes) -> ForwardBackwardRequest:
        """Read what `encode_forward_backward` wrote; InvalidInputError if it is malformed."""

    def size_of(self, datum: Datum) -> int:
        """About how many bytes *datum* takes in the body of a submission."""

    def encode_output(self, output: ForwardBackwardOutput) -> bytes:
        """Write the result of a pass."""

    def decode_output(self, body: bytes) -> ForwardBackwardOutput:
        """Read the result of a pass; ResponseDecodeError if it is malformed."""

    def encode_samples(self, response: SampleResponse) -> bytes:
        """Write the result of a sample request."""

    def decode_samples(self, body: bytes) -> SampleResponse:
        """Read the result of a sample request; ResponseDecodeError if it is malformed."""


@contextlib.contextmanager
def translating(error_type: Type[TinkexError], doing: str) -> Iterator[None]:
    """Raise *error_type* in place of whatever a malformed value raises inside."""
    try:
        yield
    except error_type:
        raise
    except TinkexError as error:
        raise error_type(f"{doing}: {error.message}", hint=error.hint) from error
    except _MALFORMED as error:
        raise error_type(f"{doing}: {str(error) or type(error).__name__}") from error


def align_prompt_logprobs(response: SampleResponse, prompt_length: int) -> SampleResponse:
    """Return *response* with one row per prompt token, NaN (no top-k cells) at position 0.

    Some servers send n values for a prompt of n tokens, some leave the first one out, for the
    first token of a prompt follows nothing.  The codecs cannot know n; whoever sent the
    prompt does.

    Raises:
        ResponseDecodeError: there are neither n nor n - 1 rows.
    """
    logprobs, topk = response.prompt_logprobs_np, response.topk_prompt_logprobs_np
    if logprobs is None and topk is None:
        return response
    if logprobs is not None:
        missing = _missing_rows("prompt_logprobs", len(logprobs), prompt_length)
        logprobs = np.concatenate([np.full(missing, np.nan, np.float32), logprobs])
        logprobs[:1] = np.nan
    if topk is not None:
        missing = _missing_rows("topk_prompt_logprobs", len(topk.token_ids), prompt_length)
        if missing:
            from tinkex.types.sampling import TOPK_SENTINEL, TopkLogprobs

            k = topk.token_ids.shape[1]
            topk = TopkLogprobs(
                np.concatenate([np.zeros((1, k), np.int32), topk.token_ids]),
                np.concatenate([np.full((1, k), TOPK_SENTINEL, np.float32), topk.logprobs]),
            )
    return dataclasses.replace(response, prompt_logprobs_np=logprobs, topk_prompt_logprobs_np=topk)


def _missing_rows(what: str, rows: int, prompt_length: int) -> int:
    if prompt_length - rows not in (0, 1):
        raise ResponseDecodeError(
            f"the server sent {rows} rows of {what} for a prompt of {prompt_length} tokens"
        )
    return prompt_length - rows
