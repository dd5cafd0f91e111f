"""One choice of a response: tokens in, text and log-probabilities out.

The same code serves streams and whole responses.  Pure; for one thread.
"""

from __future__ import annotations

import dataclasses
from typing import List, Optional, Sequence, Tuple

from tinkex.local.engines.engine import SampledToken
from tinkex.local.openai.text import Text, TokenDecoder

#: The likeliest tokens at a position, with their log-probabilities.
Top = Sequence[Tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class TokenEntry:
    """A token with its log-probability (None: unknown), and where its text begins."""

    token: int
    logprob: Optional[float]
    top: Top
    offset: int


@dataclasses.dataclass(frozen=True)
class Delta:
    """A new part of a choice; at the end, *finish_reason* is ``"stop"`` or ``"length"``."""

    text: str
    entries: List[TokenEntry]
    finish_reason: Optional[str] = None

    def __bool__(self) -> bool:
        """False if nothing is new."""
        return bool(self.text or self.entries or self.finish_reason)


@dataclasses.dataclass
class _Segment:
    """The text of one step that the client does not have yet; hidden text is never sent."""

    text: str
    hidden: bool


class Choice:
    """The continuation of a prompt, as the client sees it.

    Stop strings and special tokens are left out.  Text that may be the beginning of a stop string
    is held back until it is known whether it is one.

    Args:
        text: the text side of the model.
        prompt: the tokens before the continuation.
        stops: strings that end the continuation.
        keep_stop: True keeps the stop string that ended it.
        offset: offset of its first character in the text of the response.
        empty: True if no sampled token is wanted (``max_tokens=0``).
    """

    def __init__(
        self,
        text: Text,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        *,
        keep_stop: bool = False,
        offset: int = 0,
        empty: bool = False,
    ) -> None:
        self._text = text
        self._decoder = TokenDecoder(text, prompt)
        self._stops = stops
        self._keep_stop = keep_stop
        self._empty = empty
        self._pending: List[_Segment] = []
        self._entries: List[Tuple[int, TokenEntry]] = []  # with their places in the whole text
        self._given = 0  # characters that left _pending
        self._shown = offset  # offset of the next character that is not hidden
        self.tokens = 0
        self.finished = False

    def take(self, sampled: SampledToken) -> Delta:
        """Add a token; return what can be sent to the client now."""
        if self.finished:
            return Delta("", [])
        if self._empty:
            self.finished = True
            return Delta("", [], "length")
        self.tokens += 1
        token, reason = sampled.token, sampled.stop_reason
        # An end-of-sequence token has no text to show.  A token that completes a stop string has:
        # `_give` searches the text for the string.
        if reason == "stop" and token in self._text.eos:
            self._add(self._decoder.flush())
        else:
            self._note(sampled)
            if token in self._text.special:
                self._add(self._decoder.flush())
                self._add(self._decoder.push(token), hidden=True)
            else:
                self._add(self._decoder.push(token))
            if reason is not None:
                self._add(self._decoder.flush())
        return self._give(reason)

    def _note(self, sampled: SampledToken) -> None:
        place = self._given + sum(len(segment.text) for segment in self._pending)
        offset = self._shown + sum(len(s.text) for s in self._pending if not s.hidden)
        entry = TokenEntry(sampled.token, sampled.logprob, sampled.top, offset)
        self._entries.append((place, entry))

    def _add(self, text: str, *, hidden: bool = False) -> None:
        if text:
            self._pending.append(_Segment(text, hidden))

    def _give(self, reason: Optional[str]) -> Delta:
        pending = "".join(segment.text for segment in self._pending)
        found = [(pending.find(stop), stop) for stop in self._stops]
        ends = [(place, stop) for place, stop in found if place >= 0]
        if ends:
            reason, (count, stop) = "stop", min(ends)  # the stop string that begins first
            count += len(stop) if self._keep_stop else 0
        elif reason is not None:
            count = len(pending)
        else:
            count = len(pending) - self._held_back(pending)
        self.finished = reason is not None
        text = self._shift(count)
        self._shown += len(text)
        self._given += count
        # Later entries belong to text that is held back or, after a stop string, never sent.
        later = [(place, entry) for place, entry in self._entries if place >= self._given]
        if count == len(pending):
            later = []
        given = [entry for _, entry in self._entries[: len(self._entries) - len(later)]]
        self._entries = later
        return Delta(text, given, reason)

    def _held_back(self, pending: str) -> int:
        """Return how many characters at the end of *pending* may begin a stop string."""
        # One character less than the longest stop string, which would have been found whole.
        most = max((len(stop) for stop in self._stops), default=1) - 1
        for count in range(min(most, len(pending)), 0, -1):
            if any(stop.startswith(pending[-count:]) for stop in self._stops):
                return count
        return 0

    def _shift(self, count: int) -> str:
        """Take *count* characters from the pending text; return those that are not hidden."""
        shown = []
        while count > 0:
            segment = self._pending[0]
            taken = segment.text[:count]
            count -= len(taken)
            if not segment.hidden:
                shown.append(taken)
            segment.text = segment.text[len(taken) :]
            if not segment.text:
                self._pending.pop(0)
        return "".join(shown)


def read_prompt(
    text: Text,
    tokens: Sequence[int],
    logprobs: Optional[Sequence[Optional[float]]] = None,
    tops: Optional[Sequence[Optional[Top]]] = None,
) -> Delta:
    """Return a prompt as the beginning of a choice; with entries if its *logprobs* are given."""
    choice = Choice(text, [])
    parts: List[str] = []
    entries: List[TokenEntry] = []
    for place, token in enumerate(tokens):
        logprob = logprobs[place] if logprobs is not None else None
        top = (tops[place] or []) if tops is not None else []
        end = "length" if place == len(tokens) - 1 else None
        # The log-probability of the first token is unknown: 0.0 stands for it until it is replaced
        # below.
        delta = choice.take(SampledToken(0, token, logprob or 0.0, top, end))
        parts.append(delta.text)
        entries += [
            dataclasses.replace(entry, logprob=logprob) if logprob is None else entry
            for entry in delta.entries
        ]
    return Delta("".join(parts), entries if logprobs is not None else [])
