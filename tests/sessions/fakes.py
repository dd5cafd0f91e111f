"""A network without sockets for SessionManager, and a manager that a test steps by hand."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from support.clocks import ManualClock

from tinkex._sessions.manager import SessionManager
from tinkex.config import Config
from tinkex.errors import APIConnectionError
from tinkex.types import CreateSessionResponse

PATIENCE_S = 60.0


class FakeNetwork:
    """The behaviour of the servers: its functions may answer, raise, or wait for an event."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards the attributes below
        self.created = 0
        self.sent: List[str] = []  # the session of each heartbeat, in order
        self.finished: List[Tuple[str, str, Optional[str]]] = []
        self.finish_timeouts: List[float] = []
        self.threads: List[str] = []  # the threads that created sessions
        self.links: List[FakeLink] = []
        self.on_create: Callable[[str], CreateSessionResponse] = CreateSessionResponse
        self.on_beat: Callable[[str], int] = lambda session_id: 200
        self.on_finish: Callable[[str], int] = lambda session_id: 200
        self.answered: queue.SimpleQueue[str] = queue.SimpleQueue()

    def open(self, config: Config) -> FakeLink:
        link = FakeLink(self, config)
        with self.lock:
            self.links.append(link)
        return link

    def beats(self, session_id: str) -> int:
        with self.lock:
            return self.sent.count(session_id)

    def wait_for_beat(self) -> str:
        """Wait until another heartbeat was answered; return its session."""
        return self.answered.get(timeout=PATIENCE_S)


class FakeLink:
    def __init__(self, network: FakeNetwork, config: Config) -> None:
        self.network = network
        self.config = config
        self.dropped = 0
        self.given_up = False
        self.aborted = threading.Event()

    def create(self) -> CreateSessionResponse:
        with self.network.lock:
            session_id = f"s{self.network.created}"
            self.network.created += 1
            self.network.threads.append(threading.current_thread().name)
        return self.network.on_create(session_id)

    def beat(self, session_id: str) -> int:
        with self.network.lock:
            self.network.sent.append(session_id)
        try:
            return self.network.on_beat(session_id)
        finally:
            self.network.answered.put(session_id)

    def finish(self, session_id: str, status: str, detail: Optional[str], timeout_s: float) -> int:
        with self.network.lock:
            self.network.finished.append((session_id, status, detail))
            self.network.finish_timeouts.append(timeout_s)
        return self.network.on_finish(session_id)

    def give_up(self) -> None:
        self.given_up = True

    def drop_idle(self) -> None:
        self.dropped += 1

    def abort(self) -> None:
        self.aborted.set()

    def hang(self) -> int:
        """Answer nothing until the link is aborted."""
        assert self.aborted.wait(PATIENCE_S)
        raise APIConnectionError("broken off")


class HandTurned:
    """A manager whose heartbeat thread is the test, which moves the clock and iterates."""

    def __init__(self, **how: Any) -> None:
        self.clock = ManualClock()
        self.network = FakeNetwork()
        self.manager = SessionManager(
            clock=self.clock, rand=lambda: 0.0, open_link=self.network.open, **how
        )
        self.heartbeat = self.manager._heartbeat
        self.registry = self.manager._registry
        self.take_over()

    def take_over(self) -> None:
        """Act as the heartbeat thread, so that none is started."""
        self.heartbeat._thread = threading.current_thread()

    def start(self, base_url: str = "http://a.test", **settings: Any) -> str:
        return self.manager.start_session(Config(base_url, **settings))

    def iterate(self, advance_s: float = 0.0) -> bool:
        """Advance the clock, then run one iteration of the heartbeat thread."""
        self.clock.advance(advance_s)
        while not self.heartbeat.inbox.empty():
            self.heartbeat.inbox.get()
        self.heartbeat.wake()
        return self.heartbeat.run_once()

    def snapshot(self) -> Any:
        (snapshot,) = self.manager.snapshot()
        return snapshot


class Oversleeping:
    """An inbox whose waits take longer than requested."""

    def __init__(self, bench: HandTurned, by_s: float) -> None:
        self._bench = bench
        self._by_s = by_s

    def get(self, timeout: float) -> Any:
        self._bench.clock.advance(timeout + self._by_s)
        raise queue.Empty

    def put(self, message: Any) -> None:
        pass


@contextlib.contextmanager
def hand_turned(**how: Any) -> Iterator[HandTurned]:
    bench = HandTurned(**how)
    try:
        yield bench
    finally:
        bench.manager.close()


@contextlib.contextmanager
def managed(**how: Any) -> Iterator[Tuple[SessionManager, FakeNetwork]]:
    """A manager with its real threads on a fake network."""
    network = FakeNetwork()
    manager = SessionManager(open_link=network.open, **how)
    try:
        yield manager, network
    finally:
        manager.close()


def raising(error: BaseException) -> Callable[[str], int]:
    def beat(session_id: str) -> int:
        raise error

    return beat


def answering(answers: Dict[str, int]) -> Callable[[str], int]:
    return lambda session_id: answers.get(session_id, 200)
