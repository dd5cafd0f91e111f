"""A server, clients, runs, samplers and the threads that use them, with a record of every call."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import CancelledError, Future, TimeoutError as FutureTimeoutError
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from proofs.stateful.calls import MOST_S, Actor, Call, Outcome, tick
from proofs.stateful.storms import GROUPS, Storm, times_of
from proofs.stateful.witness import RATE, SAMPLES, WitnessServer

from tinkex import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TrainingClient
from tinkex.local.settings import ClientFlags, DynamicClientFlags, ServerSettings

MODEL = "deterministic"
#: Datums per request; a larger batch is sent in parts.
CHUNK = 2
ACTORS = 3

#: The non-blocking calls of a run.
KINDS = (
    "forward",
    "forward_backward",
    "split",
    "optim_step",
    "save",
    "save_for_sampler",
    "load",
    "load_with_optimizer",
    "snapshot",
)


@dataclasses.dataclass
class Scope:
    """A session, and the objects created from it.

    Attributes:
        opened_at: on the monotonic clock.
        over: the tick at which the session had certainly ended.
        closing, closed: the ticks at which `close` was called and had returned.
    """

    service: ServiceClient
    opened_at: float
    runs: List[TrainingClient] = dataclasses.field(default_factory=list)
    samplers: List[Tuple[Any, Optional[str]]] = dataclasses.field(default_factory=list)
    over: Optional[int] = None
    closing: Optional[int] = None
    closed: Optional[int] = None


class World:
    """Everything that one example uses.  Its methods record the calls they make.

    Attributes:
        calls: all calls, in order.
        wrong: faults found on the way.
    """

    def __init__(self, *, batch_polls: bool, cancels: bool, heartbeat_s: float) -> None:
        flags = ClientFlags(fwdbwd_max_chunk_len=CHUNK, sample_use_retrieve_futures=batch_polls)
        self.server_settings = ServerSettings(
            flags=flags,
            dynamic_flags=DynamicClientFlags(sample_cancel_enabled=cancels),
            retrieve_hold_s=0.3,
            missing_seq_id_s=0.2,
        )
        self.server = WitnessServer(settings=self.server_settings)
        self.server.start()
        self._heartbeat_s = heartbeat_s
        self.actors = [Actor(f"actor-{i}") for i in range(ACTORS)]
        self._labels = iter(range(1, 30_000))
        self._lock = threading.Lock()  # guards _labels and calls
        self.calls: List[Call] = []
        self.storms: List[Storm] = []
        self.scopes: List[Scope] = []
        self.wrong: List[str] = []
        self._forgotten = 0  # the number of calls made before the server lost its checkpoints

    # Threads

    def do(self, actor: int, task: Callable[[], Any]) -> Any:
        """Have an actor call *task*, and wait for it; a hanging call is a fault."""
        return self.wait_for(self.actors[actor % ACTORS].start(task))

    def wait_for(self, done: Future[Any]) -> Any:
        try:
            return done.result(MOST_S)
        except FutureTimeoutError:
            self.wrong.append(f"a call has not returned within {MOST_S:g} s")
            return None

    def label(self) -> int:
        with self._lock:
            return next(self._labels)

    def note(self, call: Call) -> Call:
        with self._lock:
            self.calls.append(call)
        return call

    # Sessions

    @property
    def scope(self) -> Scope:
        return self.scopes[-1]

    def open(self) -> None:
        """Open another session; it must succeed."""
        opened_at = time.monotonic()
        service = ServiceClient(
            base_url=self.server.url,
            read_timeout_s=1.0,
            poll_timeout_s=1.2,
            startup_timeout_s=60.0,
            max_outage_s=60.0,
            heartbeat_interval_s=self._heartbeat_s,
        )
        self.scopes.append(Scope(service, opened_at))

    def close(self, scope: Scope) -> None:
        scope.closing = scope.closing or tick()
        scope.service.close()
        scope.closed = scope.closed or tick()

    def session_over(self) -> None:
        """Record that all sessions have ended by now."""
        for scope in self.scopes:
            scope.over = scope.over or tick()

    def paths(self, kind: str) -> Dict[str, str]:
        """Return names and paths of the checkpoints known to exist, by "save" or "export"."""
        with self._lock:
            calls = self.calls[self._forgotten :]
        made = [call for call in calls if call.kind == kind and call.succeeded]
        return {call.keys[0][1]: call.future.result().path for call in made}

    def forget(self) -> None:
        """Record that the server has lost its checkpoints."""
        with self._lock:
            self._forgotten = len(self.calls)

    @property
    def was_forgotten(self) -> bool:
        return self._forgotten > 0

    def samplers(self) -> List[Tuple[Scope, Any, Optional[str]]]:
        """Return the existing samplers, each with its `Call.source`."""
        with self._lock:
            calls = list(self.calls)
        snapshots = [call for call in calls if call.kind == "snapshot" and call.succeeded]
        made = [(call.scope, call.future.result()) for call in snapshots]
        return [(scope, *one) for scope in self.scopes for one in scope.samplers] + [
            (scope, sampler, sampler.sampling_session_id) for scope, sampler in made
        ]

    def create_run(self, source: Optional[str] = None, optimizer: bool = False) -> Call:
        """Create a run, from the checkpoint *source* if there is one.  Blocks."""
        scope, service = self.scope, self.scope.service
        call = self.note(Call("create", scope, "", []))
        try:
            if source is None:
                run = service.create_lora_training_client(MODEL, rank=4, seed=0)
            elif optimizer:
                make = service.create_training_client_from_state_with_optimizer
                run = make(self.paths("save")[source])
            else:
                run = service.create_training_client_from_state(self.paths("save")[source])
        except Exception as error:
            call.outcome = Outcome(error=error)
        else:
            call.owner, call.outcome = run.model_id, Outcome()
            call.keys = [("create",)] + ([("load", source, optimizer)] if source else [])
            scope.runs.append(run)
        call.returned = tick()
        return call

    # Work of a run

    def submit(self, kind: str, run: TrainingClient, names: Sequence[str] = ()) -> Optional[Call]:
        """Make one call, without blocking.  *names* are checkpoints, one of which may be loaded."""
        return getattr(self, f"_{kind}")(run, names)

    def _pass(self, kind: str, run: TrainingClient, count: int) -> Call:
        labels = [self.label() for _ in range(count)]
        parts = [labels[i : i + CHUNK] for i in range(0, count, CHUNK)]
        method = run.forward if kind == "forward" else run.forward_backward
        batch = [datum(label) for label in labels]
        return self._ask(
            kind, run, [(kind, *part) for part in parts], method, batch, "cross_entropy"
        )

    def _forward(self, run: TrainingClient, names: Sequence[str]) -> Call:
        return self._pass("forward", run, 1)

    def _forward_backward(self, run: TrainingClient, names: Sequence[str]) -> Call:
        return self._pass("forward_backward", run, 1)

    def _split(self, run: TrainingClient, names: Sequence[str]) -> Call:
        return self._pass("forward_backward", run, CHUNK + 1)

    def _optim_step(self, run: TrainingClient, names: Sequence[str]) -> Call:
        label = self.label()
        return self._ask("optim_step", run, [("optim_step", label)], run.optim_step, adam(label))

    def _save(self, run: TrainingClient, names: Sequence[str]) -> Call:
        name = f"op-{self.label()}"
        return self._ask("save", run, [("save", name)], run.save_state, name)

    def _save_for_sampler(self, run: TrainingClient, names: Sequence[str]) -> Call:
        name = f"op-{self.label()}"
        return self._ask("export", run, [("export", name)], run.save_weights_for_sampler, name)

    def _load(self, run: TrainingClient, names: Sequence[str]) -> Optional[Call]:
        return self._load_of(run, names, run.load_state, False)

    def _load_with_optimizer(self, run: TrainingClient, names: Sequence[str]) -> Optional[Call]:
        return self._load_of(run, names, run.load_state_with_optimizer, True)

    def _load_of(
        self, run: TrainingClient, names: Sequence[str], method: Any, optimizer: bool
    ) -> Optional[Call]:
        if not names:
            return None
        return self._ask(
            "load", run, [("load", names[0], optimizer)], method, self.paths("save")[names[0]]
        )

    def _snapshot(self, run: TrainingClient, names: Sequence[str]) -> Call:
        make = run.save_weights_and_get_sampling_client_future
        return self._ask("snapshot", run, [("snapshot",)], make)

    def _ask(
        self, kind: str, run: TrainingClient, keys: List[Any], method: Any, *args: Any
    ) -> Call:
        def call() -> Call:
            made = Call(kind, self._scope_of(run), run.model_id, keys, again=call)
            return self.note(made).submit(method, *args)

        return call()

    def _scope_of(self, run: TrainingClient) -> Scope:
        return next(scope for scope in self.scopes if run in scope.runs)

    def train_step(self, run: TrainingClient) -> List[Call]:
        """Blocks."""
        passed, stepped = self._step_calls(run)
        batch, params = [datum(passed.keys[0][1])], adam(stepped.keys[0][1])
        try:
            done = run.train_step(batch, "cross_entropy", params)
        except Exception as error:
            passed.outcome = stepped.outcome = Outcome(error=error)
        else:
            passed.outcome, stepped.outcome = Outcome(done.forward_backward), Outcome(done.optim)
        passed.returned = stepped.returned = tick()
        return [passed, stepped]

    def _step_calls(self, run: TrainingClient) -> Tuple[Call, Call]:
        scope, label, rate = self._scope_of(run), self.label(), self.label()
        passed = Call("forward_backward", scope, run.model_id, [("forward_backward", label)])
        stepped = Call("optim_step", scope, run.model_id, [("optim_step", rate)], after=passed)
        return self.note(passed), self.note(stepped)

    def pipeline(
        self, run: TrainingClient, steps: int, depth: int, stop_after: int, end: str
    ) -> List[Call]:
        """Train on *steps* batches, saving after every second one; blocks.

        After *stop_after* steps the iterator is closed or drained, as *end* says.
        """
        calls: List[Call] = []
        pairs: List[Tuple[Call, Call]] = []
        saves: Dict[int, Call] = {}

        def begin(call: Call) -> None:
            call.after = calls[-1] if calls else None
            calls.append(call)

        def batches() -> Iterator[List[Datum]]:
            for _ in range(steps):
                pair = self._step_calls(run)
                pairs.append(pair)
                begin(pair[0])
                begin(pair[1])
                yield [datum(pair[0].keys[0][1])]

        def name_of(index: int) -> Optional[str]:
            if index % 2 == 0:
                return None
            name = f"op-{self.label()}"
            saves[index] = self.note(
                Call("save", self._scope_of(run), run.model_id, [("save", name)])
            )
            begin(saves[index])
            return name

        def take(step: Any) -> None:
            passed, stepped = pairs[step.index]
            passed.outcome, stepped.outcome = Outcome(step.forward_backward), Outcome(step.optim)
            if step.index in saves:
                saves[step.index].future = step.save_state()

        failure: BaseException = CancelledError()
        try:
            with run.pipeline(
                batches(),
                "cross_entropy",
                lambda index: adam(pairs[index][1].keys[0][1]),
                depth=depth,
                save_every=name_of,
            ) as stream:
                for step in stream:
                    take(step)
                    if step.index + 1 == stop_after:
                        for late in stream.drain() if end == "drain" else ():
                            take(late)
                        break
        except Exception as error:
            failure = error
        for call in calls:
            if call.outcome is None and call.future is None:
                call.outcome = Outcome(error=failure)
                call.cancelled = isinstance(failure, CancelledError)
        for call in calls:
            call.returned = tick()
        return calls

    # Samples

    def create_sampler(self, path: Optional[str] = None) -> Call:
        """Create a sampler of the base model, or of *path*.  Blocks."""
        scope = self.scope
        call = self.note(Call("create sampler", scope, "", []))
        try:
            sampler = scope.service.create_sampling_client(
                model_path=path, base_model=None if path else MODEL
            )
        except Exception as error:
            call.outcome = Outcome(error=error)
        else:
            call.outcome = Outcome()
            scope.samplers.append((sampler, path and path.rpartition("/")[2]))
        call.returned = tick()
        return call

    def sample(self, scope: Scope, sampler: Any, source: Optional[str]) -> Call:
        label = self.label()
        call = self.note(Call("sample", scope, SAMPLES, [("sample", label)], source=source))
        return call.submit(sampler.sample, *sample_of(label))

    # Faults

    def inject(self, group: str, name: str, route: str, call: int, times: int) -> None:
        fault, times = GROUPS[group][name], times_of(name, times)
        injection = self.server.inject(route, fault, call=call, times=times)
        self.storms.append(Storm(name, group, injection))

    def calm(self) -> None:
        """End all faults, and release what they hold."""
        for storm in self.storms:
            storm.injection.remove()

    @property
    def ended_at(self) -> float:
        """Return when the last fault that ends sessions struck, on the monotonic clock."""
        ends = [s for s in self.storms if s.group == "ending"]
        return max((r.at for s in ends for r in s.injection.struck), default=0.0)


def datum(label: int) -> Datum:
    return Datum(ModelInput.from_ints([label + 1, 2]), {"target_tokens": [2, 3]})


def adam(label: int) -> AdamParams:
    return AdamParams(learning_rate=label * RATE)


def sample_of(label: int) -> Tuple[ModelInput, int, SamplingParams]:
    """Return the arguments of `sample`."""
    params = SamplingParams(max_tokens=4, stop=[], seed=label)
    return ModelInput.from_ints([label + 1, 5]), 1 + label % 2, params
