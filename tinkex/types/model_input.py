"""ModelInput: what a model reads, as a list of chunks (docs/protocol.md, "Model input")."""

from __future__ import annotations

import array
import base64
import dataclasses
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Dict, List, Optional, Sequence, Tuple, Union

from tinkex.errors import InvalidInputError
from tinkex.lazy_numpy import np
from tinkex.types._numbers import SHORT, as_kept, numpy_on_demand

if TYPE_CHECKING:
    import numpy.typing as npt

    TokenArray = npt.NDArray[np.int32]
else:
    TokenArray = Any


def as_tokens(tokens: Any) -> Any:
    """Return *tokens* (any sequence of ints, or an array) as a contiguous array of int32.

    That is an array.array for a short list or tuple of plain ints, and a numpy array for others.

    Raises:
        InvalidInputError: not a flat sequence of integers, or one outside 0 .. 2**31 - 1.
    """
    if isinstance(tokens, (list, tuple)) and len(tokens) <= SHORT and {*map(type, tokens)} <= {int}:
        try:
            short = array.array("i", tokens)
        except OverflowError:
            pass  # numpy tells the range
        else:
            if min(short, default=0) >= 0:
                return short
    try:
        ids = np.asarray(tokens)
    except (ValueError, TypeError) as error:
        raise InvalidInputError(f"tokens are not a flat sequence of integers: {error}") from error
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InvalidInputError(
            f"tokens must be a flat sequence of integers, not {ids.dtype} of shape {ids.shape}",
            hint="Encode text first: ModelInput.from_ints(tokenizer.encode(text)).",
        )
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > 0x7FFFFFFF):
        raise InvalidInputError(
            f"token ids run from {int(ids.min())} to {int(ids.max())}; "
            "they must lie in 0 .. 2**31 - 1"
        )
    return np.ascontiguousarray(ids, dtype=np.int32)


@numpy_on_demand("tokens_np")
@dataclasses.dataclass(frozen=True, eq=False, init=False)
class EncodedTextChunk:
    """A run of token ids.  ``tokens_np`` is int32 of shape ``(length,)``."""

    type: ClassVar[str] = "encoded_text"
    tokens_np: TokenArray

    def __init__(self, tokens: Any) -> None:
        object.__setattr__(self, "tokens_np", as_tokens(tokens))

    @property
    def tokens(self) -> List[int]:
        """The token ids as a Python list (made anew on each access)."""
        ids: List[int] = as_kept(self, "tokens_np").tolist()
        return ids

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(as_kept(self, "tokens_np"))

    def to_json(self) -> Dict[str, Any]:
        """JSON form; a numpy buffer is left for orjson to write."""
        tokens = as_kept(self, "tokens_np")
        is_numpy = not isinstance(tokens, array.array)
        return {"tokens": tokens if is_numpy else tokens.tolist(), "type": "encoded_text"}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EncodedTextChunk):
            return NotImplemented
        return self._bytes() == other._bytes()

    def __hash__(self) -> int:
        return hash(self._bytes())

    def _bytes(self) -> bytes:
        raw: bytes = as_kept(self, "tokens_np").tobytes()
        return raw

    def __repr__(self) -> str:
        return f"EncodedTextChunk({self.length} tokens)"


def _expected_length(chunk: Union[ImageChunk, ImageAssetPointerChunk]) -> int:
    if chunk.expected_tokens is None:
        raise InvalidInputError(
            f"{type(chunk).__name__}: the length is unknown until expected_tokens is set"
        )
    return chunk.expected_tokens


@dataclasses.dataclass(frozen=True)
class ImageChunk:
    """An encoded image; *format* is ``"png"`` or ``"jpeg"``."""

    type: ClassVar[str] = "image"
    data: bytes
    format: str
    expected_tokens: Optional[int] = None

    @property
    def length(self) -> int:
        """Number of tokens the image stands for; InvalidInputError if it was not given."""
        return _expected_length(self)

    def to_json(self) -> Dict[str, Any]:
        """JSON form, with the bytes as base64."""
        encoded = {
            "data": base64.b64encode(self.data).decode("ascii"),
            "format": self.format,
            "type": "image",
        }
        return _with_expected(encoded, self.expected_tokens)


@dataclasses.dataclass(frozen=True)
class ImageAssetPointerChunk:
    """An image the server fetches itself from *location*.  For sampling only."""

    type: ClassVar[str] = "image_asset_pointer"
    format: str
    location: str
    expected_tokens: Optional[int] = None

    @property
    def length(self) -> int:
        """Number of tokens the image stands for; InvalidInputError if it was not given."""
        return _expected_length(self)

    def to_json(self) -> Dict[str, Any]:
        """JSON form."""
        encoded = {"format": self.format, "location": self.location, "type": "image_asset_pointer"}
        return _with_expected(encoded, self.expected_tokens)


def _with_expected(encoded: Dict[str, Any], expected_tokens: Optional[int]) -> Dict[str, Any]:
    return encoded if expected_tokens is None else {**encoded, "expected_tokens": expected_tokens}


@dataclasses.dataclass(frozen=True)
class DmelChunk:
    """Discretised audio in its own container format."""

    type: ClassVar[str] = "dmel"
    dmel: bytes

    @property
    def length(self) -> int:
        """Dimension 0 of the container: one token per frame."""
        return _dmel_length(self.dmel)

    def to_json(self) -> Dict[str, Any]:
        """JSON form, with the bytes as base64."""
        return {"dmel": base64.b64encode(self.dmel).decode("ascii"), "type": "dmel"}


def _dmel_length(container: bytes) -> int:
    """Read the header: optional marker 254, dtype byte 0..7, then LEB128 ndim and dimensions."""

    def varint(at: int) -> Tuple[int, int]:
        value = shift = 0
        while True:
            byte = container[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at
            if shift > 63:
                raise InvalidInputError("dmel container has a dimension of more than 64 bits")

    try:
        at = 1 if container[0] == 254 else 0
        if container[at] > 7:
            raise InvalidInputError(f"dmel container has unknown dtype {container[at]}")
        ndim, at = varint(at + 1)
        return varint(at)[0] if ndim else 0
    except IndexError as error:
        raise InvalidInputError("dmel container ends inside its header") from error


def _expected_from_json(payload: Dict[str, Any]) -> Optional[int]:
    expected = payload.get("expected_tokens")
    if expected is not None and (type(expected) is not int or expected < 0):
        raise InvalidInputError(
            f"expected_tokens is {expected!r}; it must be an integer, 0 or more"
        )
    return expected


ModelInputChunk = Union[EncodedTextChunk, ImageChunk, ImageAssetPointerChunk, DmelChunk]


def chunk_from_json(payload: Any) -> ModelInputChunk:
    """Read a chunk by its ``type`` tag; InvalidInputError if it is none of the protocol's."""
    kind = payload.get("type") if isinstance(payload, dict) else None
    try:
        if kind == "encoded_text":
            return EncodedTextChunk(payload["tokens"])
        if kind == "image":
            data = base64.b64decode(payload["data"], validate=True)
            return ImageChunk(data, payload["format"], _expected_from_json(payload))
        if kind == "image_asset_pointer":
            return ImageAssetPointerChunk(
                payload["format"], payload["location"], _expected_from_json(payload)
            )
        if kind == "dmel":
            return DmelChunk(base64.b64decode(payload["dmel"], validate=True))
    except InvalidInputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"model input chunk of type {kind!r} is malformed: {error}"
        ) from error
    raise InvalidInputError(f"model input chunk has unknown type {kind!r}")


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """A sequence of chunks.  Immutable; ``append`` returns a new one."""

    chunks: Sequence[ModelInputChunk] = ()

    def __post_init__(self) -> None:
        # A tuple whatever was given, so that equal inputs are equal and hash.
        object.__setattr__(self, "chunks", tuple(self.chunks))

    @classmethod
    def from_ints(cls, tokens: Any) -> ModelInput:
        """Make an input of one text chunk from *tokens*: a sequence of ints or an int array."""
        return cls((EncodedTextChunk(tokens),))

    @classmethod
    def empty(cls) -> ModelInput:
        """Make an input without chunks."""
        return cls(())

    @property
    def length(self) -> int:
        """Number of tokens over all chunks."""
        return sum([chunk.length for chunk in self.chunks])

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """Return a new input with *chunk* at the end."""
        return ModelInput((*self.chunks, chunk))

    def append_int(self, token: int) -> ModelInput:
        """Return a new input with one more token, joined to a text chunk at the end."""
        if self.chunks and isinstance(self.chunks[-1], EncodedTextChunk):
            joined = np.append(self.chunks[-1].tokens_np, as_tokens([token]))
            return ModelInput((*self.chunks[:-1], EncodedTextChunk(joined)))
        return self.append(EncodedTextChunk([token]))

    def to_numpy(self) -> TokenArray:
        """Return all tokens as one int32 array; InvalidInputError with chunks that are not text."""
        parts = [chunk.tokens_np for chunk in self._texts()]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def to_ints(self) -> List[int]:
        """Return all tokens as a list; InvalidInputError with chunks that are not text."""
        return list(chain.from_iterable(chunk.tokens for chunk in self._texts()))

    def _texts(self) -> List[EncodedTextChunk]:
        texts = []
        for chunk in self.chunks:
            if not isinstance(chunk, EncodedTextChunk):
                raise InvalidInputError(f"a {type(chunk).__name__} has no token ids")
            texts.append(chunk)
        return texts

    def to_json(self) -> Dict[str, Any]:
        """JSON form, with numpy buffers left for orjson to write."""
        return {"chunks": [chunk.to_json() for chunk in self.chunks]}

    @classmethod
    def from_json(cls, payload: Any) -> ModelInput:
        """Read the JSON form; InvalidInputError if it is malformed."""
        chunks = payload.get("chunks") if isinstance(payload, dict) else None
        if not isinstance(chunks, list):
            raise InvalidInputError("a model input is an object with a list 'chunks'")
        return cls(tuple(chunk_from_json(chunk) for chunk in chunks))
