"""The calls of the client, and their outcomes."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
from concurrent.futures import CancelledError, Future
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

from proofs.stateful.witness import Key

from tinkex.errors import TinkexError

#: A future that is not settled after this time, in seconds, counts as never settled; a call that
#: has not returned, as hanging.
MOST_S = 100.0

_ticks = itertools.count(1)


def tick() -> int:
    """Return the next number in the order of this process's events."""
    return next(_ticks)


class Outcome(NamedTuple):
    """The outcome of a call: a value, or an error."""

    value: Any = None
    error: Optional[BaseException] = None


@dataclasses.dataclass(eq=False)
class Call:
    """A call of the client that the server should execute.

    Attributes:
        kind: the method.
        scope: the session whose client was called.
        owner: the id of the call's run, or SAMPLES.
        keys: the entries expected in the server's log, in order; a batch in parts has several.
        again: repeats the call.
        after: the preceding call of the same thread; if that fails, this one may be cancelled.
        began, returned: when the call began and returned, which may be before its work is done.
        future: of the work; None if the method returns only when the work is done, or has raised.
        outcome: None until it is known.
        cancelled: `cancel` was called.
        repeated: the call was repeated, and the repetition now stands for it.
        source: for a sample, the name of its checkpoint, or the id of its snapshot's sampler; None
            is the base model.
    """

    kind: str
    scope: Any
    owner: str
    keys: List[Key]
    again: Optional[Callable[[], Call]] = None
    after: Optional[Call] = None
    began: int = dataclasses.field(default_factory=tick)
    returned: int = 1 << 62
    future: Optional[Future[Any]] = None
    outcome: Optional[Outcome] = None
    raised: bool = False
    cancelled: bool = False
    repeated: bool = False
    source: Optional[str] = None

    def submit(self, method: Callable[..., Future[Any]], *args: Any, **options: Any) -> Call:
        """Call *method*, which returns a future without blocking."""
        self.began = tick()
        try:
            self.future = method(*args, **options)
        except Exception as error:
            self.outcome, self.raised = Outcome(error=error), True
        self.returned = tick()
        return self

    def settle(self) -> bool:
        """Wait for the outcome; return False if there is none in time."""
        if self.outcome is None and self.future is not None:
            try:
                self.outcome = Outcome(self.future.result(MOST_S))
            except CancelledError as error:
                self.outcome = Outcome(error=error)
            except Exception as error:
                if not self.future.done():
                    return False
                self.outcome = Outcome(error=error)
        return self.outcome is not None

    @property
    def pending(self) -> bool:
        return self.outcome is None and not (self.future is not None and self.future.done())

    @property
    def succeeded(self) -> bool:
        """Whether the future has a result by now."""
        done = self.future is not None and self.future.done()
        return done and not self.future.cancelled() and self.future.exception() is None

    @property
    def error(self) -> Optional[BaseException]:
        return None if self.outcome is None else self.outcome.error

    @property
    def acknowledged(self) -> bool:
        return self.outcome is not None and self.outcome.error is None

    @property
    def never_sent(self) -> bool:
        """Whether the client knows that nothing was sent; meaningful once all calls are settled."""
        if self.raised:
            return True
        return self.cancelled and not getattr(self.future, "was_sent", True)

    def __repr__(self) -> str:
        state = "pending" if self.outcome is None else repr(self.error or "done")
        if isinstance(self.error, TinkexError):
            state += f", {self.error.attempts} attempts in {self.error.elapsed_s} s"
        return f"<{self.kind} {self.keys} of {self.owner[-12:]}: {state:.300}>"


class Actor:
    """A thread of the user's program, which executes tasks one after the other."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[Optional[Tuple[Callable[[], Any], Future[Any]]]] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def start(self, task: Callable[[], Any]) -> Future[Any]:
        """Have the thread call *task*; return a future for its return."""
        future: Future[Any] = Future()
        self._tasks.put((task, future))
        return future

    def stop(self) -> bool:
        """End the thread; return False if it hangs."""
        self._tasks.put(None)
        self._thread.join(MOST_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            entry = self._tasks.get()
            if entry is None:
                return
            task, future = entry
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)
            del entry, task, future  # a waiting thread must keep no client alive
