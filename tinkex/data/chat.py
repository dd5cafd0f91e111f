"""Turns conversations into tokens with weights, using the model's own chat template.

What is learnt is what the model has to write: after the prompt that the template makes for
generation, the rest of the assistant's message up to the end-of-turn token.  A template is a
program, so nothing is assumed about its text: it renders the conversation up to each message, and
each rendering must continue the previous one.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from tinkex.data.examples import Message, assistant_turns, has_content
from tinkex.errors import InvalidInputError

#: The content of a probe message, which shows what the template writes after a message.
_PROBE = "tinkex"

_LAST = (
    "Learn only the last message (learn='last'), make one example per assistant message, or "
    "set a chat template that renders all messages in the same way."
)
_SWITCH = (
    "If the template has a switch for reasoning, set it: tokenizer.chat_template = "
    "'{% set enable_thinking = false %}' + tokenizer.chat_template"
)


class WeightedTokens(NamedTuple):
    """Token ids, and each token's weight as a target."""

    ids: List[int]
    weights: List[float]


def chat_tokens(
    messages: Sequence[Message],
    tokenizer: Any,
    learn: str,
    *,
    tools: Optional[Sequence[Mapping[str, Any]]] = None,
    first: int = 0,
) -> WeightedTokens:
    """Return the tokens of *messages* up to the last one learnt; learn from index *first* on.

    Raises:
        InvalidInputError: there is no template; it refuses the messages, or renders them so that
            the part to learn cannot be told apart; or there is nothing to learn.
    """
    turns = assistant_turns("messages", messages, first)
    if learn == "last":
        turns = turns[-1:]
    messages = messages[: turns[-1] + 1]  # the rest would be computed but not learnt
    if not turns[0]:
        raise InvalidInputError(
            "messages[0] cannot be learnt: it is the assistant's, and no message comes before it",
            hint='Put a message of the user or the system before it, or give it "weight": 0.',
        )
    template = _Template(tokenizer, tools)
    # Text first, tokens last: boundaries are found in the text, where a rendering of fewer messages
    # is a prefix, which its tokens need not be.
    text = template.render(messages)
    tail, end_of_turn = template.end_of_turn(messages[:-1])
    spans: List[Tuple[int, int]] = []
    for place in turns:
        # Train the model to continue exactly what it sees when it writes this message.
        prompt = template.render(messages[:place], generate=True)
        ended = text if place == turns[-1] else template.render(messages[: place + 1])
        if not ended.startswith(prompt):
            raise _inexact(place, "the generation prompt has text that it lacks", _SWITCH)
        reply = ended[len(prompt) :]
        body = reply[: -len(tail)] if tail and reply.endswith(tail) else reply
        # Some templates silently drop parts of earlier messages, such as reasoning.
        if has_content(messages[place]) and not body.strip():
            raise _inexact(place, "the template leaves out its content", None)
        if body != reply:
            reply = body + end_of_turn
        # Training uses the rendering of all messages, so the reply must be in it unchanged.
        if not text.startswith(prompt + reply):
            raise _inexact(place, "the template changes it once other messages follow", _LAST)
        if spans and len(prompt) < spans[-1][1]:
            raise _inexact(place, "the template continues the message before it", _LAST)
        spans.append((len(prompt), len(prompt) + len(reply)))
    return _encode(tokenizer, text, spans)


def _inexact(place: int, reason: str, hint: Optional[str]) -> InvalidInputError:
    return InvalidInputError(
        f"messages[{place}] cannot be learnt with the model's chat template: {reason}", hint=hint
    )


class _Template:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any, tools: Optional[Sequence[Mapping[str, Any]]]) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidInputError(
                "the model has no chat template",
                hint="Use a chat model, set tokenizer.chat_template, or give prompts and "
                "completions as text.",
            )
        self._tokenizer = tokenizer
        self._tools = None if tools is None else list(tools)

    def render(self, messages: Sequence[Message], *, generate: bool = False) -> str:
        """Return the text of *messages*, with the start of a reply if *generate* is true."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tools=self._tools, tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # a template is a program, and may refuse the messages
            roles = ", ".join(str(message["role"]) for message in messages[:8])
            raise InvalidInputError(
                f"the model's chat template refuses messages of the roles {roles or 'none'}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return text

    def end_of_turn(self, prompt: Sequence[Message]) -> Tuple[str, str]:
        """Return the text after the content of a reply to *prompt*, and the part of it to learn.

        The part to learn is what the model writes to end its turn: the text up to the last added
        token, such as ``<|im_end|>``, but not the newline after it.  Text that the template writes
        only after the last message does not belong to the turn, unless there is nothing else.
        """
        reply = {"role": "assistant", "content": _PROBE}
        tail = self._after_probe([*prompt, reply])
        inside = self._after_probe([*prompt, reply, {"role": "user", "content": "-"}])
        added = [str(token) for token in self._tokenizer.added_tokens_decoder.values()]
        # The first and last occurrence of each: the last one may come after the turn, where only a
        # conversation's last message has it.
        ends = [
            start + len(token)
            for token in added
            if token in tail
            for start in (tail.index(token), tail.rindex(token))
        ]
        in_turn = [end for end in ends if inside.startswith(tail[:end])]
        return tail, tail[: max(in_turn) if in_turn else min(ends, default=None)]

    def _after_probe(self, messages: Sequence[Message]) -> str:
        _, found, after = self.render(messages).rpartition(_PROBE)
        if not found:
            raise InvalidInputError(
                "the model's chat template leaves out the content of messages if it is a string",
                hint="It may be a template for images; set tokenizer.chat_template to another.",
            )
        return after


def _encode(tokenizer: Any, text: str, spans: Sequence[Tuple[int, int]]) -> WeightedTokens:
    """Return the tokens of *text*, with weight 1 in *spans*, which are in order."""
    cuts = list(chain([0], *spans, [len(text)]))
    pieces = split_tokens(tokenizer, text, cuts)
    weights = [[float(place % 2)] * len(piece) for place, piece in enumerate(pieces)]
    return WeightedTokens(list(chain(*pieces)), list(chain(*weights)))


def split_tokens(tokenizer: Any, text: str, cuts: Sequence[int]) -> List[List[int]]:
    """Return the tokens of *text* between successive *cuts*; the first is 0, the last its length.

    If no token crosses a cut, they are the tokens of the whole text; otherwise each piece is
    encoded by itself.

    Raises:
        InvalidInputError: the tokenizer can do neither, because the pieces decode to another text.
    """

    def encode(start: int, end: int) -> List[int]:
        ids: List[int] = tokenizer.encode(text[start:end], add_special_tokens=False)
        return ids

    def decode(ids: List[int]) -> str:
        decoded: str = tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return decoded

    # Best case: the pieces' own tokens are those of the whole text, so no token crosses a cut.
    whole = encode(0, len(text))
    pieces = [encode(start, end) for start, end in zip(cuts, cuts[1:])]
    joined = list(chain(*pieces))
    if joined == whole:
        return pieces
    # Some tokenizers begin every text with a space, so only pieces from the start can be compared.
    heads = [encode(0, cut) for cut in cuts]
    if all(whole[: len(head)] == head for head in heads):
        return [whole[len(head) : len(after)] for head, after in zip(heads, heads[1:])]
    # A token crosses a cut.  When a model generates, it continues the prompt's tokens as they are,
    # so separately encoded pieces are what it will meet, as long as they are the same text.
    if decode(joined) == decode(whole):
        return pieces
    raise InvalidInputError(
        "the part to learn begins or ends inside a token of this tokenizer",
        hint="Begin the reply or completion with a letter; end the prompt without a space.",
    )
