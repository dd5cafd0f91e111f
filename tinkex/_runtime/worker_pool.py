"""WorkerPool: a few daemon threads that run tasks in order and go away when idle.

With a cap of one it is a serial lane: tasks run one after the other, in the order they came.
The threads know only the pool's inner state, never its owner, so a forgotten owner can be
collected, and its pool with it, which then lets the threads end; and they are daemons, so the
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

    *lock* guards the counters and the lists; it is held for a few statements and the start of a
    thread, never while a task runs.  *queue* is a SimpleQueue because finalizers post to it
    (bpo-32576).
    """

    def __init__(self, name: str, idle_s: float) -> None:
        self.name = name
        self.idle_s = idle_s
        self.queue: queue.SimpleQueue[Optional[Task]] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.backlog = 0  # tasks put and not yet taken
        self.idle = 0  # threads waiting for a task
        self.threads: List[threading.Thread] = []
        self.started = 0
        self.closed = False
        self.draining = False  # refuse new tasks, end after those that are queued

    def stop_from_finalizer(self) -> None:
        """Drain without the lock, which the finalized thread may hold.

        The tasks that are queued then do not need the pool's owner, such as the callbacks of a
        future that outlives its client.
        """
        self.draining = True
        self.queue.put(None)


class WorkerPool:
    """Runs tasks on at most *cap* daemon threads named ``<name>-<i>`` (``<name>`` if cap is 1).

    Args:
        name: of the threads.
        cap: most threads at once.
        idle_s: a thread without work ends after this many seconds.

    Attributes:
        cap: most threads at once; `resize` changes it.

    Thread-safe.  A task's exceptions are logged; tasks are expected to handle their own.
    """

    def __init__(self, name: str, cap: int, idle_s: float = 30.0) -> None:
        self._state = _State(name, idle_s)
        self.cap = cap
        self._serial = cap == 1
        # It refers to the state alone: a reference to the pool would keep the pool alive.  At exit
        # the owner closes the pool, or its daemon threads simply stop.
        weakref.finalize(self, self._state.stop_from_finalizer).atexit = False

    @property
    def waiting(self) -> int:
        """How many tasks were queued and not begun yet."""
        return self._state.backlog  # one read of an int needs no lock

    @property
    def is_busy(self) -> bool:
        """True while a task runs or is queued."""
        state = self._state
        with state.lock:
            # A thread that just took a task counts until it has both left `idle` and the backlog.
            return bool(state.backlog) or len(state.threads) > state.idle

    def submit(self, task: Task) -> None:
        """Queue *task*; does not block.

        Raises:
            ClientClosedError: the pool was closed, or has no thread and none can be started.
                The task will not run.
        """
        state = self._state
        trouble: Optional[RuntimeError] = None  # logged once the lock is released
        with state.lock:
            if state.closed or state.draining:
                raise ClientClosedError(f"{state.name} was closed")
            # Each queued task will take one idle thread; this one needs a thread beyond those.
            if state.backlog >= state.idle and len(state.threads) < self.cap:
                # Before the task is queued: one reported as refused must not run later.
                trouble = self._start_thread_locked()
            state.backlog += 1
            state.queue.put(task)
        if trouble is not None:
            logger.debug("could not start another %s thread: %s", state.name, trouble)

    def submit_to_idle(self, task: Task, most: int) -> None:
        """Have threads that are idle now run *task*, *most* at most; never raises.

        Starts no thread: at interpreter exit that fails on Python 3.12.
        """
        state = self._state
        with state.lock:
            if state.closed or state.draining:
                return
            for _ in range(min(most, state.idle - state.backlog)):
                state.backlog += 1
                state.queue.put(task)

    def resize(self, cap: int) -> None:
        """Let there be *cap* threads at most; start one now if tasks wait and there is room.

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
        """Start a thread; return why not, if there are others to do the work."""
        state = self._state
        name = state.name if self._serial else f"{state.name}-{state.started}"
        # A daemon: the interpreter joins all other threads before it runs exit hooks, so that a
        # long poll would delay the exit by seconds.
        thread = threading.Thread(target=_work, args=(state,), name=name, daemon=True)
        state.threads.append(thread)  # before it starts, because _work ends if it is not listed
        try:
            thread.start()
        except RuntimeError as error:  # interpreter shutdown, or no more threads to be had
            state.threads.remove(thread)
            if not state.threads:
                raise ClientClosedError(f"cannot start thread {name}: {error}") from error
            return error
        except BaseException:  # Ctrl-C: the thread may run or not, but it is not used; see _work
            state.threads.remove(thread)
            raise
        state.started += 1
        return None

    def close(self) -> None:
        """Refuse new tasks and let the threads end; queued tasks that did not begin are dropped.

        Does not block; see `join`.
        """
        with self._state.lock:
            self._state.closed = True
        # One is enough: each thread that takes it puts it back for the next.
        self._state.queue.put(None)

    def drain(self) -> None:
        """Refuse new tasks and let the threads end after the queued ones.  Does not block."""
        with self._state.lock:
            self._state.draining = True
        self._state.queue.put(None)

    def join(self, deadline: float) -> List[str]:
        """Wait until *deadline* (monotonic) for the threads; return the names of those left."""
        with self._state.lock:
            # Without an ident it was not started, because of Ctrl-C; join would raise.
            threads = [t for t in self._state.threads if t.ident is not None]
        current = threading.current_thread()  # a task may close the pool that runs it
        for thread in threads:
            if thread is not current:
                thread.join(max(0.0, deadline - time.monotonic()))
        return [t.name for t in threads if t.is_alive() and t is not current]


class WorkerPools:
    """The pools of one client, which are closed together.  Thread-safe."""

    def __init__(self) -> None:
        # Guards _pools, which is weak: a pool ends when its owner is collected.
        self._lock = threading.Lock()
        self._pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()

    def make(self, name: str, cap: int, idle_s: float = 30.0) -> WorkerPool:
        """Make a pool, with the arguments of WorkerPool."""
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
    with state.lock:  # held by the thread that starts this one, until the lists agree
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
        del task  # do not keep its futures alive while idle


def _next_task(state: _State) -> Optional[Task]:
    """Wait for a task; None when this thread is to end (it is then off the list)."""
    while True:
        with state.lock:
            state.idle += 1
        try:
            # With a very short timeout this may block for ever before Python 3.13 (see Inbox);
            # here it would only leave a thread idle.
            task = state.queue.get(timeout=state.idle_s)
        except queue.Empty:
            task = None
        with state.lock:
            state.idle -= 1
            if task is not None:
                state.backlog -= 1
                if not state.closed:  # a closed pool begins nothing, even what is queued
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
    """Empty the queue: tasks left in it would keep their owners alive for ever."""
    try:
        while True:
            state.queue.get_nowait()
    except queue.Empty:
        pass
