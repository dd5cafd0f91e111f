"""The tokenizer that belongs to the deterministic engine: one token per character."""

from __future__ import annotations

from typing import Iterable, List


class CharacterTokenizer:
    """Token ``t`` is the character ``chr(t)``; token 0 ends a sequence.  Immutable.

    It decodes whatever `FakeServer` samples.  With the server's default vocabulary it encodes the
    characters below U+7D00: all of Latin, Greek, Cyrillic and most of Chinese, but no emoji.
    """

    eos_token_id = 0

    def encode(self, text: str) -> List[int]:
        """Return the token ids of *text*."""
        return [ord(character) for character in text]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of *tokens*, without the end of the sequence."""
        return "".join(chr(token) for token in tokens if token != self.eos_token_id)
