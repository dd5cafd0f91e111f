"""The kinds of examples, and parsing them from records (docs/data.md, "Formats").

All checks that need no tokenizer are here, so that opening a file finds its errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence  # isinstance is slow with typing's
from typing import Any, Dict, List, Optional, Tuple, Union

from tinkex.errors import InvalidInputError, a_type

#: One message of a conversation: ``role``, ``content`` and whatever else the template reads.
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation, to learn its assistant messages; *tools* are the functions it offers."""

    messages: Sequence[Message]
    tools: Optional[Sequence[Mapping[str, Any]]] = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt and its continuation: both texts, or both lists of messages."""

    prompt: Union[str, Sequence[Message]]
    completion: Union[str, Sequence[Message]]
    tools: Optional[Sequence[Mapping[str, Any]]] = None


@dataclasses.dataclass(frozen=True)
class Text:
    """Plain text, to learn all of it."""

    text: str


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two continuations of one prompt, the better and the worse: all texts, or all messages."""

    chosen: Union[str, Sequence[Message]]
    rejected: Union[str, Sequence[Message]]
    prompt: Union[str, Sequence[Message]]
    tools: Optional[Sequence[Mapping[str, Any]]] = None


Example = Union[Conversation, Completion, Text, Preference]

_FORMS = (
    "An example has one of these sets of keys: messages; prompt and completion; text; "
    "chosen and rejected, with or without prompt."
)


def parse_example(record: Any) -> Example:
    """Return the example in *record*, the object in one line of a JSONL file.

    Keys that belong to no format are ignored.

    Raises:
        InvalidInputError: *record* has none of the formats, or holds nothing to learn.
    """
    if not isinstance(record, Mapping):
        raise InvalidInputError(f"an example is {a_type(record)}, not an object", hint=_FORMS)
    has = {key for key, value in record.items() if value is not None}
    tools = record.get("tools") or None
    if tools is not None and not isinstance(tools, list):
        raise InvalidInputError(f"'tools' is {a_type(tools)}, not a list")
    if {"chosen", "rejected"} <= has:
        return _preference(record, tools)
    if "messages" in has:
        messages = as_messages("messages", record["messages"])
        assistant_turns("messages", messages)
        return Conversation(messages, tools)
    if {"prompt", "completion"} <= has:
        prompt, completion = _joined("completion", record["prompt"], record["completion"])
        return Completion(prompt, completion, tools)
    if "text" in has:
        return Text(_text("text", record["text"]))
    keys = ", ".join(repr(str(key)) for key in list(record)[:8]) or "no keys"
    raise InvalidInputError(f"the format of an example with {keys} is unknown", hint=_FORMS)


def as_messages(name: str, messages: Any) -> List[Dict[str, Any]]:
    """Check *messages*; return each as a new dict, with lists of text parts joined to a string.

    Raises:
        InvalidInputError: these are not messages, or they hold something besides text.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        what = "empty" if messages == [] else f"{a_type(messages)}, not a list of messages"
        raise InvalidInputError(f"{name!r} is {what}")
    return [_message(f"{name}[{place}]", message) for place, message in enumerate(messages)]


def assistant_turns(name: str, messages: Sequence[Message], first: int = 0) -> List[int]:
    """Return the indices, from *first* on, of the assistant messages to learn.

    Messages with ``"weight": 0`` are not learnt (as in OpenAI's format).

    Raises:
        InvalidInputError: there are none, or all of them are empty.
    """
    found = [
        place
        for place in range(first, len(messages))
        if messages[place]["role"] == "assistant" and messages[place].get("weight", 1) != 0
    ]
    if not found:
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages[first:]))
        raise InvalidInputError(
            f"{name!r} has nothing to learn: no assistant message (roles: {roles or 'none'})"
            if all(message["role"] != "assistant" for message in messages[first:])
            else f"{name!r} has nothing to learn: the weight of each assistant message is 0"
        )
    if not any(has_content(messages[place]) for place in found):
        raise InvalidInputError(f"{name!r} has nothing to learn: assistant messages are empty")
    return found


def has_content(message: Message) -> bool:
    content = message.get("content")
    others = message.keys() - {"role", "content", "weight"}
    return bool(content and content.strip()) or any(message[key] for key in others)


def _message(name: str, message: Any) -> Dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidInputError(f"{name} is {a_type(message)}, not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        hint = "It has 'from' and 'value': rename them." if "from" in message else None
        raise InvalidInputError(f"the role of {name} is {role!r}, not a name", hint=hint)
    if message.get("weight") not in (None, 0, 1):
        raise InvalidInputError(f"the weight of {name} is {message['weight']!r}, not 0 or 1")
    checked = {str(key): value for key, value in message.items()}
    if isinstance(content, list):
        checked["content"] = "".join(_part(name, part) for part in content)
    elif content is None and message.keys() - {"role", "content", "weight"}:
        pass  # a tool call, whose content is null
    elif not isinstance(content, str):
        raise InvalidInputError(f"the content of {name} is {a_type(content)}, not text")
    return checked


def _part(name: str, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and "text" in part:
        part = part["text"]
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else a_type(part)
    raise InvalidInputError(f"the content of {name} has a part of type {kind!r}; only text is read")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidInputError(f"{name!r} is {a_type(value)}, not text")
    if not value.strip():
        raise InvalidInputError(f"{name!r} is empty: there is nothing to learn")
    return value


def _joined(name: str, prompt: Any, continuation: Any) -> Tuple[Any, Any]:
    """Check *prompt* and its *continuation*; return both as texts, or both as messages."""
    if isinstance(prompt, str) and isinstance(continuation, str):
        return prompt, _text(name, continuation)
    if isinstance(prompt, str) or isinstance(continuation, str):
        raise InvalidInputError(
            f"'prompt' is {a_type(prompt)} and {name!r} {a_type(continuation)}; "
            "they must be both text, or both lists of messages"
        )
    messages = as_messages(name, continuation)
    assistant_turns(name, messages)
    return as_messages("prompt", prompt), messages


def _preference(record: Mapping[str, Any], tools: Optional[List[Any]]) -> Preference:
    chosen, rejected, prompt = record["chosen"], record["rejected"], record.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise InvalidInputError(
            f"'chosen' is {a_type(chosen)} and 'rejected' {a_type(rejected)}; "
            "they must be both text, or both lists of messages"
        )
    if isinstance(chosen, str):
        prompt = "" if prompt is None else prompt
    else:
        prompt, chosen, rejected = _split_prompt(prompt, chosen, rejected)
    if chosen == rejected:
        raise InvalidInputError("'chosen' and 'rejected' are the same: there is nothing to learn")
    if prompt == []:  # the conversations begin with their replies
        raise InvalidInputError("'chosen' and 'rejected' have no prompt in common")
    _joined("chosen", prompt, chosen)
    _joined("rejected", prompt, rejected)
    return Preference(chosen, rejected, prompt, tools)


def _split_prompt(prompt: Any, chosen: Any, rejected: Any) -> Tuple[Any, ...]:
    """Return the common prompt, and what follows it in *chosen* and in *rejected*.

    Many files repeat the prompt in both conversations, and often also give it as text.
    """
    chosen, rejected = as_messages("chosen", chosen), as_messages("rejected", rejected)
    if isinstance(prompt, str):
        if chosen[0]["role"] == "assistant":
            return [{"role": "user", "content": prompt}], chosen, rejected
        prompt = None
    head: List[Dict[str, Any]] = [] if prompt is None else as_messages("prompt", prompt)
    if chosen[: len(head)] == head == rejected[: len(head)]:
        shared = len(head)
        shortest = min(len(chosen), len(rejected)) - 1  # the last reply never belongs to the prompt
        while shared < shortest and chosen[shared] == rejected[shared]:
            shared += 1
        return chosen[:shared], chosen[shared:], rejected[shared:]
    return head, chosen, rejected
