"""Put a load on client and embedded server; neither may grow with the work done.

``python tests/proofs/load.py`` opens 200 sessions, trains 20 000 steps in 50 runs at a time, keeps
5000 samples in flight, saves and lists 10 000 checkpoints, and creates 1000 samplers; with
``--scale 0.1``, a tenth of that.  The server (deterministic engine, default settings) runs in its
own process; its second port offers batch polling.  For both processes it prints memory, file
descriptors, threads and the size of the database, how much each unit of work has added to them, and
the time per request before and after.  It exits with 1 if a value exceeds its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from tinkex import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient
from tinkex.local import LocalServer
from tinkex.local.app import create_app
from tinkex.local.backend import Backend
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.engines.engine import Engine, Finished
from tinkex.local.http.admission import Admission
from tinkex.local.settings import ClientFlags, ServerSettings
from tinkex.local.state.futures import FutureTable
from tinkex.local.state.store import Store
from tinkex.types import SampleRequest

DATA = [Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})]
ADAM = AdamParams(learning_rate=0.01)
PROMPT = ModelInput.from_ints([1, 2, 3])
PARAMS = SamplingParams(max_tokens=4, seed=1)
PATIENCE_S = 120.0
#: Measurements per kind of work; slopes are taken over the second half, when caches are full.
POINTS = 10
#: Timed requests of each kind, before and after.
PROBES = 100
PAGE = 100

spawning = multiprocessing.get_context("spawn")


# The server


class GatedEngine(DeterministicEngine):
    """Draws no samples while the gate is closed, so that they stay in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def sample(
        self, sampler_id: str, requests: Sequence[SampleRequest], dropped: Container[int] = ()
    ) -> Iterator[List[Finished]]:
        """Run *requests* as one batch, once the gate is open."""
        for finished in super().sample(sampler_id, requests, dropped):
            self.gate.wait(PATIENCE_S)
            yield finished


class LoadedServer(LocalServer):
    """Keeps *kept* results of requests, and the ids of as many dropped ones."""

    kept = 20_000

    def _assemble(self, engine: Engine, store: Store) -> Tuple[Backend, Any, Admission]:
        admission = Admission(self.settings)
        # Independent of the duration, because results expiring midway would look like growth.
        futures = FutureTable(
            max_finished=self.kept, max_gone=self.kept, keep_fetched_s=1e9, keep_unfetched_s=1e9
        )
        backend = Backend(engine, store, self.settings, futures=futures)
        return backend, create_app(backend, self.settings, admission), admission


def serve(folder: str, scale: float, commands: Connection) -> None:
    """Serve on two ports until the command to end; see `Server` for the commands."""
    LoadedServer.kept = round(20_000 * scale)  # so that caches fill up at the same point
    # A busy machine may suspend a process for longer than the default lifetime of a session.
    single = ServerSettings(session_ttl_s=600)
    batched = dataclasses.replace(single, flags=ClientFlags(sample_use_retrieve_futures=True))
    with contextlib.ExitStack() as opened:
        engines = [GatedEngine(), GatedEngine()]
        servers = [
            opened.enter_context(LoadedServer(engine, data_dir=Path(folder, str(n)), settings=s))
            for n, (engine, s) in enumerate(zip(engines, (single, batched)))
        ]
        commands.send([server.url for server in servers])
        while True:
            command = commands.recv()
            if command == "usage":
                commands.send(Usage.now(folder))
            elif command == "pending":
                commands.send([len(server._backend.futures._pending) for server in servers])
            elif command == "drop":
                for server in servers:
                    server._backend.futures.sweep(1e12)
            elif command in ("hold", "release"):
                for engine in engines:
                    getattr(engine.gate, "clear" if command == "hold" else "set")()
            else:
                return


class Server:
    """The server process."""

    def __init__(self, folder: str, scale: float) -> None:
        self._commands, theirs = spawning.Pipe()
        self._process = spawning.Process(target=serve, args=(folder, scale, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.url, self.batch_url = self._receive()

    def usage(self) -> Usage:
        """Return the resources that the process uses."""
        self._commands.send("usage")
        return self._receive()

    def pending(self) -> int:
        """Return how many requests have no result yet, on both ports."""
        self._commands.send("pending")
        return sum(self._receive())

    def drop_results(self) -> None:
        """Drop the kept results, as would happen after some minutes."""
        self._commands.send("drop")

    def hold(self) -> None:
        """Close the gate, so that samples stay in flight."""
        self._commands.send("hold")

    def wait_for_pending(self, count: int) -> int:
        """Wait until *count* requests have no result, or no more come; return the number."""
        found, before = self.pending(), -1
        while before < found < count:
            time.sleep(0.5)
            found, before = self.pending(), found
        return found

    def release(self) -> None:
        """Open the gate, so that the samples are drawn."""
        self._commands.send("release")

    def close(self) -> None:
        """End the process."""
        self._commands.send("end")
        self._process.join(PATIENCE_S)

    def _receive(self) -> Any:
        if not self._commands.poll(PATIENCE_S):
            raise RuntimeError("the server process does not respond")
        return self._commands.recv()


# Measuring


class Usage(NamedTuple):
    """The resources of a process; *database* is the size of all databases below a folder, in bytes.

    *blocks* is Python's count of allocated blocks, which is exact, unlike memory.
    """

    memory: float
    blocks: float
    descriptors: float
    threads: float
    database: float

    @classmethod
    def now(cls, folder: Optional[str] = None) -> Usage:
        """Measure this process, after giving free memory back to the system."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc only
            ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/statm") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        databases = [] if folder is None else Path(folder).glob("*/tinkex.sqlite3*")
        return cls(
            resident,
            sys.getallocatedblocks(),
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
            sum(file.stat().st_size for file in databases),
        )


class Both(NamedTuple):
    """The two processes."""

    client: Usage
    server: Usage


@dataclasses.dataclass(frozen=True)
class Bound:
    """How much a unit of work may add, in memory blocks and bytes of the database, and why."""

    client: float
    server: float
    database: float
    why: str


#: By kind of work.  A block of memory has some 60 bytes.
BOUNDS = {
    "session": Bound(1500, 50, 1500, "a client has a runtime with a connection of its own"),
    "step": Bound(1, 20, 0, "a run remembers its last 2048 requests, so that they can be repeated"),
    "sample": Bound(1, 1, 0, "the newest results and ids are kept, 20 000 of each"),
    "checkpoint": Bound(1, 1, 1200, "a row of the table, with its indexes, and its audit record"),
    "sampler": Bound(5, 50, 500, "the protocol ends a sampler only with its session"),
}

#: Growth below this over all measurements does not count: it is due to caches, and to the log of
#: the database, which is reused.
NOISE = {"memory": 5e6, "blocks": 20_000, "database": 5e6}

#: A process may use this much more at the end than the units of work explain, for pools, the ids of
#: dropped results, and the arenas of 460 threads, of which malloc returns little.
IDLE = Usage(memory=100e6, blocks=200_000, descriptors=8, threads=8, database=0)

#: A request may take this many times as long at the end as at the beginning ...
SLOWER = 1.5
#: ... or this much longer, in seconds, as timing on a shared machine is imprecise.
SLACK_S = 0.001


def slope(points: Sequence[float], values: Sequence[float]) -> float:
    """Return what a unit of work adds, by least squares over the second half."""
    first = len(points) // 2
    return statistics.linear_regression(points[first:], values[first:]).slope


# The load


class Load:
    """The work, and the measurements during it.

    Args:
        server: the server to put under load.
        scale: 1 is the full load.
    """

    def __init__(self, server: Server, scale: float) -> None:
        self._server = server
        self._scale = scale
        self._sessions: List[ServiceClient] = []
        self._threads = ThreadPoolExecutor(50)
        self._trainers: List[Any] = []
        self._in_flight = 0
        self.faults: List[str] = []

    def run(self) -> None:
        """Do all of it."""
        at_start = self._usage()
        print_usage("at the start", at_start)
        before = self._probe()
        empty = self._usage()
        print_usage("after the first requests", empty)
        self._measure("session", self._count(200), self._open_sessions)
        self._trainers = self._create_trainers(self._count(50))
        self._measure("step", self._count(20_000), self._step)
        at_a_time = self._count(5000)
        for url in (self._server.url, self._server.batch_url):
            self._measure("sample", POINTS * at_a_time, self._sampling(url))
            print(f"    {self._in_flight} of {at_a_time} in flight at the server")
        if self._in_flight < at_a_time:
            self.faults.append(f"only {self._in_flight} samples were in flight")
        self._measure("checkpoint", self._count(10_000), self._save)
        self._measure("sampler", self._count(1000), self._create_samplers)
        for trainer in self._trainers:
            trainer.close()
        for service in self._sessions:
            service.close()
        self._threads.shutdown()
        self._trainers, self._sessions = [], []
        after = self._probe()
        self._compare(before, after)
        self._settle(empty)

    def _count(self, full: int) -> int:
        return max(POINTS, round(full * self._scale))

    def _usage(self) -> Both:
        for service in self._sessions:
            service.metrics()  # sums up the counters
        return Both(Usage.now(), self._server.usage())

    def _measure(self, kind: str, units: int, work: Callable[[int], None]) -> None:
        """Do *units* of work in as many parts as there are points; compare what each has added."""
        began = time.monotonic()
        done, points, usages = 0, [], []
        for part in range(1, POINTS + 1):
            count = units * part // POINTS - done
            work(count)
            done += count
            points.append(done)
            usages.append(self._usage())
        took = time.monotonic() - began
        print(f"{units} {kind}s in {took:.0f} s, {1000 * took / units:.2f} ms each")
        print_usage("", usages[-1])
        bound = BOUNDS[kind]
        for side, name, most in (
            ("client", "memory", None),
            ("client", "blocks", bound.client),
            ("server", "memory", None),
            ("server", "blocks", bound.server),
            ("server", "database", bound.database),
        ):
            values = [getattr(getattr(usage, side), name) for usage in usages]
            added = slope(points, values)
            unit = "blocks" if name == "blocks" else "bytes"
            limit = "" if most is None else f" (at most {most:g})"
            print(f"    {side} {name}: {added:+.1f} {unit} for each {kind}{limit}")
            if most is not None and added > most and values[-1] - values[POINTS // 2] > NOISE[name]:
                self.faults.append(f"{side} {name}: {added:+.1f} for each {kind}: {bound.why}")

    def _open_sessions(self, count: int) -> None:
        opening = [
            self._threads.submit(ServiceClient, base_url=self._server.url) for _ in range(count)
        ]
        self._sessions += [future.result() for future in opening]

    def _create_trainers(self, count: int) -> List[Any]:
        services = self._sessions[:count]
        return list(self._threads.map(create_trainer, services))

    def _step(self, count: int) -> None:
        share = -(-count // len(self._trainers))
        list(self._threads.map(train, self._trainers, [share] * len(self._trainers)))

    def _sampling(self, url: str) -> Callable[[int], None]:
        service = ServiceClient(base_url=url)
        self._sessions.append(service)
        sampler = service.create_sampling_client(base_model="deterministic")

        def sample(count: int) -> None:
            self._server.hold()
            futures = [sampler.sample(PROMPT, 1, PARAMS) for _ in range(count)]
            self._in_flight = self._server.wait_for_pending(count)
            self._server.release()
            for future in futures:
                future.result(timeout=PATIENCE_S)

        return sample

    def _save(self, count: int) -> None:
        share = -(-count // len(self._trainers))
        list(self._threads.map(save, self._trainers, [share] * len(self._trainers)))

    def _create_samplers(self, count: int) -> None:
        for _ in range(count):
            sampler = self._trainers[0].save_weights_and_get_sampling_client()
            sampler.sample(PROMPT, 1, PARAMS).result()

    def _probe(self) -> Dict[str, float]:
        """Time requests of each kind, one at a time, in seconds."""
        with ServiceClient(base_url=self._server.url) as service:
            trainer = create_trainer(service)
            sampler = service.create_sampling_client(base_model="deterministic")
            rest = service.create_rest_client()
            names = iter(range(10**9))
            for _ in range(PAGE):  # so that there is a full page to list from the start
                create_trainer(service).close()
            probes: Dict[str, Callable[[], object]] = {
                "train_step": lambda: trainer.train_step(DATA, "cross_entropy", ADAM),
                "sample": lambda: sampler.sample(PROMPT, 1, PARAMS).result(),
                "save_state": lambda: trainer.save_state(f"probe-{next(names)}").result(),
                "session": lambda: ServiceClient(base_url=self._server.url).close(),
                "list checkpoints": lambda: rest.list_user_checkpoints(PAGE).result(),
                "list runs": lambda: rest.list_training_runs(PAGE).result(),
                "list sessions": lambda: rest.list_sessions(PAGE).result(),
            }
            return {what: typical_s(call) for what, call in probes.items()}

    def _compare(self, before: Dict[str, float], after: Dict[str, float]) -> None:
        print("time per request, before and after")
        for what, was in before.items():
            now = after[what]
            print(f"    {what}: {1000 * was:.2f} ms, {1000 * now:.2f} ms ({now / was:.2f} x)")
            if now > SLOWER * was + SLACK_S:
                self.faults.append(f"{what} takes {now / was:.1f} times as long as at first")

    def _settle(self, empty: Both) -> None:
        """Wait for idle threads to end; then only the database may have grown."""
        self._server.drop_results()
        deadline = time.monotonic() + 45.0
        while True:
            now = self._usage()
            left = [
                f"{side}: {name} {was:.0f}, {found:.0f} at the end"
                for side, before, after in zip(Both._fields, empty, now)
                for name, was, found, most in zip(Usage._fields, before, after, IDLE)
                if name != "database" and found > was + most
            ]
            if not left or time.monotonic() > deadline:
                break
            time.sleep(1.0)
        print_usage("at the end", now)
        self.faults += left


def create_trainer(service: ServiceClient) -> Any:
    """Create a run."""
    return service.create_lora_training_client("deterministic", rank=4)


def train(trainer: Any, steps: int) -> None:
    """Train step by step."""
    for _ in range(steps):
        trainer.train_step(DATA, "cross_entropy", ADAM)


_names = iter(range(10**9))


def save(trainer: Any, count: int) -> None:
    """Save one checkpoint after another."""
    for _ in range(count):
        trainer.save_state(f"load-{next(_names)}").result()


def typical_s(call: Callable[[], object]) -> float:
    """Return a call's time in seconds: the lower quartile, which other processes affect least."""
    times = []
    for _ in range(PROBES):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.quantiles(times, n=4)[0]


def print_usage(label: str, usage: Both) -> None:
    """Print a line for each process."""
    if label:
        print(label)
    for side, found in zip(Both._fields, usage):
        print(
            f"    {side}: {found.memory / 1e6:.1f} MB, {found.blocks / 1e3:.0f} k blocks, "
            f"{found.descriptors:.0f} file descriptors, {found.threads:.0f} threads"
            + (f", database {found.database / 1e6:.2f} MB" if side == "server" else ""),
            flush=True,
        )


def main() -> int:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder, options.scale)
        try:
            load = Load(server, options.scale)
            load.run()
        finally:
            server.close()
    for fault in load.faults:
        print("WRONG:", fault)
    return bool(load.faults)


if __name__ == "__main__":
    sys.exit(main())
