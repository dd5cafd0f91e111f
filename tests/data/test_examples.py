"""Records in the usual formats, and refused records."""

from __future__ import annotations

from typing import Any

import pytest

from tinkex.data import Completion, Conversation, Preference, Text, parse_example
from tinkex.errors import InvalidInputError

USER = {"role": "user", "content": "1+1?"}
TWO = {"role": "assistant", "content": "2"}
THREE = {"role": "assistant", "content": "3"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [USER, TWO]}, Conversation([USER, TWO])),
        ({"messages": [USER, CALL]}, Conversation([USER, CALL])),
        ({"messages": [USER, TWO], "tools": [{}]}, Conversation([USER, TWO], [{}])),
        ({"messages": [USER, TWO], "tools": []}, Conversation([USER, TWO])),
        ({"messages": [USER, TWO], "prompt": "1+1?", "id": 3}, Conversation([USER, TWO])),
        ({"messages": None, "text": "a"}, Text("a")),
        ({"prompt": "", "completion": "b"}, Completion("", "b")),
        ({"prompt": [USER], "completion": [TWO]}, Completion([USER], [TWO])),
        ({"text": "a", "prompt": "b"}, Text("a")),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, Preference("a", "b", "p")),
        ({"chosen": "a", "rejected": "b"}, Preference("a", "b", "")),
        (
            {"prompt": [USER], "chosen": [TWO], "rejected": [THREE]},
            Preference([TWO], [THREE], [USER]),
        ),
        (
            {"prompt": "1+1?", "chosen": [TWO], "rejected": [THREE]},
            Preference([TWO], [THREE], [USER]),
        ),
        (
            {"prompt": "1+1?", "chosen": [USER, TWO], "rejected": [USER, THREE]},
            Preference([TWO], [THREE], [USER]),
        ),
        (
            {"prompt": [USER], "chosen": [USER, TWO], "rejected": [USER, THREE]},
            Preference([TWO], [THREE], [USER]),
        ),
        (
            {"chosen": [USER, TWO, USER, TWO], "rejected": [USER, TWO, USER, THREE]},
            Preference([TWO], [THREE], [USER, TWO, USER]),
        ),
        (
            {"chosen": [USER, TWO], "rejected": [USER, TWO, USER, THREE]},
            Preference([TWO], [TWO, USER, THREE], [USER]),
        ),
        (
            {"messages": [USER, TWO], "chosen": "a", "rejected": "b"},
            Preference("a", "b", ""),
        ),
    ],
)
def test_usual_formats_are_read(record: Any, expected: Any) -> None:
    assert parse_example(record) == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "an example is a list, not an object"),
        ("text", "an example is a str, not an object"),
        ({}, "with no keys is unknown"),
        ({"instruction": "a", "output": "b"}, "with 'instruction', 'output' is unknown"),
        ({"prompt": "a"}, "with 'prompt' is unknown"),
        ({"text": 1}, "'text' is an int, not text"),
        ({"text": " \n"}, "'text' is empty"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": 1, "completion": "a"}, "'prompt' is an int and 'completion' a str"),
        ({"prompt": "a", "completion": [TWO]}, "both text, or both lists of messages"),
        ({"prompt": [], "completion": [TWO]}, "'prompt' is empty"),
        ({"prompt": [USER], "completion": [USER]}, r"no assistant message \(roles: user\)"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "hi"}, "'messages' is a str, not a list of messages"),
        ({"messages": {"role": "user"}}, "'messages' is a dict, not a list"),
        ({"messages": ["hi"]}, r"messages\[0\] is a str, not an object with role"),
        ({"messages": [{"from": "gpt", "value": "a"}]}, r"role of messages\[0\] is None"),
        ({"messages": [{"role": "", "content": "a"}]}, "role of .* is '', not a name"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "is .*, not a name"),
        ({"messages": [{"role": "user"}]}, r"content of messages\[0\] is None, not text"),
        ({"messages": [{"role": "user", "content": 3}]}, "is an int, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
        ({"messages": [USER]}, r"nothing to learn: no assistant message \(roles: user\)"),
        ({"messages": [USER, {"role": "gpt", "content": "a"}]}, "roles: user, gpt"),
        ({"messages": [USER, {**TWO, "content": " "}]}, "assistant messages are empty"),
        ({"messages": [USER, {**CALL, "tool_calls": []}]}, "assistant messages are empty"),
        ({"messages": [USER, {**TWO, "weight": 0}]}, "weight of each assistant message is 0"),
        ({"messages": [USER, {**TWO, "weight": 0.5}]}, "is 0.5, not 0 or 1"),
        ({"messages": [USER, {**TWO, "weight": [1]}]}, r"is \[1\], not 0 or 1"),
        ({"messages": [USER, TWO], "tools": "f"}, "'tools' is a str, not a list"),
        ({"chosen": "a", "rejected": "a"}, "are the same"),
        ({"chosen": "a", "rejected": " "}, "'rejected' is empty"),
        ({"chosen": "a", "rejected": [TWO]}, "must be both text, or both lists"),
        ({"chosen": 1, "rejected": 2}, "'chosen' is an int, not a list of messages"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is an int"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "both text, or both lists"),
        ({"chosen": [TWO], "rejected": [THREE]}, "have no prompt in common"),
        ({"chosen": [USER, TWO], "rejected": [{**USER, "content": "2"}, TWO]}, "no prompt"),
        ({"chosen": [USER, TWO], "rejected": [USER, USER]}, "'rejected' has nothing to learn"),
    ],
)
def test_other_records_are_refused_with_the_reason(record: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse_example(record)


def test_a_format_of_another_library_gets_an_explanation() -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_example({"messages": [{"from": "human", "value": "a"}]})
    assert "'from' and 'value': rename them" in str(caught.value)


def test_other_keys_of_a_message_are_kept_for_the_template() -> None:
    message = {"role": "tool", "content": "2", "tool_call_id": "x", "name": "add"}
    example = parse_example({"messages": [USER, CALL, message, TWO]})
    assert example == Conversation([USER, CALL, message, TWO])
