"""Some requests of tests/proofs/fuzz.py, of each kind, with and without a key."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("zstandard")
pytest.importorskip("resource")

from proofs.fuzz import Findings, run_round


@pytest.mark.parametrize("number", [0, 1])
def test_mutated_requests_are_refused_or_served(number: int) -> None:
    found = run_round(seed=0, number=number, bodies=300, custom_losses=False)
    assert [str(fault) for fault in found.faults] == []
    assert found.bodies == 300
    kinds = {kind for kind, _ in found.statuses}
    assert kinds == {
        "valid", "values", "bytes", "text", "compressed", "protobuf", "headers", "stranger", "wire"
    }  # fmt: skip


def test_every_route_gets_a_valid_request() -> None:
    found = Findings()
    for number in (2, 3):
        found.add(run_round(seed=0, number=number, bodies=200, custom_losses=False))
    assert found.never_served() == []


def test_a_failing_server_is_detected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fuzzer detects a 500, an error in the log, a failed result, and an admitted stranger."""
    from tinkex.local.engines.deterministic import DeterministicEngine
    from tinkex.local.http.admission import Admission
    from tinkex.local.routes.service import ServiceRoutes

    def fails(*args: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(ServiceRoutes.health, "__code__", fails.__code__)
    monkeypatch.setattr(DeterministicEngine, "optim_step", fails)
    monkeypatch.setattr(Admission, "check", lambda self, head: None)
    found = run_round(seed=0, number=1, bodies=200, custom_losses=False)
    seen = "\n".join(fault.what for fault in found.faults)
    for what in ("500: ", "RuntimeError", "failed: ", "for what must be refused"):
        assert what in seen
