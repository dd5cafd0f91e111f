"""A few kills by tests/proofs/sigkill.py, on the deterministic engine."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from proofs.sigkill import prove


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("loop", ["pipelined", "one_by_one"])
def test_a_killed_script_arrives_at_the_same_weights(tmp_path: Path, loop: str) -> None:
    outcome = prove("deterministic", loop, steps=12, kills=2, seed=1, folder=tmp_path)
    assert outcome.differences == []
    assert outcome.kills == 2
