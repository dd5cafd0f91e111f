"""One cell: an operation with a fault at one of its requests, and the judgement of its outcome."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import importlib
import logging
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

from support.leftovers import Leftovers

from fault_matrix.fault_cases import CASES, FaultCase
from fault_matrix.operations import (
    ADAM,
    KEY,
    MODEL,
    OPERATIONS,
    PARAMS,
    PROMPT,
    SETTINGS,
    Operation,
    World,
    datum,
    loss_of,
    sampled,
    stepped,
)
from tinkex import ServiceClient, errors
from tinkex._transport.server_state import forget_servers
from tinkex.testing import faults

#: An operation that takes longer than this counts as hanging.
MOST_S = 60.0
#: Stopped threads may take this long to end.
GRACE_S = 5.0

HEARTBEAT = "session_heartbeat"
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Target(NamedTuple):
    """The request of an operation that a fault strikes."""

    route: str  # "POST /api/v1/optim_step", with * for ids
    call: int  # counts the requests to this route from 1


class Cell(NamedTuple):
    """An operation, its request, and a fault; by name, so that it can be sent to a process."""

    operation: str
    target: Target
    fault: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a cell, which is good if *wrong* is empty."""

    cell: Cell
    outcome: str
    seconds: float
    wrong: List[str]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """An operation without a fault: its value, the executed work, and the requests it makes."""

    value: str
    executed: collections.Counter[str]
    targets: List[Target]


class Outcome(NamedTuple):
    """The value of an operation, or the error that it raised."""

    value: Any = None
    error: Optional[BaseException] = None


@contextlib.contextmanager
def world_of(operation: Operation, **settings: Any) -> Iterator[World]:
    """A server and a client that are ready for *operation*."""
    forget_servers()  # an earlier one may have had the same port
    client_settings = {**SETTINGS, "api_key": KEY, **settings}
    with tempfile.TemporaryDirectory() as folder, operation.server() as server:
        service = ServiceClient(base_url=server.url, **client_settings)
        try:
            world = World(server, Path(folder), client_settings, service)
            operation.prepare(world)
            yield world
        finally:
            service.close()


def baseline(name: str) -> Baseline:
    """Run the operation without a fault."""
    operation = OPERATIONS[name]
    with world_of(operation) as world:
        began = len(world.server.journal.requests)
        before = collections.Counter(world.server.journal.executed())
        value = _readable(operation.run(world), world)
        made = world.server.journal.requests[began:]
        executed = collections.Counter(world.server.journal.executed()) - before
    routes = collections.Counter(
        _ID.sub("*", f"{request.method} {request.path}")
        for request in made
        if not request.path.endswith((HEARTBEAT, "/telemetry"))
    )
    targets = [Target(route, 1) for route in routes]
    targets += [Target(route, count // 2 + 1) for route, count in routes.items() if count > 1]
    return Baseline(value, executed, targets)


def cells_of(operation: str, expected: Baseline) -> List[Cell]:
    """Return all cells of an operation; *expected* is its baseline without a fault."""
    cells = []
    for case in CASES.values():
        if case.route == "heartbeat":
            cells.append(Cell(operation, Target(f"POST /api/v1/{HEARTBEAT}", 1), case.name))
            continue
        for target in expected.targets:
            later = target.call > 1  # there the kind of response makes no further difference
            if later and (case.times != 1 or isinstance(case.fault, faults.Status)):
                continue
            if target.route.startswith("DELETE ") and case.name == "200 empty":
                continue  # looks like the answer to a successful deletion
            if case.route in (None, target.route):
                cells.append(Cell(operation, target, case.name))
    return cells


def run_cell(cell: Cell, expected: Baseline) -> Verdict:
    """Run a cell, and judge it by the operation's baseline."""
    case = CASES[cell.fault]
    wrong: List[str] = []
    before = Leftovers.now()
    operation = OPERATIONS[cell.operation]
    with world_of(operation, **case.settings) as world:
        executed_before = collections.Counter(world.server.journal.executed())
        injection = world.server.inject(
            cell.target.route, case.fault, call=cell.target.call, times=case.times
        )
        began = time.monotonic()
        outcome = _run(functools.partial(operation.run, world), injection)
        seconds = time.monotonic() - began
        injection.remove()
        # Later calls may not happen: the number of polls depends on how long the work takes.
        if not injection.struck and case.route != "heartbeat" and cell.target.call == 1:
            wrong.append("the fault did not strike")
        if outcome is None:
            wrong.append(f"still running after {MOST_S:g} s")
            outcome = Outcome(error=TimeoutError())
        elif not case.is_right(outcome.error, cell.target.route):
            wrong.append(f"wrong error: {outcome.error!r:.300}")
        executed = collections.Counter(world.server.journal.executed()) - executed_before
        again = executed - expected.executed
        for work in [*(["sample"] if case.repeats else []), *operation.fallback_to(case)]:
            again.pop(work, None)
        if again:
            wrong.append(f"executed more than once: {dict(again)}")
        if outcome.error is None:
            value = _readable(outcome.value, world)
            is_list_of_nothing = case.forgets and cell.operation == "lists"
            if value != expected.value and not is_list_of_nothing:
                wrong.append(f"wrong value: {value:.200} instead of {expected.value:.200}")
            if expected.executed - executed:
                wrong.append(f"not executed: {dict(expected.executed - executed)}")
        undone = expected.executed["optim_step"] - executed["optim_step"]
        used = _run(functools.partial(_use, world, case, outcome, undone), injection)
        wrong += [f"not usable within {MOST_S:g} s"] if used is None else used.value
        left = world.service.inflight() if cell.operation != "close" else []
        if left:
            wrong.append(f"futures left: {left}")
        # Otherwise the exception's frames keep clients alive.
        summary = "ok" if outcome.error is None else type(outcome.error).__name__
        del outcome, left
    wrong += before.new(GRACE_S)
    return Verdict(cell, summary, seconds, wrong)


def prepare(log_level: int, with_torch: bool) -> None:
    """Begin a process of the pool."""
    logging.disable(log_level)
    baseline("sample")  # imports nearly all modules
    if with_torch:
        importlib.import_module("torch")
    gc.collect()
    gc.freeze()  # makes collections within cells fast


def run_one(cell: Tuple[Cell, Baseline]) -> Verdict:
    """Run a cell in a process of the pool."""
    return run_cell(*cell)


def _run(function: Callable[[], Any], injection: Any) -> Optional[Outcome]:
    """Call *function* in a thread; return None if it does not end."""
    outcomes: List[Outcome] = []

    def run() -> None:
        try:
            outcomes.append(Outcome(value=function()))
        except BaseException as error:
            outcomes.append(Outcome(error=error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    if isinstance(injection.fault, faults.Hold) and not injection.is_released:
        with contextlib.suppress(TimeoutError):
            injection.wait(MOST_S)
        injection.release()
    thread.join(MOST_S)
    return outcomes[0] if outcomes else None


def _use(world: World, case: FaultCase, outcome: Outcome, undone: int) -> List[str]:
    """Use the client after the fault; return what no longer works.

    *undone* is the number of the operation's optimizer steps that were not executed yet.
    """
    wrong: List[str] = []
    try:
        session_over = isinstance(outcome.error, errors.SessionLostError) or case.ends_session
        if session_over or not _is_open(world.service):
            with ServiceClient(base_url=world.server.url, api_key=KEY, **SETTINGS) as service:
                _use_service(service)
            return wrong
        if isinstance(outcome.error, errors.IncompleteGradientError):
            path = world.run.save_state("kept").result().path  # as the error advises
            world.run.load_state_with_optimizer(path).result()
        if world.trainer is None and world.sampler is None:
            _use_service(world.service)
        if world.trainer is not None:
            steps = world.server.journal.executed_steps(world.trainer)
            world.trainer.train_step([datum()], "cross_entropy", ADAM)
            taken = world.server.journal.executed_steps(world.trainer) - steps
            # A step without a response is resent before the next request of the run, and steps sent
            # by then are executed: those of a pipeline after the failed one.
            if not 1 <= taken <= 1 + (0 if outcome.error is None else undone):
                wrong.append(f"a step after it was executed {taken} times")
        if world.sampler is not None:
            sampled(world.sampler.sample(PROMPT, 1, PARAMS).result())
    except Exception as error:
        wrong.append(f"not usable afterwards: {error!r:.300}")
    return wrong


def _use_service(service: ServiceClient) -> None:
    trainer = service.create_lora_training_client(MODEL, rank=4, seed=0)
    stepped(trainer.train_step([datum()], "cross_entropy", ADAM))
    loss_of(trainer)
    sampler = service.create_sampling_client(base_model=MODEL)
    sampled(sampler.sample(PROMPT, 1, PARAMS).result())


def _is_open(service: ServiceClient) -> bool:
    return "closed" not in repr(service)


def _readable(value: Any, world: World) -> str:
    return _ID.sub("ID", repr(value))
