"""Runs the matrix in several processes, prints the table, and fails if a cell is bad."""

from __future__ import annotations

import argparse
import collections
import fnmatch
import multiprocessing
import sys
import time
from typing import Dict, List, Tuple

from fault_matrix.cells import Cell, Verdict, cells_of, run_cell
from fault_matrix.fault_cases import CASES
from fault_matrix.operations import OPERATIONS


def main() -> int:
    """Run the cells that the command line selects."""
    parser = argparse.ArgumentParser(prog="python -m fault_matrix", description=__doc__)
    parser.add_argument("--operation", default="*", help="name, or pattern, of operations")
    parser.add_argument("--fault", default="*", help="name, or pattern, of faults")
    parser.add_argument("--jobs", type=int, default=6, help="processes (they mostly wait)")
    parser.add_argument("--every", type=int, default=1, help="run every Nth cell only")
    arguments = parser.parse_args()
    names = fnmatch.filter(OPERATIONS, arguments.operation)
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        by_operation = pool.map(cells_of, names, chunksize=1)
        cells = [c for cells in by_operation for c in cells]
        cells = [c for c in cells if fnmatch.fnmatch(c.fault, arguments.fault)]
        cells = cells[:: arguments.every]
        verdicts: List[Verdict] = []
        for verdict in pool.imap_unordered(run_cell, cells, chunksize=4):
            verdicts.append(verdict)
            if verdict.wrong:
                print(f"BAD {_name(verdict.cell)} ({verdict.outcome}): {'; '.join(verdict.wrong)}")
                sys.stdout.flush()
    print_table(names, verdicts)
    bad = sum(bool(verdict.wrong) for verdict in verdicts)
    slowest = max(verdicts, key=lambda verdict: verdict.seconds)
    print(
        f"{len(verdicts)} cells in {time.monotonic() - began:.0f} s, {bad} bad; "
        f"the slowest took {slowest.seconds:.1f} s ({_name(slowest.cell)})"
    )
    return 1 if bad else 0


def _name(cell: Cell) -> str:
    return f"{cell.operation} | {cell.target.route} #{cell.target.call} | {cell.fault}"


def print_table(names: List[str], verdicts: List[Verdict]) -> None:
    """Print a line for each fault: how each operation ended, over all of its requests."""
    ends: Dict[Tuple[str, str], List[Verdict]] = collections.defaultdict(list)
    for verdict in verdicts:
        ends[verdict.cell.fault, verdict.cell.operation].append(verdict)
    print("\n.  the right result   e  the right error (at one request or more)   X  bad\n")
    for index, name in enumerate(names):
        print(f"{chr(ord('A') + index)}  {name}: {len(baseline_targets(name, verdicts))} requests")
    print()
    print(" " * 24 + " ".join(chr(ord("A") + index) for index in range(len(names))))
    for fault in CASES:
        marks = [_mark(ends.get((fault, name), [])) for name in names]
        if any(mark != " " for mark in marks):
            print(f"{fault:<24}" + " ".join(marks))
    print()


def baseline_targets(name: str, verdicts: List[Verdict]) -> List[object]:
    """Return the requests of an operation that were struck."""
    return sorted({v.cell.target for v in verdicts if v.cell.operation == name})


def _mark(verdicts: List[Verdict]) -> str:
    if not verdicts:
        return " "
    if any(verdict.wrong for verdict in verdicts):
        return "X"
    return "." if all(verdict.outcome == "ok" for verdict in verdicts) else "e"


if __name__ == "__main__":
    sys.exit(main())
