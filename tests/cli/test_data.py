"""``tinkex data show``: which tokens of a file of examples are trained on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from support.programs import Done, interrupt, started, tinkex

from tinkex.cli.main import run_command

EXAMPLES: List[Any] = [
    {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4\nfour"},
            {"role": "user", "content": "and 3 + 3?"},
            {"role": "assistant", "content": "six"},
        ]
    },
    {"prompt": "Once upon", "completion": " a time"},
    {"prompt": "hi", "chosen": " good", "rejected": " bad"},
    {"text": "wörld 漢字 [bold]\x1b"},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in EXAMPLES) + "\n")
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache with the tiny model, made once."""
    pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKEX_CACHE", str(tmp_path_factory.mktemp("models")))
        yield


def show(*arguments: object) -> Done:
    return tinkex("data", "show", *map(str, arguments))


# Without a tokenizer


def test_a_broken_line_is_named(file: Path):
    file.write_text(file.read_text() + "{broken\n")
    done = show(file, "--model", "tiny-random")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert re.search(r"\bline 5\b", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", [None, ""], ids=["missing", "empty"])
def test_a_file_without_examples_is_one_clear_error(tmp_path: Path, content: Any):
    path = tmp_path / "examples.jsonl"
    if content is not None:
        path.write_text(content)
    done = show(path, "--model", "tiny-random")
    assert (done.returncode, done.stdout) == (1, "")
    assert str(path) in done.stderr


def test_a_line_number_without_an_example_is_wrong_usage(file: Path):
    done = show(file, "--model", "tiny-random", "--line", 9)
    assert done.returncode == 2
    assert "no example in line 9" in done.stderr
    assert show(file).returncode == 2, "a model must be named"


def test_a_model_without_a_tokenizer_is_one_clear_error(file: Path):
    done = show(file, "--model", "deterministic")
    assert (done.returncode, done.stdout) == (1, "")
    assert "has no tokenizer" in done.stderr


def test_an_interrupt_ends_the_command_while_it_waits(tmp_path: Path):
    pipe = tmp_path / "examples.jsonl"
    os.mkfifo(pipe)
    code = """
import time, tinkex.cli.data, tinkex.cli.main
def open_examples(*_, **__):
    print("begun", flush=True)
    time.sleep(600)
tinkex.cli.data.open_examples = open_examples
tinkex.cli.main.main()
"""
    with started(["-c", code, "data", "show", str(pipe), "--model", "m"]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        done = interrupt(process)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


# With the tiny model's


@pytest.mark.engine
def test_learnt_tokens_are_marked(file: Path, cache: None):
    done = show(file, "--model", "tiny-random", "--limit", 0)
    assert (done.returncode, done.stderr) == (0, "")
    blocks = done.stdout.split("line ")[1:]
    assert len(blocks) == 5
    assert blocks[0].startswith("1: conversation: ")
    assert "2 + 2?<|im_end|>\n<|im_start|>assistant\n{+4\nfour<|im_end|>+}\n" in blocks[0]
    assert "{+six<|im_end|>+}" in blocks[0]
    assert "Once upon{+ a time" in blocks[1]
    assert blocks[2].startswith("3: preference (chosen): ")
    assert "hi{+ good" in blocks[2]
    assert "hi{+ bad" in blocks[3]
    assert "漢字 [bold]\\x1b" in blocks[4], "control characters do not reach the terminal"


@pytest.mark.engine
def test_lines_and_the_learnt_messages_can_be_chosen(file: Path, cache: None):
    done = show(file, "--model", "tiny-random", "--line", 1, "--learn", "last")
    assert done.stdout.count("{+") == 1
    assert "{+six" in done.stdout
    assert show(file, "--model", "tiny-random", "--limit", 1).stdout.count("line ") == 1


@pytest.mark.engine
def test_json_has_each_token_with_its_weight(file: Path, cache: None):
    command = (file, "--model", "tiny-random", "--line", 2, "--line", 3)
    found = json.loads(show(*command, "-f", "json").stdout)["examples"]
    assert [(one["line"], one["part"]) for one in found] == [
        (2, ""),
        (3, "chosen"),
        (3, "rejected"),
    ]
    tokens = found[0]["tokens"]
    assert "".join(token["text"] for token in tokens).startswith("Once upon a time")
    assert {token["weight"] for token in tokens} == {0.0, 1.0}
    learnt = "".join(token["text"] for token in tokens if token["weight"])
    assert learnt.startswith(" a time")


@pytest.mark.engine
def test_cut_and_unusable_examples_are_marked(file: Path, cache: None):
    done = show(file, "--model", "tiny-random", "--max-tokens", 14, "--line", 2, "--line", 1)
    assert done.returncode == 1
    assert re.search(
        r"line 2: completion: 15 tokens, \d of them learnt, cut: its input had 1", done.stdout
    )
    assert "line 1: conversation: an example has nothing to learn" in done.stdout


@pytest.mark.engine
def test_a_terminal_gets_colours_and_no_broken_lines(file: Path, cache: None, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TINKEX_NO_STATUS", "1")
    command = ["data", "show", str(file), "--model", "tiny-random", "--line", "2"]
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal):
        assert run_command(command) == 0
    assert "\x1b[2mOnce upon\x1b[0m\x1b[32m a time" in terminal.getvalue()
    assert len(terminal.getvalue().splitlines()) == 3
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    with contextlib.redirect_stdout(plain):
        assert run_command(command) == 0
    assert "\x1b" not in plain.getvalue()
    assert "Once upon{+ a time" in plain.getvalue()
