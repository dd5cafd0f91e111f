"""Examples prepared for training: which are checked, left out, and cached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, List, Sequence

import pytest

from tinkex import Datum, ModelInput
from tinkex.data import Example, Text, open_examples
from tinkex.errors import InvalidInputError
from tinkex.recipes import prepared
from tinkex.recipes.prepared import Prepared, split_heldout


def prepare(example: Example) -> Datum:
    """Return a datum with a token per letter of the text; refuse texts with an x."""
    assert isinstance(example, Text)
    if "x" in example.text:
        raise InvalidInputError("there is an x")
    count = len(example.text)
    return Datum(ModelInput.from_ints([1] * count), {"target_tokens": [1] * count})


def of(path: Path, texts: Sequence[str], **options: Any) -> Prepared[Datum]:
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    return Prepared(open_examples(path), options.pop("prepare", prepare), **options)


def lengths(data: Sequence[Datum]) -> List[int]:
    return [datum.model_input.length for datum in data]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "texts.jsonl"


def test_bad_examples_are_named_by_their_lines(file: Path) -> None:
    data = of(file, ["a", "x", "aaa", "xx"])
    with pytest.raises(InvalidInputError) as caught:
        data.check(10)
    message = caught.value.message
    assert message.startswith("2 of 4 examples cannot be used:\n  line 2 of ")
    assert "line 4 of" in message
    with pytest.raises(InvalidInputError, match=r"line 2 of .*: there is an x"):
        data[1]


def test_bad_examples_can_be_left_out(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = of(file, ["a", "x", "aaa", "xx"], skip_bad=True)
    assert data.check(10) == 4
    assert lengths(data[:]) == [1, 3]
    assert "left out: 2 of 4 examples" in caplog.text
    with pytest.raises(InvalidInputError, match="1 of 1 examples cannot be used"):
        of(file, ["x"], skip_bad=True).check(10)


def test_an_unchecked_bad_example_is_left_out_when_it_is_reached(file: Path) -> None:
    data = of(file, ["a", "aa", "x", "aaaa", "x"], skip_bad=True)
    assert data.check(2) == 2
    assert lengths(data[:]) == [1, 2, 4, 4, 1]
    with pytest.raises(InvalidInputError, match="there is an x"):
        of(file, ["x"], skip_bad=True)[0]


def test_examples_are_cached_while_there_is_room(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: List[str] = []

    def counted(example: Any) -> Datum:
        made.append(example.text)
        return prepare(example)

    monkeypatch.setattr(prepared, "KEPT_BYTES", prepare(Text("aa")).nbytes)
    data = of(file, ["aa", "aaa"], prepare=counted)
    data.check(2)
    assert lengths(data[:] + data[:]) == [2, 3, 2, 3]
    assert made == ["aa", "aaa", "aaa", "aaa"]


def test_shared_examples_are_left_out(file: Path, tmp_path: Path) -> None:
    training = of(file, ["a", "aa", "aaa", "aaaa"], indices=[0, 1, 3])
    heldout = of(tmp_path / "heldout.jsonl", ["aaaa", "aaa", "b", "aa"])
    assert heldout.leave_out(training) == 2
    assert lengths(heldout[:]) == [3, 1]
    assert heldout.leave_out(training) == 0


def test_the_split_is_the_same_each_time_and_complete() -> None:
    training, heldout = split_heldout(10, 3, seed=4)
    again, _ = split_heldout(10, 3, seed=4)
    assert training.tolist() == again.tolist() == sorted(training.tolist())
    assert sorted([*training, *heldout]) == list(range(10))
    assert len(heldout) == 3
