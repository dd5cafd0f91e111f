"""The quickstart, README's program and `tinkex sample`, as processes, with a tiny model."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import List

import pytest
from support.programs import (
    PATIENCE_S,
    REPOSITORY,
    Server,
    interrupt,
    run,
    started,
    tinkex,
)

pytestmark = pytest.mark.engine

EXAMPLES = REPOSITORY / "examples"
QUICKSTART = str(EXAMPLES / "quickstart.py")
MODEL = "tiny-random"


@pytest.fixture
def texts(tmp_path: Path) -> List[str]:
    """Options that name a short text of the user's own."""
    (tmp_path / "train.txt").write_text("ONE, n. A\nnumber.\n\nTWO, n. Another.\n\n\nTHREE, n.\n")
    (tmp_path / "heldout.txt").write_text("FOUR, n. The next.\n\nFIVE, n. And so on.\n")
    return ["--data", str(tmp_path / "train.txt"), "--heldout", str(tmp_path / "heldout.txt")]


def ended_by(server: Server) -> List[str]:
    """Return the reason for which each session ended."""
    return [re.search(r"ended it: (\w+)", end)[1] for end in server.ends()]  # type: ignore[index]


def test_quickstart_on_a_server(torch_server, texts, tmp_path):
    options = ["--steps", "5", "--batch-size", "2", "--model", MODEL, "--learning-rate", "0.01"]
    done = run(
        [QUICKSTART, *options, *texts, "--base-url", torch_server.url, "--data-dir", str(tmp_path)]
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert "3 paragraphs to train on, 2 held out" in done.stdout
    before, after = re.search(r"per token: ([\d.]+) before, ([\d.]+) after", done.stdout).groups()
    assert float(after) < float(before)
    assert done.stdout.count("PROGRAMMER, n.") == 2
    assert re.search(r"To train on: tinker://\S+/weights/quickstart\n", done.stdout)
    assert re.search(r"To sample:   tinker://\S+/sampler_weights/quickstart\n", done.stdout)
    assert "└─────" in done.stdout
    assert ended_by(torch_server) == ["success"]


def test_quickstart_on_the_embedded_server_keeps_its_checkpoint(texts, tmp_path):
    kept = tmp_path / "kept"
    options = ["--steps", "2", "--batch-size", "2", "--model", MODEL, "--data-dir", str(kept)]
    done = run([QUICKSTART, *options, *texts, "--prompt", "SIX, n."])
    assert done.stderr == ""
    assert done.returncode == 0
    path = re.search(r"To sample:   (\S+)", done.stdout)[1]
    sample = ["-m", "tinkex", "sample", "SIX, n.", "--local", "--base-model", MODEL]
    drawn_alike = ["--max-tokens", "60", "--temperature", "0.7", "--top-p", "0.9", "--seed", "0"]
    again = run([*sample, "--data-dir", str(kept), "--model-path", path, *drawn_alike])
    assert again.stderr == ""
    assert again.returncode == 0
    written = re.search(r"After\n  SIX, n. (.*?)\n\n", done.stdout, re.DOTALL)[1]
    assert "".join(again.stdout.split()) == "".join(written.split())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_quickstart_and_its_session(torch_server, texts, signum):
    options = ["--steps", "1000000", "--model", MODEL, "--base-url", torch_server.url]
    with started([QUICKSTART, *options, *texts]) as process:
        trained = torch_server.trained.wait(PATIENCE_S)
        process.send_signal(signum)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert trained, stderr
    assert process.returncode == 130
    assert stderr == ""
    assert stdout.splitlines()[-1] == "Interrupted; nothing is left running."
    assert ended_by(torch_server) == ["interrupted"]


def test_a_quickstart_in_a_pipe_says_what_it_does(torch_server, texts):
    options = ["--steps", "1000000", "--model", MODEL, "--base-url", torch_server.url]
    with started([QUICKSTART, *options, *texts]) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Using the server at ")
        while not process.stdout.readline().startswith("step 1/"):
            assert process.poll() is None


def test_ctrl_c_ends_the_quickstart_and_the_server_in_it(texts, tmp_path):
    options = ["--steps", "1000000", "--model", MODEL, "--data-dir", str(tmp_path / "kept")]
    with started([QUICKSTART, *options, *texts]) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("Session "):
            assert process.poll() is None
        done = interrupt(process)
    assert done.returncode == 130
    assert done.stderr == ""


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\xfe\x00"], ids=["missing", "empty", "binary"]
)
def test_the_error_of_the_quickstart_names_unreadable_data(tmp_path, content):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    done = run([QUICKSTART, "--data", str(path), "--base-url", "http://127.0.0.1:9"])
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert str(path) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_error_of_the_quickstart_names_a_model_the_server_lacks(torch_server, texts):
    done = run([QUICKSTART, *texts, "--model", "no-such-model", "--base-url", torch_server.url])
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr
    assert ended_by(torch_server) == ["errored"]


def test_the_readmes_program_runs(tmp_path):
    (program,) = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL
    )
    script = tmp_path / "readme.py"
    script.write_text(program.replace("smollm2-135m", MODEL))
    done = run([str(script)])
    assert done.stderr == ""
    assert done.returncode == 0
    losses = [float(line) for line in done.stdout.splitlines()[:10]]
    assert losses[-1] < losses[0]


def lines_of(example):
    if example.suffix == ".ipynb":
        cells = json.loads(example.read_text())["cells"]
        return [line for cell in cells for line in cell["source"]]
    return example.read_text().splitlines()


def test_examples_are_short_and_have_tests():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    examples = [path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert len(examples) >= 14
    for example in examples:
        assert f'"{example.name}"' in tests, f"{example.name} has no test"
        most = 270 if example.name == "quickstart.py" else 99
        assert len(lines_of(example)) <= most, example.name


def test_sample_prints_the_text_and_ends_its_session(torch_server):
    command = ["-m", "tinkex", "sample", "Once", "--seed", "3", "--max-tokens", "12"]
    first = run([*command], base_url=torch_server.url)  # the server's only model is found
    assert first.stderr == ""
    assert first.returncode == 0
    again = tinkex(*command[2:], "--base-model", MODEL, base_url=torch_server.url)
    assert again.stdout == first.stdout
    assert ended_by(torch_server) == ["success", "success"]


@pytest.mark.parametrize("options", [[], ["--stop", "a"], ["--chat"]], ids=str)
def test_a_streamed_sample_is_the_same(torch_server, monkeypatch, options):
    command = ["sample", "Once", "--seed", "3", "--max-tokens", "40", *options]
    streamed = tinkex(*command, base_url=torch_server.url)
    assert (streamed.returncode, streamed.stderr) == (0, "")
    monkeypatch.setattr("tinkex.cli.generate._offers_streams", lambda config: False)
    assert tinkex(*command, base_url=torch_server.url) == streamed
    listed = tinkex(*command, "-f", "json", base_url=torch_server.url)
    assert json.loads(listed.stdout)["sequences"][0]["text"] == streamed.stdout[:-1]


def test_a_sample_is_printed_while_it_is_drawn(torch_server, monkeypatch):
    written = []
    monkeypatch.setattr(
        "tinkex.cli.generate.sys",
        SimpleNamespace(
            stdout=SimpleNamespace(write=written.append, flush=lambda: None, isatty=lambda: True)
        ),
    )
    done = tinkex("sample", "Once", "--seed", "3", "--max-tokens", "40", base_url=torch_server.url)
    assert done.returncode == 0
    assert len(written) > 10
    assert written[-1] == "\n"


def test_a_chat_replies_to_everything_said_so_far(torch_server, monkeypatch):
    command = ["chat", "--seed", "1", "--max-tokens", "8", "--system", "Be brief.", "-f", "json"]
    done = tinkex(*command, base_url=torch_server.url, stdin="Hi\n\nHi\n/new\nHi\n")
    assert (done.returncode, done.stderr) == (0, "")
    decoder = json.JSONDecoder()
    replies, text = [], done.stdout
    while text.strip():
        reply, end = decoder.raw_decode(text.lstrip())
        replies.append(reply)
        text = text.lstrip()[end:]
    assert [reply["role"] for reply in replies] == ["assistant"] * 3
    assert replies[0] == replies[2] != replies[1]
    plain = tinkex(*command[:-2], base_url=torch_server.url, stdin="Hi\nHi\n")
    assert plain.stdout == f"{replies[0]['content']}\n{replies[1]['content']}\n"
    monkeypatch.setattr("tinkex.cli.generate._offers_streams", lambda config: False)
    assert tinkex(*command[:-2], base_url=torch_server.url, stdin="Hi\nHi\n") == plain
    assert ended_by(torch_server) == ["success"] * 3


def test_a_refused_stream_is_an_error(torch_server):
    done = tinkex("sample", "Once", "--max-tokens", "9999", base_url=torch_server.url)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "context holds 512 tokens" in done.stderr


def test_sample_several_as_json(torch_server):
    command = ["sample", "-", "-n", "3", "--max-tokens", "4", "-f", "json"]
    done = tinkex(*command, "--stop", "zz", "--chat", base_url=torch_server.url, stdin="Hello")
    assert done.stderr == ""
    assert done.returncode == 0
    sequences = json.loads(done.stdout)["sequences"]
    assert len(sequences) == 3
    assert all(len(s["tokens"]) <= 4 and s["stop_reason"] in ("length", "stop") for s in sequences)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model-path", "nonsense"], "nonsense"),
        (["--base-model", "no-such-model"], "no-such-model"),
        (["--model-path", "tinker://no-such/sampler_weights/run"], "no-such"),
    ],
    ids=["bad path", "unknown model", "no such checkpoint"],
)
def test_the_error_of_sample_names_the_fault(torch_server, options, named):
    done = tinkex("sample", "Once", *options, base_url=torch_server.url)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert "live" not in torch_server.ends()


def test_an_option_out_of_range_is_wrong_usage(torch_server):
    done = tinkex("sample", "Once", "--temperature", "-1", base_url=torch_server.url)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Error: --temperature is -1.0; it must be" in done.stderr
    assert torch_server.ends() == []
