"""Replays the same work sequentially and without faults: the results must be equal.

The executed work is taken from the log of the first server, which `checks` has compared with the
clients' knowledge.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from proofs.stateful.calls import Call
from proofs.stateful.witness import Key, WitnessServer
from proofs.stateful.world import MODEL, World, adam, datum, sample_of

from tinkex import ServiceClient

Files = Dict[str, bytes]


def differences(world: World) -> Iterator[str]:
    """Yield the differences in results and in files of checkpoints, including the last weights."""
    with WitnessServer(settings=world.server_settings) as server:
        with ServiceClient(base_url=server.url) as service:
            replay = Replay(service)
            for owner, key in world.server.log.entries:
                replay.do(owner, key)
            for call in world.calls:
                yield from replay.compare_result(call, world.server.log.snapshots)
            rest = world.scope.service.create_rest_client()
            for name, path in world.paths("save").items():
                if not replay.has(name):
                    yield f"{path} was acknowledged, and never made"
                elif _files(rest, path) != _files(replay.rest, replay.path(name)):
                    yield f"{path} differs from the checkpoint made without faults"


class Replay:
    """Repeats the entries of a log; the requests of a run are executed in the order sent."""

    def __init__(self, service: ServiceClient) -> None:
        self._service = service
        self.rest = service.create_rest_client()
        self._runs: Dict[str, Any] = {}
        self._futures: Dict[Key, Any] = {}
        self._checkpoints: Dict[str, Any] = {}
        self._samplers: Dict[Optional[str], Any] = {}

    def do(self, owner: str, key: Key) -> None:
        """Repeat one entry.  It waits only for loads, which may load another run's checkpoint."""
        what, details = key[0], key[1:]
        if what == "create":
            self._runs[owner] = self._service.create_lora_training_client(MODEL, rank=4, seed=0)
        elif what != "sample":
            self._futures[(owner, *key)] = getattr(self, f"_{what}")(self._runs[owner], *details)

    def path(self, name: str) -> str:
        """Return the path of the checkpoint *name*."""
        path: str = self._checkpoints[name].result().path
        return path

    def has(self, name: str) -> bool:
        return name in self._checkpoints

    def _forward(self, run: Any, *labels: int) -> Any:
        return run.forward([datum(one) for one in labels], "cross_entropy")

    def _forward_backward(self, run: Any, *labels: int) -> Any:
        return run.forward_backward([datum(one) for one in labels], "cross_entropy")

    def _optim_step(self, run: Any, label: int) -> Any:
        return run.optim_step(adam(label))

    def _save(self, run: Any, name: str) -> Any:
        self._checkpoints[name] = saved = run.save_state(name)
        return saved

    def _export(self, run: Any, name: str) -> Any:
        self._checkpoints[name] = saved = run.save_weights_for_sampler(name)
        return saved

    def _snapshot(self, run: Any, folder: str) -> Any:
        self._samplers[folder] = made = run.save_weights_and_get_sampling_client_future()
        return made

    def _load(self, run: Any, name: str, optimizer: bool) -> Any:
        load = run.load_state_with_optimizer if optimizer else run.load_state
        loaded = load(self.path(name))
        loaded.result()
        return loaded

    def compare_result(self, call: Call, snapshots: Dict[str, str]) -> Iterator[str]:
        """Compare the result of *call* with that of the replay."""
        if not call.acknowledged:
            return
        if call.kind == "sample":
            found = [list(one.tokens) for one in call.outcome.value.sequences]
            wanted = self._sample(snapshots.get(call.source, call.source), call.keys[0][1])
        elif call.kind in ("forward", "forward_backward", "optim_step"):
            # The weights are the same for all parts of a batch.
            done = [self._futures[(call.owner, *key)].result() for key in call.keys]
            found = [_metric(call.outcome.value, "weights:max")]
            wanted = [max(_metric(one, "weights:max") for one in done)]
        else:
            return
        if found != wanted:
            yield f"{call} has the result {found}; without faults it is {wanted}"

    def _sample(self, source: Optional[str], label: int) -> List[List[int]]:
        if source not in self._samplers:
            path = None if source is None else self.path(source)
            base = MODEL if source is None else None
            make = self._service.create_sampling_client_future
            self._samplers[source] = make(model_path=path, base_model=base)
        response = self._samplers[source].result().sample(*sample_of(label)).result()
        return [list(one.tokens) for one in response.sequences]


def _metric(result: Any, name: str) -> float:
    return result.metrics[name]


def _files(rest: Any, path: str) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        target = rest.download_checkpoint(path, Path(folder) / "files")
        return {file.name: file.read_bytes() for file in target.rglob("*") if file.is_file()}
