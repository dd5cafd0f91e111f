"""A server whose weights depend on everything that was done to them, and on its order.

The deterministic engine counts its steps; this one also keeps a digest of their contents, saves it
with each checkpoint, returns it as a metric, and logs its work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from pathlib import Path
from typing import (
    Any,
    Container,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from tinkex.local.engines.engine import Engine, Finished
from tinkex.testing import FakeServer
from tinkex.testing.engine import RecordingEngine
from tinkex.testing.journal import Journal
from tinkex.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig, SampleRequest

_FILE = "witness.json"
#: Optimizer steps carry their label as the learning rate, in multiples of this.
RATE = 1e-6

#: The owner of all samples in the log, because samplers with equal weights share an engine sampler.
SAMPLES = "samples"

#: The kind of work and its labels: of a batch, a step or a sample, or the name of a checkpoint.
Key = Tuple[Any, ...]


class Executed(NamedTuple):
    """One entry of the log."""

    owner: str  # the run, or SAMPLES
    key: Key


class Log:
    """The work of the engine, in order; survives restarts.  Thread-safe.

    Attributes:
        snapshots: the folder with the weights of each sampler made without a checkpoint.
    """

    def __init__(self) -> None:
        self.snapshots: Dict[str, str] = {}  # written by one thread at a time
        self._lock = threading.Lock()  # guards _entries
        self._entries: List[Executed] = []

    def add(self, owner: str, *key: Any) -> None:
        with self._lock:
            self._entries.append(Executed(owner, key))

    @property
    def entries(self) -> List[Executed]:
        with self._lock:
            return list(self._entries)


@dataclasses.dataclass
class _State:
    weights: str = ""
    optimizer: str = ""
    gradient: List[int] = dataclasses.field(default_factory=list)


class WitnessEngine(RecordingEngine):
    """See the module.  A datum's label is its first token minus one; a sample's is that of its
    prompt.

    Metrics: ``labels:sum`` of the batch, ``weights:max`` (as a number below 2**48).
    """

    def __init__(self, log: Log, journal: Journal, models: Sequence[str], **facts: Any) -> None:
        super().__init__(journal, models, **facts)
        self._log = log
        self._states: Dict[str, _State] = {}

    def create(self, model_id: str, lora: LoraConfig) -> None:
        super().create(model_id, lora)
        self._states[model_id] = _State()
        self._log.add(model_id, "create")

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Union[float, str]],
        *,
        forward_only: bool = False,
    ) -> ForwardBackwardOutput:
        output = super().forward_backward(
            model_id, data, loss_fn, loss_fn_config, forward_only=forward_only
        )
        state = self._states[model_id]
        labels = [label_of(datum) for datum in data]
        if not forward_only:
            state.gradient += labels
        self._log.add(model_id, "forward" if forward_only else "forward_backward", *labels)
        output.metrics.update({"labels:sum": float(sum(labels)), "weights:max": _number(state)})
        return output

    def optim_step(self, model_id: str, params: AdamParams) -> Dict[str, float]:
        metrics = super().optim_step(model_id, params)
        state, label = self._states[model_id], round(params.learning_rate / RATE)
        if state.gradient:
            state.optimizer = _digest(state.optimizer, state.gradient, label)
            state.weights = _digest(state.weights, state.optimizer)
            state.gradient = []
        self._log.add(model_id, "optim_step", label)
        return {**metrics, "labels:sum": float(label), "weights:max": _number(state)}

    def save(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        super().save(model_id, folder, with_optimizer=with_optimizer)
        state = self._states[model_id]
        kept = {"weights": state.weights, "optimizer": state.optimizer if with_optimizer else None}
        (folder / _FILE).write_text(json.dumps(kept))
        if folder.name.startswith("."):  # ".NAME.XXXXXXXX.tmp" for a named checkpoint
            name = folder.name.split(".")[1]
            self._log.add(model_id, "save" if with_optimizer else "export", name)
        else:
            self._log.add(model_id, "snapshot", folder.name)

    def load(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        super().load(model_id, folder, with_optimizer=with_optimizer)
        kept = json.loads((folder / _FILE).read_text())
        optimizer = kept["optimizer"] if with_optimizer else ""
        self._states[model_id] = _State(kept["weights"], optimizer)
        self._log.add(model_id, "load", folder.name, with_optimizer)

    def create_sampler(self, sampler_id: str, folder: Optional[Path]) -> None:
        super().create_sampler(sampler_id, folder)
        if folder is not None:
            self._log.snapshots[sampler_id] = folder.name

    def sample(
        self, sampler_id: str, requests: Sequence[SampleRequest], dropped: Container[int] = ()
    ) -> Iterator[List[Finished]]:
        for finished in super().sample(sampler_id, requests, dropped):
            for index, result in finished:
                if not isinstance(result, Exception):
                    label = int(requests[index].prompt.to_ints()[0]) - 1
                    self._log.add(SAMPLES, "sample", label)
            yield finished


class WitnessServer(FakeServer):
    """A FakeServer with that engine; *log* survives its restarts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.log = Log()

    def _make_engine(self, models: Sequence[str], **facts: Any) -> Engine:
        return WitnessEngine(self.log, self.journal, models, **facts)


def label_of(datum: Datum) -> int:
    return int(datum.model_input.to_ints()[0]) - 1


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _number(state: _State) -> float:
    return float(int(state.weights[:12] or "0", 16))
