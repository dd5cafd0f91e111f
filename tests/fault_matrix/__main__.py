"""Runs the matrix in several processes, prints the table, and fails if a cell is bad.

With ``--results FILE`` an interrupted run continues: cells in that file are not run again.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fnmatch
import json
import logging
import multiprocessing
import string
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from fault_matrix.cells import Cell, Target, Verdict, baseline, cells_of, prepare, run_one
from fault_matrix.fault_cases import CASES
from fault_matrix.operations import OPERATIONS


def main() -> int:
    """Run the cells that the command line selects."""
    parser = argparse.ArgumentParser(prog="python -m fault_matrix", description=__doc__)
    parser.add_argument("--operation", default="*", help="name, or pattern, of operations")
    parser.add_argument("--fault", default="*", help="name, or pattern, of faults")
    parser.add_argument("--jobs", type=int, default=6, help="processes (they mostly wait)")
    parser.add_argument("--every", type=int, default=1, help="run every Nth cell only")
    parser.add_argument("--one", action="store_true", help="strike one request of each operation")
    parser.add_argument("--results", type=Path, help="file that keeps what came of the cells")
    parser.add_argument("--log", action="store_true", help="show the client's log")
    arguments = parser.parse_args()
    names = fnmatch.filter(OPERATIONS, arguments.operation)
    level = logging.NOTSET if arguments.log else logging.CRITICAL
    found = read_results(arguments.results)
    how = level, any("custom_loss" in name for name in names)
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, prepare, how) as pool:
        expected = dict(zip(names, pool.map(baseline, names, chunksize=1)))
        cells = [cell for name in names for cell in cells_of(name, expected[name])]
        cells = [c for c in cells if fnmatch.fnmatch(c.fault, arguments.fault)]
        cells = one_each(cells) if arguments.one else cells
        cells = cells[:: arguments.every]
        cells.sort(key=lambda cell: list(CASES).index(cell.fault))
        to_run = [(cell, expected[cell.operation]) for cell in cells if cell not in found]
        for verdict in pool.imap_unordered(run_one, to_run, chunksize=8):
            found[verdict.cell] = verdict
            keep_result(arguments.results, verdict)
            if verdict.wrong:
                print(f"BAD {_name(verdict.cell)} ({verdict.outcome}): {'; '.join(verdict.wrong)}")
                sys.stdout.flush()
    verdicts = [found[cell] for cell in cells]
    print_table(names, verdicts)
    bad = sum(bool(verdict.wrong) for verdict in verdicts)
    slowest = max(verdicts, key=lambda verdict: verdict.seconds)
    print(
        f"{len(verdicts)} cells, {bad} bad, {sum(v.seconds for v in verdicts):.0f} s in all; "
        f"the slowest took {slowest.seconds:.1f} s ({_name(slowest.cell)})"
    )
    return 1 if bad else 0


def one_each(cells: List[Cell]) -> List[Cell]:
    """Return one cell for each operation and fault, varying the request from fault to fault."""
    groups: Dict[Tuple[str, str], List[Cell]] = collections.defaultdict(list)
    for cell in cells:
        groups[cell.operation, cell.fault].append(cell)
    return [group[index % len(group)] for index, group in enumerate(groups.values())]


def read_results(file: Optional[Path]) -> Dict[Cell, Verdict]:
    """Return the verdicts that earlier runs stored in *file*."""
    found: Dict[Cell, Verdict] = {}
    if file is None or not file.exists():
        return found
    for line in file.read_text().splitlines():
        entry: Dict[str, Any] = json.loads(line)
        operation, target, fault = entry.pop("cell")
        cell = Cell(operation, Target(*target), fault)
        found[cell] = Verdict(cell, **entry)
    return found


def keep_result(file: Optional[Path], verdict: Verdict) -> None:
    """Append *verdict* to *file*, if there is one."""
    if file is not None:
        with file.open("a") as lines:
            lines.write(json.dumps(dataclasses.asdict(verdict)) + "\n")


def _name(cell: Cell) -> str:
    return f"{cell.operation} | {cell.target.route} #{cell.target.call} | {cell.fault}"


def print_table(names: List[str], verdicts: List[Verdict]) -> None:
    """Print a line per fault: how each operation ended, over all of its requests."""
    ends: Dict[Tuple[str, str], List[Verdict]] = collections.defaultdict(list)
    for verdict in verdicts:
        ends[verdict.cell.fault, verdict.cell.operation].append(verdict)
    print("\n.  the right result   e  the right error (at one request or more)   X  bad\n")
    letters = dict(zip(names, string.ascii_letters))
    for name, letter in letters.items():
        print(f"{letter}  {name}: {len(requests_of(name, verdicts))} requests")
    print()
    print(" " * 24 + " ".join(letters.values()))
    for fault in CASES:
        marks = [_mark(ends.get((fault, name), [])) for name in names]
        if any(mark != " " for mark in marks):
            print(f"{fault:<24}" + " ".join(marks))
    print()


def requests_of(name: str, verdicts: List[Verdict]) -> List[Target]:
    """Return the requests of an operation that faults have struck."""
    return sorted({v.cell.target for v in verdicts if v.cell.operation == name})


def _mark(verdicts: List[Verdict]) -> str:
    if not verdicts:
        return " "
    if any(verdict.wrong for verdict in verdicts):
        return "X"
    return "." if all(verdict.outcome == "ok" for verdict in verdicts) else "e"


if __name__ == "__main__":
    sys.exit(main())
