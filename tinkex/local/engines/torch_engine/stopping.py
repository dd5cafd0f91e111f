"""Decides when a sequence ends: at a stop token, or once its text holds a stop string."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, FrozenSet, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from tinkex.local.engines.engine import EngineError

# What decoders put in place of bytes that make no complete character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# Tokens of the prompt to decode with the first generated ones.
_CONTEXT = 8

# A UTF-8 character has at most four bytes: more pending tokens than this never complete one.
# Without a limit, each further token would decode all pending ones again.
_MOST_PENDING = 16


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What sampling needs from the tokenizer."""

    tokenizer: Any
    eos_tokens: FrozenSet[int]

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Vocabulary:
        """Collect the end-of-sequence tokens of model and tokenizer."""
        # The generation configuration comes first: chat models list the end of a turn there,
        # besides or instead of the tokenizer's end of text.
        eos = getattr(model.generation_config, "eos_token_id", None)
        if eos is None:
            eos = tokenizer.eos_token_id
        listed = [] if eos is None else eos if isinstance(eos, (list, tuple)) else [eos]
        return cls(tokenizer, frozenset(int(token) for token in listed))

    def text(self, tokens: Sequence[int]) -> str:
        """Decode *tokens*, including special ones, without cleaning up."""
        # Cleaning up removes spaces before punctuation, which a stop string may contain.
        decoded: str = self.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return decoded


@dataclasses.dataclass(frozen=True)
class StopRule:
    """When a sequence ends: at one of *tokens*, or once its text holds one of *strings*."""

    tokens: FrozenSet[int]
    strings: Tuple[str, ...] = ()

    @classmethod
    def of(cls, stop: Any, vocabulary: Vocabulary) -> StopRule:
        """Read ``SamplingParams.stop``."""
        if stop is None:  # docs/protocol.md, "Sample requests"; [] ends at max_tokens only
            return cls(vocabulary.eos_tokens)
        items = [stop] if isinstance(stop, str) else list(stop)
        strings = tuple(item for item in items if isinstance(item, str))
        if any(not item for item in strings):
            raise EngineError("stop holds an empty string; leave it out")
        return cls(frozenset(int(i) for i in items if not isinstance(i, str)), strings)

    def follow(
        self, prompt: npt.NDArray[np.int32], vocabulary: Vocabulary
    ) -> Optional[GeneratedText]:
        """Return the text to pass to `reached`; None if there are no stop strings."""
        if not self.strings:
            return None
        # Enough earlier text for a stop string to begin in.
        keep = max(len(string) for string in self.strings) - 1
        return GeneratedText(prompt.tolist(), vocabulary.text, keep)

    def reached(self, token: int, text: Optional[GeneratedText]) -> bool:
        """Return whether the newest *token* ends the sequence; append it to *text*."""
        if token in self.tokens:
            return True
        if text is None:
            return False
        recent = text.append(token)
        return any(string in recent for string in self.strings)


class GeneratedText:
    """Decodes the tokens of one sequence as they are drawn.

    A token's text depends on its neighbours: sentencepiece decoders drop the space before the first
    word, and a character may take several tokens.  So new tokens are decoded together with the
    tokens before them (at first the end of the prompt), and what they add is the new text.

    Args:
        prompt: the tokens before the sequence.
        decode: returns the text of tokens, special ones included.
        keep: how many characters of earlier text `append` returns along with the new text.

    Not thread-safe.
    """

    def __init__(
        self, prompt: Sequence[int], decode: Callable[[Sequence[int]], str], keep: int
    ) -> None:
        start = max(0, len(prompt) - _CONTEXT)
        while start > 0 and _REPLACEMENT in decode(prompt[start : start + 1]):
            start -= 1  # do not start inside a character: its other bytes would not decode
        self._decode = decode
        self._keep = keep
        self._text = ""
        self._settle(list(prompt[start:]))

    def _settle(self, context: List[int]) -> None:
        self._context = context
        self._pending: List[int] = []
        self._context_text = self._decode(context) if context else ""

    def append(self, token: int) -> str:
        """Add *token*; return the end of the text so far, including the unsettled part."""
        self._pending.append(token)
        before = self._context_text
        both = self._decode(self._context + self._pending)
        new = both[_shared(before, both) :]
        text = self._text + new
        # Settled text cannot change with later tokens: it ends with a complete character.
        settled = bool(new) and not new.endswith(_REPLACEMENT)
        if settled or len(self._pending) >= _MOST_PENDING:
            # Not text[-keep:], which is everything if keep is 0.
            self._text = text[max(0, len(text) - self._keep) :]
            self._settle(self._pending)
        return text


def _shared(one: str, other: str) -> int:
    """Return the length of the common prefix of *one* and *other*."""
    if other.startswith(one):
        return len(one)
    return next((i for i, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), len(other))
