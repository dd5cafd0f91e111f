"""The examples that need no tokenizer, as processes, with the deterministic engine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import List

from support.programs import PATIENCE_S, REPOSITORY, Server, run, run_example, started

from tinkex import read_run
from tinkex.testing import FakeServer, faults

EXAMPLES = REPOSITORY / "examples"
MODEL = ["--model", "deterministic"]


def test_the_heartbeat_example_finds_the_path_that_a_server_accepts(server: Server) -> None:
    stdout = run_example("heartbeat_probe.py", server=server)
    assert re.findall(r"^POST (\S+) +(\d+)$", stdout, re.M) == [
        ("/api/v1/session_heartbeat", "200"),
        ("/api/v1/heartbeat", "404"),
        ("/api/v1/session/heartbeat", "404"),
    ]


def indices(path: Path) -> List[int]:
    return [json.loads(line)["index"] for line in path.read_text().splitlines()]


def test_many_samples_on_the_embedded_server(tmp_path: Path) -> None:
    options = [*MODEL, "--out", str(tmp_path / "samples.jsonl")]
    stdout = run_example("sample_many.py", *options)
    assert sorted(indices(tmp_path / "samples.jsonl")) == list(range(50))
    assert "0 of 50 prompts are finished\n50 sampled, 0 failed\n" in stdout
    assert "150 tokens prefilled, " in stdout
    assert re.search(r"p50 [\d.]+ ms", stdout)


def test_killed_sampling_continues_and_draws_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    options = [*MODEL, "--count", "40", "--in-flight", "4", "--out", str(path)]
    with FakeServer() as fake:
        held = fake.inject("asample", faults.Hold(), call=21, times=3)
        last = fake.inject("asample", faults.Hold(), call=24)
        with started([str(EXAMPLES / "sample_many.py"), *options], fake.url) as process:
            last.wait(PATIENCE_S)  # the 24th sample is submitted once 20 were written
            process.kill()
            process.wait(PATIENCE_S)
        held.remove()
        last.remove()
        finished = indices(path)
        assert len(finished) == 20
        with path.open("ab") as file:
            file.write(b'{"index": 39, "tok')  # as if killed while writing a line
        done = run([str(EXAMPLES / "sample_many.py"), *options], fake.url)
        assert (done.returncode, done.stderr) == (0, "")
        assert "20 of 40 prompts are finished\n20 sampled, 0 failed\n" in done.stdout
        assert len(fake.journal.requests_to("asample")) == 24 + 20
    assert indices(path)[:20] == finished
    assert sorted(indices(path)) == list(range(40))


def test_a_failed_sample_is_reported_and_drawn_in_the_next_run(tmp_path: Path) -> None:
    options = [*MODEL, "--count", "5", "--out", str(tmp_path / "samples.jsonl")]
    script = [str(EXAMPLES / "sample_many.py"), *options]
    with FakeServer() as fake:
        fake.inject("asample", faults.Status(400), call=2)
        done = run(script, fake.url)
        assert done.returncode == 1
        assert re.fullmatch(r"prompt \d failed: .*injected.*\n", done.stderr)
        assert "4 sampled, 1 failed" in done.stdout
        done = run(script, fake.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(indices(tmp_path / "samples.jsonl")) == list(range(5))


def test_terminated_training_continues_and_repeats_no_step(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = [str(EXAMPLES / "resumable.py"), *MODEL, "--out", str(folder)]
    with started(script, server.url) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("step 9:") for line in lines)
        process.terminate()
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stderr) == (143, "")
    saved = read_run(folder).checkpoints[-1].steps
    assert stdout.count("step ") == saved - 10  # the program has finished its step
    stdout = run_example("resumable.py", *script[1:], server=server)
    first, *steps, parts, path = stdout.splitlines()
    assert first == f"continuing after {saved} steps"
    assert [line.partition(":")[0] for line in steps] == [f"step {n}" for n in range(saved, 20)]
    assert parts == "20 steps in 2 parts"
    assert path == read_run(folder).checkpoints[-1].path


def test_killed_training_continues_on_the_embedded_server(tmp_path: Path) -> None:
    options = [*MODEL, "--out", str(tmp_path / "run")]
    with started([str(EXAMPLES / "resumable.py"), *options]) as process:
        assert process.stdout is not None
        assert any(line.startswith("step 9:") for line in iter(process.stdout.readline, ""))
        process.kill()
        process.wait(PATIENCE_S)
    stdout = run_example("resumable.py", *options)
    first, *steps, parts, _ = stdout.splitlines()
    saved = int(re.fullmatch(r"continuing after (\d+) steps", first)[1])  # type: ignore[index]
    assert saved in (5, 10)  # the step saved and acknowledged before the end
    assert [line.partition(":")[0] for line in steps] == [f"step {n}" for n in range(saved, 20)]
    assert parts == "20 steps in 2 parts"
    assert [step.index for step in read_run(tmp_path / "run").steps] == list(range(20))
