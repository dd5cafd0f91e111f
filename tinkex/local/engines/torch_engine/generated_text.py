"""The text of a sequence while it grows, for stop strings."""

from __future__ import annotations

from typing import Callable, List, Sequence

# What decoders put in place of bytes that make no complete character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# Tokens of the prompt to decode with the first generated ones.
_CONTEXT = 8

# A character has at most four bytes: more tokens than this will never complete one.
_MOST_PENDING = 16


class GeneratedText:
    """Decodes the tokens of one sequence as they come.

    A token's text depends on its neighbours: sentencepiece decoders drop the blank before the
    first word, and a character may take several tokens.  So new tokens are decoded together with
    those before them (at first the end of the prompt), and what these add is the new text.

    Args:
        prompt: the tokens before the sequence.
        decode: returns the text of tokens, special ones included.
        keep: characters of earlier text that `append` returns along with the new text.

    For one thread.
    """

    def __init__(
        self, prompt: Sequence[int], decode: Callable[[Sequence[int]], str], keep: int
    ) -> None:
        start = max(0, len(prompt) - _CONTEXT)
        while start > 0 and _REPLACEMENT in decode(prompt[start : start + 1]):
            start -= 1  # not in the middle of a character: the bytes after it would not decode
        self._decode = decode
        self._keep = keep
        self._text = ""
        self._settle(list(prompt[start:]))

    def _settle(self, context: List[int]) -> None:
        self._context = context
        self._pending: List[int] = []
        self._context_text = self._decode(context) if context else ""

    def append(self, token: int) -> str:
        """Add *token*; return the end of the text so far, the unsettled part included."""
        self._pending.append(token)
        before = self._context_text
        both = self._decode(self._context + self._pending)
        new = both[_shared(before, both) :]
        text = self._text + new
        settled = bool(new) and not new.endswith(_REPLACEMENT)
        if settled or len(self._pending) >= _MOST_PENDING:
            self._text = text[max(0, len(text) - self._keep) :]
            self._settle(self._pending)
        return text


def _shared(one: str, other: str) -> int:
    """Return how many characters both begin with."""
    if other.startswith(one):
        return len(one)
    return next((i for i, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), len(other))
