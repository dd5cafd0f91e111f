"""Kill a training script at random moments; it must arrive at the same weights, bit for bit.

``python tests/proofs/sigkill.py --kills 100`` prints what was found, and exits with 1 if a run
differs from the uninterrupted one.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Counter, Dict, List

from tinkex import read_run
from tinkex.errors import RunFolderError
from tinkex.local import LocalServer, load_engine
from tinkex.types import ParsedCheckpointTinkerPath

TRAINER = Path(__file__).with_name("trainer.py")
JOURNAL = "journal.jsonl"
#: The script gets this long for a step, or to finish, in seconds.
PATIENCE_S = 300.0


@dataclasses.dataclass
class Outcome:
    """The findings of the proof.

    Attributes:
        kills, runs: how many there were; each run is killed until it finishes.
        killed_in: the kind of line that the killed process had written last.
        repeated: steps that were repeated after a checkpoint was loaded.
        torn: journals whose last line was torn.
        differences: between a run and the uninterrupted one; empty if all is well.
    """

    kills: int = 0
    runs: int = 0
    killed_in: Counter[str] = dataclasses.field(default_factory=collections.Counter)
    repeated: int = 0
    torn: int = 0
    differences: List[str] = dataclasses.field(default_factory=list)


class Proof:
    """Runs the script on *server*, whose data is in *data_dir*, with run folders in *folder*."""

    def __init__(
        self, server: LocalServer, data_dir: Path, folder: Path, model: str, loop: str, steps: int
    ) -> None:
        self._server = server
        self._data_dir = data_dir
        self._folder = folder
        self._model = model
        self._loop = loop
        self._steps = steps

    def run(self, kills: int, rng: random.Random) -> Outcome:
        """Kill *kills* times; start another run whenever one finishes before that."""
        outcome = Outcome()
        uninterrupted = self._folder / f"{self._loop}-whole"
        began = time.monotonic()
        self._finish(self._start(uninterrupted))
        whole_s = time.monotonic() - began
        expected = self._result(uninterrupted)
        while outcome.kills < kills:
            folder = self._folder / f"{self._loop}-{outcome.runs}"
            while outcome.kills < kills and self._kill_once(folder, rng, whole_s):
                outcome.kills += 1
                self._look_at(folder, outcome)
            self._finish(self._start(folder))
            outcome.runs += 1
            outcome.repeated += self._repeated(folder)
            found = self._result(folder)
            outcome.differences += [
                f"{folder.name}: {name}" for name in expected if found[name] != expected[name]
            ]
        return outcome

    def _start(self, folder: Path) -> subprocess.Popen[str]:
        steps = str(self._steps)
        arguments = [self._server.url, str(folder), self._loop, self._model, steps]
        return subprocess.Popen(
            [sys.executable, str(TRAINER), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _kill_once(self, folder: Path, rng: random.Random, whole_s: float) -> bool:
        """Start the script and kill it at a random moment; return False if it ended before."""
        before = self._lines(folder)
        process = self._start(folder)
        if rng.random() < 0.25:  # at any time, often during the start
            moment = time.monotonic() + rng.uniform(0, min(3.0, whole_s))
            after_lines = 10**9
        else:  # a random time after it has written this many lines
            after_lines = before + rng.randint(1, 12)
            moment = time.monotonic() + PATIENCE_S
        while time.monotonic() < moment and process.poll() is None:
            if self._lines(folder) >= after_lines:
                time.sleep(rng.uniform(0, 0.05))
                break
            time.sleep(0.001)
        ended = process.poll() is not None
        process.kill()
        _, errors = process.communicate()
        if ended and process.returncode != 0:
            raise RuntimeError(f"the script failed: {errors}")
        return not ended

    def _finish(self, process: subprocess.Popen[str]) -> None:
        _, errors = process.communicate(timeout=PATIENCE_S)
        if process.returncode != 0:
            raise RuntimeError(f"the script failed: {errors}")

    def _look_at(self, folder: Path, outcome: Outcome) -> None:
        """Record what a killed process has left, which must be readable."""
        journal = folder / JOURNAL
        content = journal.read_bytes() if journal.exists() else b""
        outcome.torn += not content.endswith(b"\n") and bool(content)
        lines = content.splitlines() if content.endswith(b"\n") else content.splitlines()[:-1]
        outcome.killed_in[json.loads(lines[-1])["kind"] if lines else "nothing"] += 1
        try:
            read_run(folder)
        except RunFolderError as error:
            if journal.exists():
                outcome.differences.append(f"{folder.name}: {error}")

    def _repeated(self, folder: Path) -> int:
        lines = [json.loads(line) for line in (folder / JOURNAL).read_bytes().splitlines()]
        return sum(line["kind"] == "step" for line in lines) - self._steps

    def _lines(self, folder: Path) -> int:
        journal = folder / JOURNAL
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    def _result(self, folder: Path) -> Dict[str, Any]:
        """Return all that must be equal: the files of the last checkpoint, and the journal."""
        record = read_run(folder)
        last = record.checkpoints[-1]
        if [step.index for step in record.steps] != list(range(self._steps)):
            raise RuntimeError(f"{folder} has {len(record.steps)} steps, not each one once")
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(last.path)
        run_folder = parsed.training_run_id.replace(":", "_")
        files = self._data_dir / "checkpoints" / run_folder / parsed.checkpoint_id
        result: Dict[str, Any] = {file.name: file.read_bytes() for file in files.iterdir()}
        if not result:
            raise RuntimeError(f"{files} is empty")
        result["metrics"] = [step.metrics for step in record.steps]
        result["place"] = (last.steps, last.loop, last.batch)
        result["state"] = last.state
        return result


def prove(model: str, loop: str, steps: int, kills: int, seed: int, folder: Path) -> Outcome:
    """Serve *model* from this process, and kill scripts that train it with *loop*."""
    data_dir = folder / "server"
    with LocalServer(load_engine(model, "cpu"), data_dir=data_dir) as server:
        proof = Proof(server, data_dir, folder, model, loop, steps)
        return proof.run(kills, random.Random(seed))


def main() -> int:
    """Print a line for each kind of loop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="in total")
    parser.add_argument("--steps", type=int, default=120, help="of each run")
    parser.add_argument("--model", default="tiny-random", help="tiny-random or deterministic")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    loops = ["pipelined", "one_by_one"]
    failed = False
    for index, loop in enumerate(loops):
        kills = options.kills // 2 + (options.kills % 2 if index == 0 else 0)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcome = prove(
                options.model, loop, options.steps, kills, options.seed + index, Path(folder)
            )
        failed = failed or bool(outcome.differences)
        print(
            f"{loop}, {options.model}: {outcome.kills} kills in {outcome.runs} runs of "
            f"{options.steps} steps, {outcome.repeated} steps done again, {outcome.torn} torn "
            f"lines, {time.monotonic() - began:.0f} s; last line written: "
            f"{dict(outcome.killed_in)}"
        )
        for difference in outcome.differences:
            print(f"  DIFFERS: {difference}")
    print("a run differs" if failed else "all runs equal the uninterrupted one, bit for bit")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
