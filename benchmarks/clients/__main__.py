"""What tinkex costs, compared with the official SDK and a bare loop of http.client.

    python benchmarks/clients                # every row; about four minutes on two quiet cores
    python benchmarks/clients burst steps    # some of them

Each client runs in its own process against the same canned server (server.py); they take turns, and
a row is the ratio of their medians.  The official SDK is installed as published, into a virtual
environment of its own (kept in the temporary folder), unless ``--official-python`` names a Python
that has it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

OFFICIAL = "tinker==0.38.0"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

Facts = Dict[str, float]


class Bench:
    """Runs the clients, and prints what they cost."""

    def __init__(self, official_python: str, repeat: int) -> None:
        self._python = {"tinkex": sys.executable, "http": sys.executable, "tinker": official_python}
        self._repeat = repeat
        self.missed: List[str] = []

    def run(
        self,
        clients: List[str],
        scenario: str,
        count: int,
        hold_s: float = 0.0,
        spread_s: float = 0.0,
        **flags: Any,
    ) -> Dict[str, Facts]:
        """Return the medians of each client's facts over several runs, taken in turns."""
        facts: Dict[str, List[Facts]] = {client: [] for client in clients}
        for _ in range(self._repeat):
            for client in clients:
                with canned_server(hold_s, spread_s, flags) as url:
                    facts[client].append(self._once(client, scenario, url, count))
        return {client: medians(runs) for client, runs in facts.items()}

    def _once(self, client: str, scenario: str, url: str, count: int) -> Facts:
        command = [self._python[client], str(HERE / "client.py"), client, scenario, url, str(count)]
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("TINKER_", "PYTHON"))
        }
        environment["TINKER_TELEMETRY"] = "0"
        if client == "tinkex":
            environment["PYTHONPATH"] = str(ROOT)
        ended = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, timeout=600, check=True
        )
        facts: Facts = json.loads(ended.stdout)
        return facts

    def row(self, what: str, measured: float, limit: float, unit: str = "") -> None:
        """Print one row: *measured* should be at most *limit*."""
        verdict = "ok" if measured <= limit else "MISSED"
        print(f"{what:66} {measured:9.3g}{unit:4} {limit:9.3g}{unit:4} {verdict}", flush=True)
        if measured > limit:
            self.missed.append(what)


@contextlib.contextmanager
def canned_server(hold_s: float, spread_s: float, flags: Dict[str, Any]) -> Iterator[str]:
    """Run server.py in a separate process; yield its URL."""
    command = [sys.executable, str(HERE / "server.py"), "--hold", str(hold_s)]
    command += ["--spread", str(spread_s), "--flags", json.dumps(flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


def medians(runs: List[Facts]) -> Facts:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


# ---- The rows ----


def burst(bench: Bench) -> None:
    count = 2000
    cost = bench.run(["http", "tinkex", "tinker"], "burst", count, hold_s=0.3)
    ours, theirs, bare = cost["tinkex"], cost["tinker"], cost["http"]
    for client, facts in cost.items():
        cpu_ms = 1e3 * facts["cpu_s"] / count
        print(
            f"  {client:7} {cpu_ms:.3f} ms CPU per sample, {facts['wall_s']:.2f} s, "
            f"peak {facts['peak_mib']:.0f} MiB"
        )
    bench.row(
        "2000 samples at once: CPU, x of the official SDK", ours["cpu_s"] / theirs["cpu_s"], 0.25
    )
    bench.row("2000 samples at once: CPU, x of http.client", ours["cpu_s"] / bare["cpu_s"], 2.0)
    bench.row(
        "2000 samples at once: wall time, x of the official SDK",
        ours["wall_s"] / theirs["wall_s"],
        0.3,
    )
    bench.row(
        "2000 samples at once: peak RSS, x of the official SDK",
        ours["peak_mib"] / theirs["peak_mib"],
        0.45,
    )


def sequential(bench: Bench) -> None:
    cost = bench.run(["http", "tinkex", "tinker"], "sequential", 500)
    ours, theirs = cost["tinkex"], cost["tinker"]
    for client, facts in cost.items():
        print(
            f"  {client:7} {2 * facts['cpu_s']:.3f} ms CPU, {2 * facts['wall_s']:.3f} ms per sample"
        )
    bench.row(
        "one sample after another: CPU, x of the official SDK",
        ours["cpu_s"] / theirs["cpu_s"],
        0.45,
    )
    bench.row(
        "one sample after another: wall time, x of the official SDK",
        ours["wall_s"] / theirs["wall_s"],
        0.45,
    )


def steps(bench: Bench) -> None:
    cost = bench.run(["tinkex", "tinker"], "steps", 40)
    for client, facts in cost.items():
        print(
            f"  {client:7} {25 * facts['cpu_s']:.2f} ms CPU per step, {25 * facts['wall_s']:.2f} ms"
        )
    ratio = cost["tinkex"]["cpu_s"] / cost["tinker"]["cpu_s"]
    bench.row("pipelined training step, 64 x 1024 tokens: CPU, x of the official SDK", ratio, 0.4)


def million(bench: Bench) -> None:
    count = 1000
    cost = bench.run(["tinkex", "tinker"], "million", count)
    for client, facts in cost.items():
        print(
            f"  {client:7} {1e3 * facts['cpu_s']:.1f} ms CPU per batch, "
            f"{facts['extra_mib']:.1f} MiB extra, then {facts['later_extra_mib']:.1f}"
        )
    payload_mib = count * 1024 * (4 + 8 + 4) / 2**20
    ratio = cost["tinkex"]["cpu_s"] / cost["tinker"]["cpu_s"]
    bench.row("1 M-token batch: CPU, x of the official SDK", ratio, 0.4)
    extra = cost["tinkex"]["extra_mib"] / payload_mib
    bench.row("1 M-token batch: peak extra RSS, x of the payload", extra, 1.5)


def imports(bench: Bench) -> None:
    cost = bench.run(["tinkex", "tinker"], "imports", 1)
    for client, facts in cost.items():
        print(
            f"  {client:7} {facts['import_ms']:.0f} ms, with ServiceClient "
            f"{facts['all_ms']:.0f} ms; {facts['peak_mib']:.1f} MiB"
        )
    ours, theirs = cost["tinkex"], cost["tinker"]
    bench.row("import: time, x of the official SDK", ours["import_ms"] / theirs["import_ms"], 0.35)
    bench.row(
        "import with ServiceClient: time, x of the official SDK",
        ours["all_ms"] / theirs["all_ms"],
        0.35,
    )
    bench.row("import with ServiceClient: RSS", ours["peak_mib"], 45, "MiB")


def batch_poller(bench: Bench) -> None:
    # All samples are in flight before the first is done; then 500 a second finish, since real ones
    # have different lengths.
    facts = bench.run(
        ["tinkex"], "latency", 10_000, hold_s=8.0, spread_s=20.0, sample_use_retrieve_futures=True
    )["tinkex"]
    bench.row("10 000 samples in flight, batch poller: client threads", facts["threads"], 8)
    bench.row("10 000 samples in flight, batch poller: latency p95", facts["p95_ms"], 50, "ms")


def outstanding(bench: Bench) -> None:
    count, hold_s = 10_000, 0.3
    facts = bench.run(["tinkex"], "latency", count, hold_s=hold_s)["tinkex"]
    print(f"  {facts['wall_s']:.1f} s in all; latency p95 {facts['p95_ms']:.0f} ms")
    bench.row("10 000 futures without it: client threads", facts["threads"], 404)
    fair_s = hold_s * count / 400  # when the last is done if 400 workers take them in order
    bench.row(
        "10 000 futures without it: longest wait, x of the fair share",
        facts["longest_s"] / fair_s,
        2.0,
    )


ROWS: List[Callable[[Bench], None]] = [
    burst, sequential, steps, million, imports, batch_poller, outstanding,
]  # fmt: skip


def official_python() -> str:
    """Return a Python that has the official SDK; its environment is made on first use."""
    folder = Path(tempfile.gettempdir()) / f"tinkex-benchmark-{OFFICIAL.replace('==', '-')}"
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {OFFICIAL} ...", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", OFFICIAL, "numpy"], check=True)
    return str(python)


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help=", ".join(row.__name__ for row in ROWS))
    parser.add_argument("--official-python")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args(arguments)
    bench = Bench(options.official_python or official_python(), options.repeat)
    print(f"{'':66} {'measured':>13} {'at most':>13}")
    for row in ROWS:
        if not options.rows or row.__name__ in options.rows:
            row(bench)
    return 1 if bench.missed else 0


if __name__ == "__main__":
    sys.exit(main())
