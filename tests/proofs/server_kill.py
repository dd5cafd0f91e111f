"""Kill the embedded server while it saves and deletes; no checkpoint may be lost or half-written.

``python tests/proofs/server_kill.py --kills 100`` prints what was found, and exits with 1 if an
acknowledged checkpoint is missing, a listed one does not load, or a stray file is left.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

import tinkex
from tinkex import AdamParams, Datum, ModelInput, ServiceClient
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine

DATA = [Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})]
ADAM = AdamParams(learning_rate=0.01)
#: The client keeps this many checkpoints; for each further one it deletes the oldest.
KEPT = 3
PATIENCE_S = 60.0

spawning = multiprocessing.get_context("forkserver")


def serve(folder: str, ready: Connection) -> None:
    """Serve the data in *folder* until killed."""
    with LocalServer(DeterministicEngine(), data_dir=Path(folder)) as server:
        ready.send(server.url)
        time.sleep(10 * PATIENCE_S)


def churn(url: str, done: Connection) -> None:
    """Train, save and delete until killed; report what the server acknowledges."""
    with ServiceClient(base_url=url) as service:
        trainer = service.create_lora_training_client("deterministic", rank=4)
        rest = service.create_rest_client()
        paths: List[str] = []
        for steps in range(1, 10**6):
            trainer.train_step(DATA, "cross_entropy", ADAM)
            paths.append(trainer.save_state(f"after-{steps}").result().path)
            done.send(("saved", paths[-1]))
            if len(paths) > KEPT:
                done.send(("deleting", paths[0]))
                rest.delete_checkpoint_from_tinker_path(paths.pop(0)).result()
                done.send(("deleted", ""))


class Proof:
    """Kills servers on *folder*."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._must_exist: Set[str] = set()
        self._may_exist: Set[str] = set()
        self._losses: Dict[int, float] = {}
        self.faults: List[str] = []
        self.loaded = self.in_deletion = 0

    def kill(self, rng: random.Random) -> None:
        """Have a client work for a while, and kill the server meanwhile."""
        server, url = self._start()
        ours, theirs = spawning.Pipe()
        client = spawning.Process(target=churn, args=(url, theirs), daemon=True)
        client.start()
        theirs.close()
        for _ in range(rng.randint(1, 16)):
            if not ours.poll(PATIENCE_S):
                raise RuntimeError("the client does not work")
            self._note(*ours.recv())
        time.sleep(rng.uniform(0, 0.01))
        server.kill()
        server.join()
        client.kill()
        client.join()
        try:
            while ours.poll(0):
                self._note(*ours.recv())
        except EOFError:
            pass
        self.in_deletion += bool(self._may_exist)

    def check(self) -> None:
        """Start a server on the remaining data, and compare these with the acknowledged work."""
        server, url = self._start()
        with ServiceClient(base_url=url) as service:
            rest = service.create_rest_client()
            listed = rest.list_user_checkpoints(limit=1000).result().checkpoints
            paths = {found.tinker_path for found in listed}
            self.faults += [f"lost: {path}" for path in self._must_exist - paths]
            for path in paths:
                loss = self._load(service, path)
                steps = int(path.rpartition("-")[2])
                if loss != self._loss_after(service, steps):
                    self.faults.append(f"{path}: its loss is {loss}")
                self.loaded += 1
            folders = {
                f"tinker://{kind.parent.name.replace('_train_', ':train:')}/{kind.name}/{each.name}"
                for kind in (self._folder / "checkpoints").glob("*/*")
                for each in kind.iterdir()
            }
            self.faults += [f"left behind: {path}" for path in folders - paths]
            for path in paths:
                rest.delete_checkpoint_from_tinker_path(path).result()
        self._must_exist, self._may_exist = set(), set()
        server.kill()
        server.join()

    def _note(self, what: str, path: str) -> None:
        if what == "saved":
            self._must_exist.add(path)
        elif what == "deleting":
            self._must_exist.discard(path)
            self._may_exist.add(path)
        else:
            self._may_exist.clear()

    def _start(self) -> Tuple[Any, str]:
        ours, theirs = spawning.Pipe()
        server = spawning.Process(target=serve, args=(str(self._folder), theirs), daemon=True)
        server.start()
        theirs.close()
        if not ours.poll(PATIENCE_S):
            raise RuntimeError("the server does not start")
        return server, ours.recv()

    def _load(self, service: ServiceClient, path: str) -> Any:
        try:
            trainer = service.create_training_client_from_state_with_optimizer(path)
            return trainer.forward(DATA, "cross_entropy").result().metrics["loss:sum"]
        except tinkex.TinkexError as error:
            return error.message

    def _loss_after(self, service: ServiceClient, steps: int) -> float:
        if steps not in self._losses:
            trainer = service.create_lora_training_client("deterministic", rank=4)
            for _ in range(steps):
                trainer.train_step(DATA, "cross_entropy", ADAM)
            done = trainer.forward(DATA, "cross_entropy").result()
            self._losses[steps] = done.metrics["loss:sum"]
        return self._losses[steps]


def main() -> int:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        proof = Proof(Path(folder))
        for _ in range(options.kills):
            proof.kill(rng)
            proof.check()
    for fault in proof.faults:
        print(fault)
    print(
        f"{options.kills} kills, {proof.in_deletion} of them in a deletion; {proof.loaded} "
        f"checkpoints listed and loaded, {len(proof.faults)} faults"
    )
    return bool(proof.faults)


if __name__ == "__main__":
    spawning.set_forkserver_preload(["tinkex.local.server", "tinkex.clients.service", "numpy"])
    sys.exit(main())
