"""Cells of the fault matrix: every operation and fault once, and proof that a bad cell is found."""

from __future__ import annotations

import functools
import itertools
import logging
from typing import Any, Iterator, List, Tuple

import pytest

from fault_matrix import cells
from fault_matrix.cells import Baseline, Cell, Target, baseline, cells_of, run_cell
from fault_matrix.fault_cases import CASES, FaultCase
from fault_matrix.operations import OPERATIONS
from tinkex import errors
from tinkex.testing import faults

POLL = "POST /api/v1/retrieve_future"
#: Operations without requests whose results are polled for.
UNPOLLED = {"construct", "construct, with tokens", "lists", "download", "delete", "close"}


@functools.cache
def baseline_of(operation: str) -> Baseline:
    return baseline(operation)


def some() -> Iterator[Tuple[str, str]]:
    """Yield each fault with the next operation, except faults that clients retry for seconds."""
    names = itertools.cycle(OPERATIONS)
    for case in CASES.values():
        name = next(names)
        while case.route == POLL and name in UNPOLLED:
            name = next(names)
        if case.times is not None or case.route is not None:
            yield name, case.name


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep log messages about the faults out of the report."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("operation", "fault"), list(some()))
def test_a_cell_is_good(operation: str, fault: str) -> None:
    expected = baseline_of(operation)
    found = [cell for cell in cells_of(operation, expected) if cell.fault == fault]
    # If an operation makes several requests, each fault strikes a different one.
    cell = found[len(fault) % len(found)]
    verdict = run_cell(cell, expected)
    assert verdict.wrong == [], cell


def test_the_matrix_has_all_operations_faults_and_requests() -> None:
    assert len(OPERATIONS) >= 32
    found = cells_of("optim_step", baseline_of("optim_step"))
    assert {cell.fault for cell in found} == set(CASES)
    assert {cell.target.route for cell in found} >= {"POST /api/v1/optim_step", POLL}


# A matrix that finds nothing wrong must be able to find faults


def wrong_with(monkeypatch: pytest.MonkeyPatch, case: FaultCase) -> List[str]:
    monkeypatch.setitem(CASES, case.name, case)
    cell = Cell("optim_step", Target("POST /api/v1/optim_step", 1), case.name)
    return run_cell(cell, baseline_of("optim_step")).wrong


def test_a_wrong_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (wrong,) = wrong_with(monkeypatch, FaultCase("401", faults.Status(401)))
    assert "wrong error: AuthenticationError" in wrong


def test_repeated_work_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(exchange: Any) -> Any:
        (run_id,) = {exchange.request.json()["model_id"]}
        exchange.server.journal.add_executed(run_id, "optim_step")
        return exchange.work()

    (wrong,) = wrong_with(monkeypatch, FaultCase("twice", twice))
    assert wrong == "executed more than once: {'optim_step': 1}"


def test_a_hanging_operation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "MOST_S", 0.2)
    wrong = wrong_with(
        monkeypatch, FaultCase("slow", faults.Latency(0.5), errors=(errors.TinkexError,))
    )
    assert wrong[0] == "still running after 0.2 s"
