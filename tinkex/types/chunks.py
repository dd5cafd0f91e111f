"""The chunks of a model input: text, images and audio (docs/protocol.md, "Model input")."""

from __future__ import annotations

import array
import base64
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Dict, List, Optional, Tuple, Union

from tinkex._runtime.numeric import as_int
from tinkex.errors import InvalidInputError, a_type
from tinkex.types._numbers import as_kept, numpy_on_demand
from tinkex.types.tokens import as_tokens

if TYPE_CHECKING:
    import numpy.typing as npt

    from tinkex._runtime.late_import import np

    TokenArray = npt.NDArray[np.int32]
else:
    TokenArray = Any


def _check_type(given: object, chunk_type: str) -> None:
    """Raise InvalidInputError unless *given*, a chunk's argument ``type``, fits its class."""
    if given != chunk_type:
        raise InvalidInputError(f"the type of this chunk is {chunk_type!r}, not {given!r}")


def _as_bytes(what: str, data: Any) -> bytes:
    """Return *data* as bytes, copied unless they are immutable.

    Raises InvalidInputError, naming *what*, if *data* is anything else.
    """
    if isinstance(data, bytes):
        return data
    if isinstance(data, (bytearray, memoryview)):
        return bytes(data)
    raise InvalidInputError(
        f"{what} is {a_type(data)}; it must be bytes",
        hint="Read them from a file with Path(...).read_bytes().",
    )


@numpy_on_demand("tokens_np")
@dataclasses.dataclass(frozen=True, eq=False, init=False)
class EncodedTextChunk:
    """A run of token ids.

    The ids are copied.  ``tokens_np`` is int32 of shape ``(length,)``; do not write to it.
    """

    type: ClassVar[str] = "encoded_text"
    tokens_np: TokenArray

    def __init__(self, tokens: Any, type: str = "encoded_text") -> None:
        if type != "encoded_text":
            _check_type(type, "encoded_text")
        object.__setattr__(self, "tokens_np", as_tokens(tokens))

    @classmethod
    def _adopt(cls, tokens: TokenArray) -> EncodedTextChunk:
        """Like the constructor, but without a copy: nothing else may refer to *tokens*."""
        chunk = object.__new__(cls)
        object.__setattr__(chunk, "tokens_np", as_tokens(tokens, owned=True))
        return chunk

    @property
    def tokens(self) -> List[int]:
        """The token ids as a Python list (a new one on each access)."""
        ids: List[int] = as_kept(self, "tokens_np").tolist()
        return ids

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(as_kept(self, "tokens_np"))

    def to_json(self) -> Dict[str, Any]:
        """Return the JSON form; numpy arrays are left for orjson to write."""
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


class _Image:
    """The common base of both kinds of images."""

    format: str
    expected_tokens: Optional[int]

    @property
    def length(self) -> int:
        """The number of tokens that the image takes; InvalidInputError if it is not known."""
        if self.expected_tokens is None:
            raise InvalidInputError(
                f"{type(self).__name__}: the length is unknown until expected_tokens is set"
            )
        return self.expected_tokens

    def _check(self) -> None:
        """Check the format and the expected tokens, and convert the latter to an int."""
        name = type(self).__name__
        if not isinstance(self.format, str):
            raise InvalidInputError(
                f"the format of an {name} is {self.format!r}; give 'png' or 'jpeg'"
            )
        if self.expected_tokens is not None:
            expected = as_int(f"the expected_tokens of an {name}", self.expected_tokens, 0)
            object.__setattr__(self, "expected_tokens", expected)

    def _with_expected(self, encoded: Dict[str, Any]) -> Dict[str, Any]:
        expected = self.expected_tokens
        return encoded if expected is None else {**encoded, "expected_tokens": expected}


@dataclasses.dataclass(frozen=True)
class ImageChunk(_Image):
    """An encoded image.

    ``data`` holds the bytes; ``format`` is ``"png"`` or ``"jpeg"``; ``expected_tokens`` is the
    number of tokens that the image takes, if known.
    """

    data: bytes
    format: str
    expected_tokens: Optional[int] = None
    type: dataclasses.InitVar[str] = "image"

    def __post_init__(self, type: str) -> None:
        _check_type(type, "image")
        object.__setattr__(self, "data", _as_bytes("the data of an ImageChunk", self.data))
        self._check()

    def to_json(self) -> Dict[str, Any]:
        """Return the JSON form, with the bytes as base64."""
        data = base64.b64encode(self.data).decode("ascii")
        return self._with_expected({"data": data, "format": self.format, "type": "image"})


@dataclasses.dataclass(frozen=True)
class ImageAssetPointerChunk(_Image):
    """An image that the server itself fetches from ``location``, a URL.  For sampling only."""

    format: str
    location: str
    expected_tokens: Optional[int] = None
    type: dataclasses.InitVar[str] = "image_asset_pointer"

    def __post_init__(self, type: str) -> None:
        _check_type(type, "image_asset_pointer")
        if not isinstance(self.location, str):
            raise InvalidInputError(
                f"the location of an ImageAssetPointerChunk is {self.location!r}; give a URL"
            )
        self._check()

    def to_json(self) -> Dict[str, Any]:
        """Return the JSON form."""
        encoded = {"format": self.format, "location": self.location, "type": "image_asset_pointer"}
        return self._with_expected(encoded)


@dataclasses.dataclass(frozen=True)
class DmelChunk:
    """Discretised audio in its own container format."""

    dmel: bytes
    type: dataclasses.InitVar[str] = "dmel"

    def __post_init__(self, type: str) -> None:
        _check_type(type, "dmel")
        object.__setattr__(self, "dmel", _as_bytes("the dmel of a DmelChunk", self.dmel))

    @property
    def length(self) -> int:
        """The number of tokens: dimension 0 of the container, one token per frame."""
        return _dmel_length(self.dmel)

    def to_json(self) -> Dict[str, Any]:
        """Return the JSON form, with the bytes as base64."""
        return {"dmel": base64.b64encode(self.dmel).decode("ascii"), "type": "dmel"}


def _dmel_length(container: bytes) -> int:
    """Return dimension 0 from the header of *container*.

    Raises InvalidInputError if the header is malformed.
    """
    # The header is: optional marker 254, dtype byte 0..7, then ndim and the dimensions as LEB128
    # (docs/protocol.md, "Model input").

    def varint(at: int) -> Tuple[int, int]:
        value = shift = 0
        while True:
            byte = container[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at
            if shift > 63:  # endless bytes would otherwise be read as one huge number
                raise InvalidInputError("dmel container has a dimension of more than 64 bits")

    try:
        at = 1 if container[0] == 254 else 0
        if container[at] > 7:
            raise InvalidInputError(f"dmel container has unknown dtype {container[at]}")
        ndim, at = varint(at + 1)
        return varint(at)[0] if ndim else 0
    except IndexError as error:
        raise InvalidInputError("dmel container ends inside its header") from error


def _expected_from_json(payload: Dict[str, Any]) -> Any:
    expected = payload.get("expected_tokens")
    if isinstance(expected, str):  # JSON has numbers, so a numeric string is an error
        raise InvalidInputError(f"expected_tokens is {expected!r}; it must be an integer")
    return expected


CHUNK_TYPES = (EncodedTextChunk, ImageChunk, ImageAssetPointerChunk, DmelChunk)

ModelInputChunk = Union[EncodedTextChunk, ImageChunk, ImageAssetPointerChunk, DmelChunk]


def chunk_from_json(payload: Any) -> ModelInputChunk:
    """Read a chunk by its ``type``.

    Raises InvalidInputError if the type is unknown, or the chunk is malformed.
    """
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
