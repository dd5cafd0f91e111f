"""The state machine: random interleavings of the calls of a program, over random faults.

If order matters, the machine determines it: an actor's call has returned before the next rule
    begins.  In a burst, several actors call at the same time, while a session may end or be closed;
    the checks then hold for every order.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import logging
import threading
from typing import Any, Callable, Counter, Iterator, List, Optional, Sequence, Tuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from proofs.stateful import checks, replay
from proofs.stateful.calls import Call
from proofs.stateful.storms import ENDING, FAILING, PASSING, ROUTES, WAITING, by_name
from proofs.stateful.world import ACTORS, KINDS, World
from support.leftovers import Leftovers

from tinkex._results import backoff
from tinkex._sessions import session
from tinkex.retry import RetryPolicy

GRACE_S = 5.0

actors = st.integers(0, ACTORS - 1)
picks = st.integers(0, 20)
work = st.lists(st.sampled_from(KINDS), min_size=1, max_size=4)

#: Counters over all examples so far, for the summary of a long run.
totals: Counter[str] = collections.Counter()


class Interleavings(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self._left = Leftovers.now()
        self._resources = contextlib.ExitStack()
        self._resources.enter_context(quick_retries())
        self._resources.enter_context(quiet())
        self._world: Optional[World] = None

    @property
    def is_running(self) -> bool:
        return self._world is not None

    @property
    def world(self) -> World:
        assert self._world is not None
        return self._world

    @initialize(
        batch_polls=st.booleans(), cancels=st.booleans(), heartbeat_s=st.sampled_from([0.05, 10.0])
    )
    def begin(self, batch_polls: bool, cancels: bool, heartbeat_s: float) -> None:
        self._world = World(batch_polls=batch_polls, cancels=cancels, heartbeat_s=heartbeat_s)
        self.world.open()
        self.world.do(0, self.world.create_run)

    # Training

    @rule(actor=actors, which=picks, kinds=work, source=picks)
    def submit(self, actor: int, which: int, kinds: List[str], source: int) -> None:
        """Make a few calls in a row, without waiting."""
        run = self._run(which)
        if run is not None:
            self.world.do(actor, lambda: self._submit_all(run, kinds, source))

    @rule(actor=actors, which=picks)
    def train_step(self, actor: int, which: int) -> None:
        run = self._run(which)
        if run is not None:
            self.world.do(actor, lambda: self.world.train_step(run))

    @rule(
        actor=actors,
        which=picks,
        steps=st.integers(1, 5),
        depth=st.integers(1, 3),
        stop_after=st.integers(1, 5),
        end=st.sampled_from(["close", "drain"]),
    )
    def pipeline(
        self, actor: int, which: int, steps: int, depth: int, stop_after: int, end: str
    ) -> None:
        run = self._run(which)
        if run is not None:
            self.world.do(actor, lambda: self.world.pipeline(run, steps, depth, stop_after, end))

    @rule(
        which=st.tuples(picks, picks, picks),
        kinds=st.tuples(work, work, work),
        source=picks,
        meanwhile=st.sampled_from(["nothing"] * 6 + ["step", "cancel", "close", "expiry"]),
    )
    def burst(
        self,
        which: Tuple[int, ...],
        kinds: Tuple[List[str], ...],
        source: int,
        meanwhile: str,
    ) -> None:
        """Have all actors make calls at the same time, while something else happens."""
        runs = [self._run(one) for one in which]
        start = threading.Barrier(ACTORS + 1)
        world, scope = self.world, self.world.scope

        def task(index: int) -> None:
            start.wait()
            if runs[index] is not None:
                if meanwhile == "step" and index == 0:
                    world.train_step(runs[index])
                self._submit_all(runs[index], kinds[index], source)

        done = [actor.start(lambda i=i: task(i)) for i, actor in enumerate(world.actors)]
        before = list(world.calls)
        start.wait()
        if meanwhile == "close":
            world.close(scope)
        elif meanwhile == "expiry":
            world.inject("ending", "expiry", "*", 1, 1)
        elif meanwhile == "cancel":
            for call in before:
                _cancel(call)
        for future in done:
            world.wait_for(future)

    @rule(actor=actors, source=picks, optimizer=st.booleans(), fresh=st.booleans())
    def create_run(self, actor: int, source: int, optimizer: bool, fresh: bool) -> None:
        names = self._names("save")
        if self._usable and len(self.world.scope.runs) < 3:
            name = None if fresh or not names else names[source % len(names)]
            self.world.do(actor, lambda: self.world.create_run(name, optimizer))

    @rule(which=picks)
    def repeat(self, which: int) -> None:
        """Repeat the last failed call of a run, which is then executed once."""
        run = self._run(which)
        calls = [] if run is None else self._settled_calls_of(run)
        last = calls[-1] if calls else None
        maybe_done = last is not None and getattr(last.error, "maybe_taken", False)
        if maybe_done and last.again is not None and len(last.keys) == 1:
            last.repeated = True
            self.world.do(0, last.again)

    # Sampling

    @rule(actor=actors, source=picks, base=st.booleans())
    def create_sampler(self, actor: int, source: int, base: bool) -> None:
        paths = self._paths("export")
        if self._usable:
            path = None if base or not paths else paths[source % len(paths)][1]
            self.world.do(actor, lambda: self.world.create_sampler(path))

    @rule(actor=actors, which=picks, count=st.integers(1, 5))
    def sample(self, actor: int, which: int, count: int) -> None:
        samplers = self.world.samplers()
        if samplers:
            chosen = samplers[which % len(samplers)]
            self.world.do(actor, lambda: [self.world.sample(*chosen) for _ in range(count)])

    # Ends

    @rule(actor=actors, newest=st.integers(0, 4))
    def cancel(self, actor: int, newest: int) -> None:
        """Cancel one of the newest calls, which may be in flight."""
        calls = [call for call in self.world.calls if call.future is not None]
        if newest < len(calls):
            self.world.do(actor, lambda: _cancel(calls[-1 - newest]))

    @rule(newest=st.integers(0, 4))
    def wait(self, newest: int) -> None:
        calls = [call for call in self.world.calls if call.future is not None]
        if newest < len(calls):
            self._settle([calls[-1 - newest]])

    @rule()
    def settle(self) -> None:
        """Wait for all calls, and check them."""
        self._settle(self.world.calls)
        self._check()

    @rule(actor=actors, with_run=st.booleans())
    def close_and_open(self, actor: int, with_run: bool) -> None:
        self.world.do(actor, lambda: self.world.close(self.world.scope))
        self._open(with_run)

    @rule()
    def open_after_the_end(self) -> None:
        """Open another session if the current one is over; the old one is closed at the end."""
        if not self._usable:
            self._open(True)

    @rule(how=st.sampled_from(["expiry", "restart", "restart without state"]))
    def end_sessions(self, how: str) -> None:
        self._settle(self.world.calls)
        server = self.world.server
        if how == "expiry":
            server.expire_sessions()
        else:
            server.restart(keep_state=how == "restart")
        if how == "restart without state":
            self.world.forget()
        self.world.session_over()

    # Faults

    @rule(
        name=st.sampled_from(sorted(PASSING)),
        route=st.sampled_from(ROUTES["passing"]),
        call=st.integers(1, 4),
        times=st.integers(1, 3),
    )
    def inject_passing(self, name: str, route: str, call: int, times: int) -> None:
        # The creation of a session is given up only after its timeout, which is long.
        if not (name in WAITING and route in ("*", "POST /api/v1/create_session")):
            self.world.inject("passing", name, route, call, times)

    @rule(
        name=st.sampled_from(sorted(FAILING)),
        route=st.sampled_from(ROUTES["failing"]),
        call=st.integers(1, 3),
    )
    def inject_failing(self, name: str, route: str, call: int) -> None:
        if name != "expired result" or route.endswith("retrieve_future"):
            self.world.inject("failing", name, route, call, 1)

    @rule(
        name=st.sampled_from(sorted(ENDING)),
        route=st.sampled_from(ROUTES["ending"]),
        call=st.integers(2, 8),
    )
    def inject_ending(self, name: str, route: str, call: int) -> None:
        self.world.inject("ending", name, route, call, 1)

    @rule()
    def release(self) -> None:
        for storm in self.world.storms:
            storm.injection.release()

    # The end

    def teardown(self) -> None:
        if self._world is None:
            self._resources.close()
            return
        try:
            self._finish()
        finally:
            self.end()
        found = self._left.new(GRACE_S)
        assert not found, found

    def _finish(self) -> None:
        world = self.world
        world.calm()
        self._settle(world.calls)
        self._check()
        self._paths("save")  # lost checkpoints cannot be compared
        if not self._usable or world.ended_at >= world.scope.opened_at:
            self._open(False)
        for run in world.scope.runs:
            final = world.submit("save", run)
            self._settle([final])
            if not final.acknowledged:
                world.wrong.append(f"the run cannot be saved at the end: {final}")
        self._check()
        found = list(replay.differences(world))
        assert not found, "\n".join(found)
        left = [one for scope in world.scopes for one in scope.service.inflight()]
        assert not left, f"futures left: {left}"
        _count(world)

    def end(self) -> None:
        """Close everything, whatever the findings."""
        world, self._world = self.world, None
        world.calm()
        for scope in world.scopes:
            world.close(scope)
        hanging = [actor for actor in world.actors if not actor.stop()]
        live = world.server.live_sessions()
        world.server.close()
        self._resources.close()
        assert not hanging, f"{len(hanging)} actors hang"
        assert not live, f"sessions left: {live}"

    # Inside

    @property
    def _usable(self) -> bool:
        """Whether the newest session is open, and not known to be over."""
        scope = self.world.scope
        return scope.closing is None and scope.over is None

    def _open(self, with_run: bool) -> None:
        self.world.open()
        if with_run:
            names = self._names("save")
            self.world.do(0, lambda: self.world.create_run(names[-1] if names else None, True))

    def _run(self, which: int) -> Any:
        runs = self.world.scope.runs
        return runs[which % len(runs)] if runs else None

    def _paths(self, kind: str) -> List[Tuple[str, str]]:
        """Return names and paths of the server's checkpoints, unless it is about to lose them."""
        forgets = by_name(self.world.storms, "restart without state")
        if forgets > self._forgets:
            self._forgets = forgets
            self.world.forget()
        return sorted(self.world.paths(kind).items())

    _forgets = 0

    def _names(self, kind: str) -> List[str]:
        return [name for name, _ in self._paths(kind)]

    def _submit_all(self, run: Any, kinds: Sequence[str], source: int) -> None:
        names = self._names("save")
        chosen = [names[source % len(names)]] if names else []
        for kind in kinds:
            self.world.submit(kind, run, chosen)

    def _settled_calls_of(self, run: Any) -> List[Call]:
        """Return all calls of *run*, in order, once they are settled."""
        calls = [call for call in self.world.calls if call.owner == run.model_id]
        self._settle(calls)
        return sorted(calls, key=lambda call: call.began)

    def _settle(self, calls: Sequence[Call]) -> None:
        for call in list(calls):
            if not call.settle():
                status = getattr(call.future, "status", lambda: "")()
                raise AssertionError(f"never settled: {call}: {status}")

    def _check(self) -> None:
        world = self.world
        every: List[Callable[[World], Iterator[str]]] = [
            checks.wrong_calls,
            checks.wrong_executions,
            checks.wrong_results,
            checks.wrong_bodies,
        ]
        found = [*world.wrong, *(text for check in every for text in check(world))]
        assert not found, "\n".join(found)


def _cancel(call: Call) -> None:
    if call.future is not None and call.pending:
        call.cancelled = True
        call.future.cancel()


def _count(world: World) -> None:
    totals["examples"] += 1
    totals["optimizer steps"] += sum(k[0] == "optim_step" for _, k in world.server.log.entries)
    for call in world.calls:
        error = call.error
        totals[f"{call.kind}: {'done' if error is None else type(error).__name__}"] += 1
    for name, strikes in checks.strikes_by_name(world.storms).items():
        totals[f"fault {name}"] += strikes
    totals["requests"] += len(world.server.journal.requests)
    totals["requests sent again"] += len(world.server.journal.duplicates())


@contextlib.contextmanager
def quick_retries() -> Iterator[None]:
    """Retries come after milliseconds, unless the server asks for a longer pause.

    The check whether a session is over may take longer than usual: the machine may be very busy.
    """
    defaults = RetryPolicy.__init__.__defaults__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetryPolicy.__init__, "__defaults__", (0.002, *defaults[1:]))
        patch.setattr(backoff, "FIRST_BACKOFF_S", 0.002)
        patch.setattr(session, "ASK_TIMEOUT_S", 20.0)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep log messages about the faults out of the report."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        gc.collect(0)
