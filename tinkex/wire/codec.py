"""The two encodings of bulk values, JSON and protobuf, behind one interface.

`codec_for` chooses one by content type.  Pure functions, safe from any thread.
"""

from __future__ import annotations

import contextlib
import functools
from itertools import chain
from typing import TYPE_CHECKING, Any, Iterator, List, Protocol, Type

from tinkex._runtime.late_import import import_late
from tinkex.errors import TinkexError

if TYPE_CHECKING:
    from tinkex.types import ForwardBackwardOutput, ForwardBackwardRequest, SampleResponse

JSON_CONTENT_TYPE = "application/json"
PROTOBUF_CONTENT_TYPE = "application/x-protobuf"

#: What Python, numpy, orjson and protobuf raise for malformed values.  Not Exception, so that a bug
#: of ours shows as a bug.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class Parts:
    """A large body made of bytes and arrays, joined block by block while it is sent.

    The arrays must not be changed before `keep` is called.

    Args:
        blocks: lists of bytes and contiguous arrays; each list is one block, sent in one piece.
        size: the bytes in all blocks together.
    """

    # Joining everything first would hold the batch in memory twice, and getting that much fresh
    # memory from the system takes longer than filling it.

    def __init__(self, blocks: List[List[Any]], size: int) -> None:
        self._blocks = blocks
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        """Yield the body block by block."""
        return map(b"".join, self._blocks)

    def __bytes__(self) -> bytes:
        return b"".join(chain.from_iterable(self._blocks))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Parts):
            return NotImplemented
        return len(self) == len(other) and bytes(self) == bytes(other)

    __hash__ = None  # type: ignore[assignment]  # the arrays may change

    def keep(self) -> None:
        """Copy the arrays, so that their owner may change them."""
        self._blocks = [[bytes(self)]]


class Codec(Protocol):
    """One encoding.  Client and server use the same codec, so it both encodes and decodes.

    Encoders raise InvalidInputError if the encoding cannot express a value.  Decoded arrays belong
    to the caller: they are writable, in native byte order, and have the documented dtypes.  Unknown
    fields are ignored.
    """

    @property
    def name(self) -> str:
        """``"json"`` or ``"protobuf"``."""

    @property
    def content_type(self) -> str:
        """The media type of a body in this encoding."""

    def encode_forward_backward(self, request: ForwardBackwardRequest) -> bytes:
        """Write the body of a ``forward_backward`` or ``forward`` submission."""

    def forward_backward_parts(self, request: ForwardBackwardRequest) -> Parts:
        """Write the same body as parts that refer to the arrays of *request*."""

    def decode_forward_backward(self, body: bytes) -> ForwardBackwardRequest:
        """Read what `encode_forward_backward` wrote; InvalidInputError if it is malformed."""

    def encode_output(self, output: ForwardBackwardOutput) -> bytes:
        """Write the result of a pass."""

    def decode_output(self, body: bytes) -> ForwardBackwardOutput:
        """Read the result of a pass; ResponseDecodeError if it is malformed."""

    def encode_samples(self, response: SampleResponse) -> bytes:
        """Write the result of a sample request."""

    def decode_samples(self, body: bytes) -> SampleResponse:
        """Read the result of a sample request; ResponseDecodeError if it is malformed."""


def codec_for(content_type: str) -> Codec:
    """Return the codec for an HTTP ``Content-Type``: JSON for anything but protobuf."""
    media_type = content_type.partition(";")[0].strip().lower()
    codec: Codec
    # Imported here, because importing protobuf takes longer than many programs run.
    if media_type in (PROTOBUF_CONTENT_TYPE, "application/protobuf"):
        codec = import_late("tinkex.wire.proto_codec").PROTOBUF
    else:
        codec = import_late("tinkex.wire.json_codec").JSON
    return codec


@functools.cache
def can_compress() -> bool:
    """Return whether ``zstandard`` (the extra "zstd") is installed; the first call imports it."""
    try:
        import_late("zstandard")
    except ImportError:
        return False
    return True


def compress(body: bytes) -> bytes:
    """Return *body* as one zstd frame; requires `can_compress`."""
    frame: bytes = import_late("zstandard").ZstdCompressor().compress(body)
    return frame


@contextlib.contextmanager
def translating(error_type: Type[TinkexError], doing: str) -> Iterator[None]:
    """Convert exceptions that malformed values raise in the block to *error_type*."""
    try:
        yield
    except error_type:
        raise
    # Types check their values with InvalidInputError; in a response, that is the server's fault.
    except TinkexError as error:
        raise error_type(f"{doing}: {error.message}", hint=error.hint) from error
    except _MALFORMED as error:
        raise error_type(f"{doing}: {str(error) or type(error).__name__}") from error
