"""Files of examples: every line found, every fault reported with its line."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tinkex.data import Completion, Conversation, Text, open_examples
from tinkex.errors import InvalidInputError


def write(folder: Path, *lines: Any) -> Path:
    """Write *lines*, bytes as they are and others as JSON, into a file."""
    path = folder / "examples.jsonl"
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


def test_examples_are_read_in_order_with_their_lines(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(
        tmp_path, {"text": "one"}, b"", {"prompt": "p", "completion": "c"}, b" ", {"messages": chat}
    )
    examples = open_examples(path)
    assert list(examples) == [Text("one"), Completion("p", "c"), Conversation(chat)]
    assert [examples[i] for i in (0, 1, 2, -1)] == [*examples, examples[2]]
    assert examples[1:] == list(examples)[1:]
    assert [examples.line(i) for i in (0, 1, 2, -1)] == [1, 3, 5, 5]
    assert examples.kinds == {Text, Completion, Conversation}
    assert examples.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(pickle.loads(pickle.dumps(examples))) == list(examples)
    with pytest.raises(IndexError):
        examples[3]


def test_bad_lines_are_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    good = {"text": "fine"}
    path = write(tmp_path, good, b"{", good, {"txt": 1}, b'{"text": "\xff"}', b'{"text": NaN}')
    with pytest.raises(InvalidInputError) as caught:
        open_examples(path)
    text = str(caught.value)
    assert "4 of 6 lines are not examples in" in text
    assert "line 2: it is not JSON" in text
    assert "line 4: the format of an example with 'txt' is unknown" in text
    assert "line 5: it is not UTF-8" in text
    assert "line 6: it is not JSON" in text
    with pytest.warns(UserWarning, match="left out: 4 of 6 lines"):
        examples = open_examples(path, skip_bad=True)
    assert len(examples) == 2
    assert examples.line(1) == 3


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "fine"})
    examples = open_examples(path)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(InvalidInputError, match="has changed since it was opened"):
        examples[0]


@pytest.mark.parametrize("lines", [[], [b""], [b"", b"  ", b"\r"]])
def test_a_file_without_examples_is_refused(tmp_path: Path, lines: Any) -> None:
    with pytest.raises(InvalidInputError, match="has no examples"):
        open_examples(write(tmp_path, *lines))


def test_a_file_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot read .*none\.jsonl: No such file"):
        open_examples(tmp_path / "none.jsonl")
    with pytest.raises(InvalidInputError, match=r"cannot read .*: Is a directory"):
        open_examples(tmp_path)
