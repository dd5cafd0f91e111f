"""WorkerPool: a few daemon threads that run tasks in order and go away when idle.

With a cap of one it is a serial lane: tasks run one after another, in the order submitted.  The
threads know only the pool's inner state, never its owner: an abandoned owner can be
garbage-collected, and its pool with it, which ends the threads.  They are daemons, so the
interpreter never waits for them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from typing import Callable, List, Optional

from tinkex.errors import ClientClosedError

logger = logging.getLogger(__name__)

Task = Callable[[], object]


class _State:
    """What the threads of a pool share.

    *lock* guards the counters and the list; it is held for a few statements and while a thread is
    started, never while a task runs.  *queue* is a SimpleQueue because finalizers post to it
    (bpo-32576).
    """

    def __init__(self, name: str, idle_s: float) -> None:
        self.name = name
        self.idle_s = idle_s
        self.queue: queue.SimpleQueue[Optional[Task]] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.backlog = 0  # tasks queued and not yet taken
        self.idle = 0  # threads waiting for a task
        self.threads: List[threading.Thread] = []
        self.started = 0
        self.closed = False
        self.draining = False  # refuse new tasks, end after the queued ones

    def stop_from_finalizer(self) -> None:
        """Drain without the lock, which the interrupted thread may hold.

        Tasks still queued at this point do not need the pool's owner, e.g. the callbacks of a
        future that outlives its client.
        """
        self.draining = True
        self.queue.put(None)


class WorkerPool:
    """Runs tasks on at most *cap* daemon threads, named ``<name>-<i>`` (``<name>`` if cap is 1).

    Args:
        name: the name of the threads.
        cap: the most threads at once.
        idle_s: a thread without work ends after this many seconds.

    Attributes:
        cap: the most threads at once; `resize` changes it.

    Thread-safe.  A task's exceptions are logged; tasks are expected to handle their own.
    """

    def __init__(self, name: str, cap: int, idle_s: float = 30.0) -> None:
        self._state = _State(name, idle_s)
        self.cap = cap
        self._serial = cap == 1
        # The finalizer refers only to the state: a reference to the pool would keep the pool alive.
        # Not at exit: the owner closes the pool, or its daemon threads simply stop.
        weakref.finalize(self, self._state.stop_from_finalizer).atexit = False

    @property
    def waiting(self) -> int:
        """How many queued tasks have not begun."""
        return self._state.backlog  # reading one int needs no lock

    @property
    def is_busy(self) -> bool:
        """True while a task runs or is queued."""
        state = self._state
        with state.lock:
            # A task just taken counts in the backlog until its thread leaves `idle`: both change at
            # once.
            return bool(state.backlog) or len(state.threads) > state.idle

    def submit(self, task: Task) -> None:
        """Queue *task*; does not block.

        Raises:
            ClientClosedError: the pool was closed, or has no thread and none can be started.
                The task will not run.
        """
        state = self._state
        trouble: Optional[RuntimeError] = None  # logged after the lock is released
        with state.lock:
            if state.closed or state.draining:
                raise ClientClosedError(f"{state.name} was closed")
            # Each queued task will take one idle thread; this task needs one more.
            if state.backlog >= state.idle and len(state.threads) < self.cap:
                # Before the task is queued: a task reported as refused must not run later.
                trouble = self._start_thread_locked()
            state.backlog += 1
            state.queue.put(task)
        if trouble is not None:
            logger.debug("could not start another %s thread: %s", state.name, trouble)

    def submit_to_idle(self, task: Task, most: int) -> None:
        """Have up to *most* idle threads run *task*, each once; never raises.

        Starts no thread: on Python 3.12, that fails at interpreter exit.
        """
        state = self._state
        with state.lock:
            if state.closed or state.draining:
                return
            for _ in range(min(most, state.idle - state.backlog)):
                state.backlog += 1
                state.queue.put(task)

    def resize(self, cap: int) -> None:
        """Allow *cap* threads at most; start one now if tasks wait and there is room.

        Threads beyond *cap* stay until they are idle.
        """
        state = self._state
        with state.lock:
            self.cap = cap
            if state.closed or state.draining or not state.threads:
                return
            if state.backlog > state.idle and len(state.threads) < cap:
                trouble = self._start_thread_locked()
            else:
                trouble = None
        if trouble is not None:
            logger.debug("could not start another %s thread: %s", state.name, trouble)

    def _start_thread_locked(self) -> Optional[RuntimeError]:
        """Start a thread; if that fails but other threads can do the work, return the error."""
        state = self._state
        name = state.name if self._serial else f"{state.name}-{state.started}"
        # A daemon thread: the interpreter joins all other threads before it runs exit hooks, and a
        # long poll would delay the exit by seconds.
        thread = threading.Thread(target=_work, args=(state,), name=name, daemon=True)
        state.threads.append(thread)  # first, because _work ends if the thread is not listed
        try:
            thread.start()
        except RuntimeError as error:  # interpreter shutdown, or the system's limit on threads
            state.threads.remove(thread)
            if not state.threads:
                raise ClientClosedError(f"cannot start thread {name}: {error}") from error
            return error
        except BaseException:  # Ctrl-C: the thread, started or not, is not used; see _work
            state.threads.remove(thread)
            raise
        state.started += 1
        return None

    def close(self) -> None:
        """Refuse new tasks and let the threads end; queued tasks that have not begun are dropped.

        Does not block; see `join`.
        """
        with self._state.lock:
            self._state.closed = True
        # One None is enough: each thread that takes it puts it back for the next.
        self._state.queue.put(None)

    def drain(self) -> None:
        """Refuse new tasks and let the threads end after the queued tasks.  Does not block."""
        with self._state.lock:
            self._state.draining = True
        self._state.queue.put(None)

    def join(self, deadline: float) -> List[str]:
        """Wait until *deadline* (monotonic) for the threads; return the names of those left."""
        with self._state.lock:
            # A thread without an ident was not started, because of Ctrl-C; join would raise.
            threads = [t for t in self._state.threads if t.ident is not None]
        current = threading.current_thread()  # a task may close the pool that runs it
        for thread in threads:
            if thread is not current:
                thread.join(max(0.0, deadline - time.monotonic()))
        return [t.name for t in threads if t.is_alive() and t is not current]


class WorkerPools:
    """The pools of one client, which are closed together.  Thread-safe."""

    def __init__(self) -> None:
        # Guards _pools, which is weak: a pool ends when its owner is garbage-collected.
        self._lock = threading.Lock()
        self._pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()

    def make(self, name: str, cap: int, idle_s: float = 30.0) -> WorkerPool:
        """Make a pool; the arguments are those of WorkerPool."""
        pool = WorkerPool(name, cap, idle_s)
        with self._lock:
            self._pools.add(pool)
        return pool

    def close(self) -> None:
        """See `WorkerPool.close`."""
        for pool in self._all():
            pool.close()

    def join(self, deadline: float) -> List[str]:
        """See `WorkerPool.join`."""
        return [name for pool in self._all() for name in pool.join(deadline)]

    def _all(self) -> List[WorkerPool]:
        with self._lock:
            return list(self._pools)


def _work(state: _State) -> None:
    with state.lock:  # the starting thread holds it until it has updated the list
        if threading.current_thread() not in state.threads:  # its start was interrupted
            return
    while True:
        task = _next_task(state)
        if task is None:
            return
        try:
            task()
        except Exception:
            logger.exception("a task of %s failed", threading.current_thread().name)
        del task  # don't keep its futures alive while idle


def _next_task(state: _State) -> Optional[Task]:
    """Wait for a task; return None if this thread must end (it is then off the list)."""
    while True:
        with state.lock:
            state.idle += 1
        try:
            # Before Python 3.13, a very short timeout may block forever (see Inbox); here that
            # would only leave a thread idle.
            task = state.queue.get(timeout=state.idle_s)
        except queue.Empty:
            task = None
        with state.lock:
            state.idle -= 1
            if task is not None:
                state.backlog -= 1
                if not state.closed:  # a closed pool begins no task, not even a queued one
                    return task
            if state.closed or state.draining:
                if state.closed:
                    _drop_tasks(state)
                state.queue.put(None)  # for the next thread
            elif state.backlog:  # a task came just as we gave up waiting
                continue
            state.threads.remove(threading.current_thread())
            return None


def _drop_tasks(state: _State) -> None:
    """Empty the queue: tasks left in it would keep their owners alive forever."""
    try:
        while True:
            state.queue.get_nowait()
    except queue.Empty:
        pass
