"""The examples of streams and of run folders, as processes, against the deterministic engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.programs import PATIENCE_S, REPOSITORY, Server, run, started

from tinkex import read_run

EXAMPLES = REPOSITORY / "examples"


def test_sample_many(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKEX_EXAMPLE_MODEL", server.model)
    done = run([str(EXAMPLES / "sample_many.py")], server.url)
    assert done.stderr == ""
    assert done.returncode == 0
    numbers = re.findall(r"^prompt (\d+): \[", done.stdout, re.M)
    assert sorted(map(int, numbers)) == list(range(50))
    assert "150 tokens prefilled, " in done.stdout
    assert re.search(r"queue: p50 [\d.]+ ms", done.stdout)


def test_pipeline(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKEX_EXAMPLE_MODEL", server.model)
    done = run([str(EXAMPLES / "pipeline.py")], server.url)
    assert done.stderr == ""
    assert done.returncode == 0
    losses = [float(loss) for loss in re.findall(r"step \d: loss ([\d.]+)", done.stdout)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert "512 tokens trained" in done.stdout


def test_resumable(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINKEX_EXAMPLE_MODEL", server.model)
    script = [str(EXAMPLES / "resumable.py"), str(tmp_path / "run")]
    with started(script, server.url) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("step 9:") for line in lines)
        process.terminate()
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stderr) == (143, "")
    saved = read_run(tmp_path / "run").checkpoints[-1].steps
    assert stdout.count("step ") == saved - 10  # it has finished its step
    done = run(script, server.url)
    assert (done.returncode, done.stderr) == (0, "")
    first, *steps, parts, path = done.stdout.splitlines()
    assert first == f"continuing after {saved} steps"
    assert [line.partition(":")[0] for line in steps] == [f"step {n}" for n in range(saved, 20)]
    assert parts == "20 steps in 2 parts"
    assert path == read_run(tmp_path / "run").checkpoints[-1].path
