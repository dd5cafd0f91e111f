"""ModelInput: the input of a model, a list of chunks (docs/protocol.md, "Model input")."""

from __future__ import annotations

import dataclasses
from itertools import chain
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, Sequence

from tinkex._runtime.late_import import np
from tinkex.errors import InvalidInputError, a_type
from tinkex.types.chunks import CHUNK_TYPES, EncodedTextChunk, ModelInputChunk, chunk_from_json
from tinkex.types.tokens import as_tokens

if TYPE_CHECKING:
    import numpy.typing as npt

    TokenArray = npt.NDArray[np.int32]
else:
    TokenArray = Any

_FROM_INTS = "Make a model input from token ids with ModelInput.from_ints(tokens)."


def _as_chunk(chunk: Any) -> ModelInputChunk:
    if type(chunk) is EncodedTextChunk or isinstance(chunk, CHUNK_TYPES):
        return chunk
    if isinstance(chunk, Mapping):
        return chunk_from_json(dict(chunk))
    raise InvalidInputError(f"{a_type(chunk)} is not a chunk of a model input", hint=_FROM_INTS)


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """The input of a model: a list of chunks.

    Args:
        chunks: chunks, or their JSON forms.  The list is copied; do not change the copy, but use
            ``append``, which returns a new input.

    Raises:
        InvalidInputError: *chunks* holds anything else.
    """

    chunks: Sequence[ModelInputChunk] = ()

    def __post_init__(self) -> None:
        chunks = self.chunks
        if isinstance(chunks, (str, bytes, Mapping)) or not isinstance(chunks, Iterable):
            raise InvalidInputError(
                f"chunks is {a_type(chunks)}; it must be a list of chunks", hint=_FROM_INTS
            )
        object.__setattr__(self, "chunks", [_as_chunk(chunk) for chunk in chunks])

    @classmethod
    def _of(cls, chunks: List[ModelInputChunk]) -> ModelInput:
        """Wrap *chunks*, without a check: it must be a new list that holds only chunks."""
        made = object.__new__(cls)
        object.__setattr__(made, "chunks", chunks)
        return made

    def __hash__(self) -> int:
        return hash(tuple(self.chunks))

    @classmethod
    def from_ints(cls, tokens: Any) -> ModelInput:
        """Make an input of one text chunk from *tokens*, which are copied.

        Args:
            tokens: a flat sequence of ints, an int array or tensor, or the return value of a
                tokenizer or of ``apply_chat_template``, with ``input_ids`` of one sequence.
        """
        return cls._of([EncodedTextChunk(tokens)])

    def _snapshot(self) -> ModelInput:
        """Return a copy that is not affected by later changes to this input's list."""
        return ModelInput._of([_as_chunk(chunk) for chunk in self.chunks])

    @classmethod
    def empty(cls) -> ModelInput:
        """Make an input without chunks."""
        return cls(())

    @property
    def length(self) -> int:
        """The number of tokens in all chunks together."""
        return sum([chunk.length for chunk in self.chunks])  # a list is faster than a generator

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """Return a new input with *chunk* at the end."""
        return ModelInput((*self.chunks, chunk))

    def append_int(self, token: int) -> ModelInput:
        """Return a new input with *token* at the end, in the last chunk if that is text."""
        if self.chunks and isinstance(self.chunks[-1], EncodedTextChunk):
            joined = np.append(self.chunks[-1].tokens_np, as_tokens([token]))
            return ModelInput((*self.chunks[:-1], EncodedTextChunk._adopt(joined)))
        return self.append(EncodedTextChunk([token]))

    def to_numpy(self) -> TokenArray:
        """Return all tokens as a new int32 array.

        Raises:
            InvalidInputError: a chunk is not text.
        """
        parts = [chunk.tokens_np for chunk in self._texts()]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def to_ints(self) -> List[int]:
        """Return all tokens as a list; raise InvalidInputError if a chunk is not text."""
        return list(chain.from_iterable(chunk.tokens for chunk in self._texts()))

    def _texts(self) -> List[EncodedTextChunk]:
        texts = []
        for chunk in self.chunks:
            if not isinstance(chunk, EncodedTextChunk):
                raise InvalidInputError(f"{a_type(chunk)} has no token ids")
            texts.append(chunk)
        return texts

    def to_json(self) -> Dict[str, Any]:
        """Return the JSON form; numpy arrays are left for orjson to write."""
        return {"chunks": [chunk.to_json() for chunk in self.chunks]}

    @classmethod
    def from_json(cls, payload: Any) -> ModelInput:
        """Read the JSON form; raise InvalidInputError if it is malformed."""
        chunks = payload.get("chunks") if isinstance(payload, dict) else None
        if not isinstance(chunks, list):
            raise InvalidInputError("a model input is an object with a list 'chunks'")
        return cls(tuple(chunk_from_json(chunk) for chunk in chunks))
