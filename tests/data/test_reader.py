"""Files of examples: every line is found, every fault is reported with its line."""

from __future__ import annotations

import hashlib
import json
import pickle
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, List, Tuple

import pytest
from hypothesis import given, strategies as st

from tinkex.data import Completion, Conversation, Text, open_examples, parse_example
from tinkex.errors import InvalidInputError


def write(folder: Path, *lines: Any) -> Path:
    """Write *lines* into a file: bytes unchanged, other values as JSON."""
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


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}')
    assert list(open_examples(path)) == [Text("one"), Text("two")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": "b"}]', "line 1: it is not JSON: "),
        ('[{"text": "a"}]', "line 1: an example is a list, not an object"),
        ('{"text": "a"}{"text": "b"}\n', r"unexpected content after document \(column 14\)"),
        ('{"text": "a"}\r{"text": "b"}\r', "unexpected content after document"),
        ("{\n'text': 'a'\n}", "3 of 3 lines are not examples"),
        ('{"text": "\\ud800"}', "surrogate"),
        ("[" * 50, "line 1: it is not JSON"),
    ],
)
def test_files_of_other_formats_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "examples.json"
    path.write_bytes(content.encode())
    with pytest.raises(InvalidInputError, match=message) as caught:
        open_examples(path)
    assert "one JSON object per line" in str(caught.value)
    path.write_bytes(content.encode("utf-16"))
    with pytest.raises(InvalidInputError, match="line 1: it is not UTF-8"):
        open_examples(path)


def test_no_more_than_five_bad_lines_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path, *[b"x"] * 1000)
    for skip_bad in (False, True):
        with pytest.raises(InvalidInputError, match="1000 of 1000 lines") as caught:
            open_examples(path, skip_bad=skip_bad)
        assert "line 5:" in str(caught.value)
        assert "line 6:" not in str(caught.value)


def test_a_line_that_is_too_long_is_never_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinkex.data.reader.MAX_LINE_BYTES", 64)
    longest = b'{"text": "%s"}' % (b"x" * (63 - 12))
    long = b'{"text": "%s"}' % (b"x" * 3_000_000)
    path = write(tmp_path, longest, long, b'{"text": "two"}', long)
    with pytest.raises(InvalidInputError, match="line 2: it is longer than"):
        open_examples(path)
    with pytest.warns(UserWarning, match="2 of 4 lines"):
        examples = open_examples(path, skip_bad=True)
    assert [examples.line(i) for i in range(2)] == [1, 3]
    assert examples[:] == [Text("x" * 51), Text("two")]
    assert examples.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_relative_path_still_works_after_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"text": "fine"})
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    examples = open_examples("examples.jsonl")
    monkeypatch.chdir(tmp_path / "other")
    assert examples[0] == Text("fine")
    assert examples.path == str(tmp_path / "examples.jsonl")
    (tmp_path / "examples.jsonl").unlink()
    with pytest.raises(InvalidInputError, match="No such file"):
        examples[0]


def test_examples_are_read_from_several_threads(tmp_path: Path) -> None:
    path = write(tmp_path, *({"text": f"number {i}"} for i in range(500)))
    examples = open_examples(path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(examples.__getitem__, [i * 7 % 500 for i in range(2000)]))
    assert found == [Text(f"number {i * 7 % 500}") for i in range(2000)]


good = st.fixed_dictionaries({"text": st.text(st.characters(codec="utf-8"), max_size=8)}).map(
    lambda record: json.dumps({"text": "x" + record["text"]}, ensure_ascii=False).encode()
)
#: Lines as found in files: examples, blank lines, and every kind of fault.
line = st.one_of(
    good,
    good,
    good.map(lambda text: b" " + text + b"\t"),
    st.sampled_from([b"", b" ", b"\t", b"{", b"null", b"7", b'{"text": NaN}', b'{"text": ""}']),
    st.sampled_from([b'{"text": "a", "text": "b"}', b"\xff\xfe", b'"\xe2\x80\xa8"', b"\x00"]),
    st.binary(max_size=6).map(lambda noise: noise.replace(b"\n", b"")),
)


@given(
    st.lists(st.tuples(line, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_any_file_is_read_line_by_line(
    lines: List[Tuple[bytes, bytes]], bom: bool, final: bool
) -> None:
    content = b"".join(text + end for text, end in lines)
    if not final and content.endswith(b"\n"):
        content = content[:-1]
    expected = []  # by Python's own JSON parser
    bad = 0
    for number, text in enumerate(content.split(b"\n"), 1):
        if text.strip():
            try:
                expected.append((number, parse_example(json.loads(text, parse_constant=int))))
            except ValueError:
                bad += 1
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "examples.jsonl"
        path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + content)
        if bad or not expected:
            with pytest.raises(InvalidInputError, match=f"{bad} of .* line" if bad else "no exam"):
                open_examples(path)
        if expected:
            examples = open_examples(path, skip_bad=True)
            assert list(examples) == [example for _, example in expected]
            assert [examples[i] for i in range(len(examples))] == list(examples)
            assert [examples.line(i) for i in range(len(examples))] == [n for n, _ in expected]
