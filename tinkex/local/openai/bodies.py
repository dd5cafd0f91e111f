"""Responses and chunks of streams as JSON.  Pure."""

from __future__ import annotations

import time
import uuid
from typing import Any, Dict, Iterable, List, Optional

from tinkex.local.openai.choices import Delta, TokenEntry
from tinkex.local.openai.parameters import Call
from tinkex.local.openai.text import Text, token_name


class Writer:
    """Writes the response to one request.

    Args:
        call: the request.
        text: names its tokens.
    """

    def __init__(self, call: Call, text: Text) -> None:
        self._call = call
        self._text = text
        self._facts = {
            "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": call.model,
            "system_fingerprint": None,
        }

    def response(self, deltas: List[List[Delta]], usage: Dict[str, int]) -> Dict[str, Any]:
        """Return a whole response; *deltas* has the deltas of each choice."""
        kind = "chat.completion" if self._call.chat else "text_completion"
        choices = [self._choice(index, parts) for index, parts in enumerate(deltas)]
        return {**self._facts, "object": kind, "choices": choices, "usage": usage}

    def _choice(self, index: int, parts: List[Delta]) -> Dict[str, Any]:
        content = "".join(part.text for part in parts)
        entries = [entry for part in parts for entry in part.entries]
        reason = parts[-1].finish_reason if parts else None
        choice: Dict[str, Any] = {"index": index, "finish_reason": reason}
        if self._call.chat:
            choice["message"] = {"role": "assistant", "content": content, "refusal": None}
        else:
            choice["text"] = content
        choice["logprobs"] = self._logprobs(entries)
        return choice

    def chunk(self, index: int, delta: Delta) -> Dict[str, Any]:
        """Return the chunk of a stream for one choice's *delta*."""
        choice: Dict[str, Any] = {"index": index, "finish_reason": delta.finish_reason}
        if self._call.chat:
            choice["delta"] = {"content": delta.text} if delta.text or delta.entries else {}
        else:
            choice["text"] = delta.text
        choice["logprobs"] = self._logprobs(delta.entries) if delta.entries else None
        return self._chunk([choice])

    def first_chunk(self, index: int) -> Dict[str, Any]:
        """Return the chunk that begins a choice of a chat."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk(
            [{"index": index, "delta": delta, "finish_reason": None, "logprobs": None}]
        )

    def usage_chunk(self, usage: Dict[str, int]) -> Dict[str, Any]:
        """Return the last chunk of a stream with ``include_usage``."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: List[Dict[str, Any]]) -> Dict[str, Any]:
        kind = "chat.completion.chunk" if self._call.chat else "text_completion"
        chunk = {**self._facts, "object": kind, "choices": choices}
        # With include_usage each chunk has the field, as OpenAI sends it: null until the last one.
        return {**chunk, "usage": None} if self._call.include_usage else chunk

    def _logprobs(self, entries: Iterable[TokenEntry]) -> Optional[Dict[str, Any]]:
        if self._call.top is None:
            return None
        if self._call.chat:
            return {"content": [self._chat_entry(entry) for entry in entries], "refusal": None}
        columns: Dict[str, List[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for entry in entries:
            columns["tokens"].append(token_name(self._text.bytes_of(entry.token)))
            columns["token_logprobs"].append(entry.logprob)
            columns["top_logprobs"].append(self._top_by_name(entry))
            columns["text_offset"].append(entry.offset)
        return columns

    def _top_by_name(self, entry: TokenEntry) -> Optional[Dict[str, float]]:
        """Return the likeliest tokens and the actual one, by name; None if they are unknown."""
        if entry.logprob is None or not self._call.top:
            return None
        named: Dict[str, float] = {}
        for token, logprob in {**dict(entry.top), entry.token: entry.logprob}.items():
            name = token_name(self._text.bytes_of(token))
            # Several tokens may have the same name: the likeliest counts.
            named[name] = max(logprob, named.get(name, logprob))
        return named

    def _chat_entry(self, entry: TokenEntry) -> Dict[str, Any]:
        own = self._token(entry.token, entry.logprob)
        return {**own, "top_logprobs": [self._token(*pair) for pair in entry.top]}

    def _token(self, token: int, logprob: Optional[float]) -> Dict[str, Any]:
        raw = self._text.bytes_of(token)
        return {"token": token_name(raw), "logprob": logprob, "bytes": list(raw)}


def usage_of(prompt_tokens: int, completion_tokens: int) -> Dict[str, int]:
    """Return the token counts of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
