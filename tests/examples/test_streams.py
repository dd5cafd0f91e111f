"""The examples of streams, as processes, against the deterministic engine."""

from __future__ import annotations

import re

import pytest
from support.programs import REPOSITORY, Server, run

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
