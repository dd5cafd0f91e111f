"""The text side of the engine's model: its tokenizer and its chat template.

Safe from any thread.
"""

from __future__ import annotations

import functools
import re
import threading
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Protocol, Sequence

from tinkex.local.engines.engine import Engine
from tinkex.local.openai.errors import OpenAIError

#: What decoders put in place of bytes that make no complete character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

Message = Mapping[str, Any]


class Text(Protocol):
    """Converts between text and the tokens of one model.

    Attributes:
        eos: a sequence ends at these tokens.
        special: tokens that are not shown in text, including *eos*.
    """

    eos: FrozenSet[int]
    special: FrozenSet[int]

    def encode(self, text: str) -> List[int]:
        """Return the tokens of a prompt, with the special tokens that the model expects with it."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of *tokens*, special ones included."""

    def bytes_of(self, token: int) -> bytes:
        """Return what one token adds to a text, which may be a part of a character."""

    def chat(self, messages: Sequence[Message], options: Mapping[str, Any]) -> List[int]:
        """Return the tokens of a conversation, up to where the assistant's reply begins."""


def text_of(engine: Engine) -> Text:
    """Return the text side of *engine*'s model."""
    if engine.tokenizer is None:
        return CharacterText(engine.info.eos_tokens)
    return TokenizerText(engine.tokenizer, engine.info.eos_tokens)


def token_name(raw: bytes) -> str:
    """Return the name of a token in log-probabilities; a part of a character is spelt in bytes."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CharacterText:
    """One character per token: token t reads ``chr(t)``, as in the deterministic engine."""

    def __init__(self, eos: Sequence[int]) -> None:
        self.eos = self.special = frozenset(eos)

    def encode(self, text: str) -> List[int]:
        """See Text."""
        return [ord(character) for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """See Text."""
        return "".join(chr(t) if _is_character(t) else REPLACEMENT for t in tokens)

    def bytes_of(self, token: int) -> bytes:
        """See Text."""
        return self.decode([token]).encode()

    def chat(self, messages: Sequence[Message], options: Mapping[str, Any]) -> List[int]:
        """See Text.  Each message is a line."""
        lines = [f"{message['role']}: {message['content'] or ''}\n" for message in messages]
        return self.encode("".join(lines) + "assistant: ")


def _is_character(code: int) -> bool:
    """False for surrogates, which cannot be written as UTF-8, and beyond Unicode."""
    return 0 <= code < 0xD800 or 0xE000 <= code < 0x110000


class TokenizerText:
    """The text side of a model with a tokenizer of transformers."""

    def __init__(self, tokenizer: Any, eos: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos = frozenset(eos)
        added = tokenizer.added_tokens_decoder
        special = [number for number, token in added.items() if getattr(token, "special", False)]
        self.special = self.eos.union(tokenizer.all_special_ids, special)
        # Fast tokenizers refuse to encode in two threads at a time if truncation is configured.
        self._lock = threading.Lock()
        self._cached_bytes = functools.lru_cache(maxsize=1 << 16)(self._bytes_of)

    def encode(self, text: str) -> List[int]:
        """See Text."""
        tokens = self._encode(text, add_special_tokens=True)
        if not tokens:  # the model has to start from something
            start = self._tokenizer.bos_token_id
            start = self._tokenizer.eos_token_id if start is None else start
            return [] if start is None else [int(start)]
        return tokens

    def _encode(self, text: str, *, add_special_tokens: bool) -> List[int]:
        with self._lock:
            tokens: List[int] = self._tokenizer.encode(
                text, add_special_tokens=add_special_tokens, verbose=False
            )
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """See Text."""
        decoded: str = self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return decoded

    def bytes_of(self, token: int) -> bytes:
        """See Text."""
        return self._cached_bytes(token)

    def _bytes_of(self, token: int) -> bytes:
        # What it adds to a copy of itself: decoders drop the space before a text's first word.
        text = self.decode([token, token])[len(self.decode([token])) :]
        if REPLACEMENT not in text:
            return text.encode()
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        byte = _BYTE_TOKEN.fullmatch(piece)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        letters = _letters_of_bytes()
        if all(letter in letters for letter in piece):
            return bytes(letters[letter] for letter in piece)
        return text.encode()

    def chat(self, messages: Sequence[Message], options: Mapping[str, Any]) -> List[int]:
        """See Text."""
        if not self._tokenizer.chat_template:
            raise OpenAIError(
                "the model has no chat template: use completions, or a model with a template",
                "messages",
            )
        settings: Dict[str, Any] = {"add_generation_prompt": True, **options, "tokenize": False}
        try:
            prompt = self._tokenizer.apply_chat_template(list(messages), **settings)
        except Exception as error:  # a template is a program, and may refuse the messages
            raise OpenAIError(
                f"the model's chat template failed: {type(error).__name__}: {error}", "messages"
            ) from error
        return self._encode(prompt, add_special_tokens=False)


@functools.lru_cache(maxsize=1)
def _letters_of_bytes() -> Dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary (as of GPT-2) stands for.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return letters


def common_prefix(one: str, other: str) -> int:
    """Return the length of the longest common prefix."""
    if other.startswith(one):
        return len(one)
    return next((i for i, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), len(other))


class TokenDecoder:
    """Decodes the tokens of one sequence as they arrive, complete characters only.

    A token's text depends on its neighbours: sentencepiece decoders drop the space before the
    first word, and a character may take several tokens.  So new tokens are decoded together with
    earlier ones (at first the end of the prompt), and the text that they add is the new text.

    Not thread-safe.
    """

    #: This many earlier tokens are decoded together with new ones.
    _CONTEXT = 8
    #: From this many tokens on, the oldest are dropped as soon as the text is complete ...
    _WINDOW = 24
    #: ... and from this many on, even if it is not.
    _MOST = 128
    #: Bytes that have not made a complete character after this many tokens never will.
    _PATIENCE = 16
    #: A character has at most four bytes, so this many at the end may still become one.
    _INCOMPLETE = 3

    def __init__(self, text: Text, prompt: Sequence[int]) -> None:
        self._text = text
        self._restart(list(prompt[-self._MOST :]))

    def _restart(self, tokens: List[int]) -> None:
        """Continue after *tokens*, whose text is not returned again."""
        start = max(0, len(tokens) - self._CONTEXT)
        # Not in the middle of a character: the bytes after it might not decode.
        while start > 0 and REPLACEMENT in self._text.decode(tokens[start : start + 1]):
            start -= 1
        self._tokens = context = tokens[start:]
        self._context = self._decoded = self._text.decode(context) if context else ""
        # Characters of _decoded that were returned; None: not known yet.
        self._given: Optional[int] = None
        self._incomplete = 0  # tokens since the text was complete

    def push(self, token: int) -> str:
        """Add *token* and return the new text, as far as later tokens cannot change it."""
        if token in self._text.special:
            rest = self.flush()
            self._restart([token])
            return rest + self._decoded
        self._tokens.append(token)
        self._decoded = self._text.decode(self._tokens)
        # Some decoders show complete characters as broken, too, if broken bytes follow directly.
        certain = len(self._decoded.rstrip(REPLACEMENT))
        self._incomplete = 0 if certain == len(self._decoded) else self._incomplete + 1
        if self._incomplete > self._PATIENCE:
            certain = max(certain, len(self._decoded) - self._INCOMPLETE)
        if self._given is None:
            if self._decoded.startswith(self._context):
                self._given = len(self._context)
            elif not 0 < self._incomplete <= self._PATIENCE:
                self._given = common_prefix(self._context, self._decoded)
            else:  # the context itself may decode differently once this character is complete
                return ""
        new = self._decoded[self._given : certain]
        self._given = max(self._given, certain)
        if len(self._tokens) >= (self._MOST if self._incomplete else self._WINDOW):
            new += self.flush()
        return new

    def flush(self) -> str:
        """Return the rest of the text, including characters that were not completed."""
        given = self._given
        if given is None:
            given = common_prefix(self._context, self._decoded)
        rest = self._decoded[given:]
        self._restart(self._tokens)
        return rest
