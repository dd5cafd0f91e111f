"""FakeServer: the embedded server with the deterministic engine, faults and a journal.

Threads: LocalServer's, and "tinkex-restart" while a fault restarts the server.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import threading
import time
import weakref
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, List, Optional, Sequence, Tuple, Type, Union

from tinkex.errors import InvalidInputError, LocalServerError
from tinkex.local.engines.engine import Engine
from tinkex.local.http.admission import Admission
from tinkex.local.server import LocalServer
from tinkex.local.settings import ServerSettings
from tinkex.testing.exchange import FaultLayer
from tinkex.testing.journal import Journal, route_pattern
from tinkex.testing.script import Fault, Injection, Script

#: How long to wait for a result that is to be dropped, in seconds.
_RESULT_S = 30.0

#: Token ids below this decode with every common tokenizer, and none of them is a lone surrogate.
DEFAULT_VOCABULARY = 32_000


class FakeServer:
    """A server for tests: real HTTP on a free port of this machine, deterministic and fast.

    It is the embedded server with its deterministic engine (no machine learning library is
    needed), so it checks requests as strictly as the real one.  Losses fall with each optimizer
    step; samples depend only on prompt, seed and number of steps.  Thread-safe.  ::

        with FakeServer() as server, ServiceClient(base_url=server.url) as service:
            server.inject("optim_step", faults.Drop(after_work=True), call=3)
            train(service)
            assert server.journal.executed_steps(run) == 10

    Args:
        models: names of its one base model; clients may use any of them.
        vocab_size: token ids are less than this; give your tokenizer's size if it is larger.
        context_length: maximum number of tokens of prompt and continuation together.
        api_key: the key that clients must send; None admits everyone on this machine.
        session_ttl_s: a session without a heartbeat for this long expires.
        settings: all other settings of the server.  By default it holds polls, and waits for
            missing requests, for a second or two instead of a minute.

    Attributes:
        journal: the requests received and the work executed.
    """

    def __init__(
        self,
        models: Union[str, Sequence[str]] = ("deterministic",),
        *,
        vocab_size: int = DEFAULT_VOCABULARY,
        context_length: int = 32_768,
        api_key: Optional[str] = None,
        session_ttl_s: Optional[float] = None,
        settings: Optional[ServerSettings] = None,
    ) -> None:
        self._models = (models,) if isinstance(models, str) else tuple(models)
        if not self._models or not all(isinstance(name, str) and name for name in self._models):
            raise InvalidInputError(f"models is {models!r}; it must be names of models")
        self._engine_facts = {"vocab_size": vocab_size, "context_length": context_length}
        self._api_key = api_key
        self._session_ttl_s = session_ttl_s
        # A lost or forged response should cost a test little time.
        quick = ServerSettings(retrieve_hold_s=2.0, missing_seq_id_s=1.0)
        self._settings = quick if settings is None else settings
        self.journal = Journal()
        self._script = Script()
        self._clock = _Clock()
        self._port = 0
        self._folder: Optional[Path] = None  # holds a folder for each state of the server
        self._states = 0
        # Serializes start, restart and close, which hold it throughout.
        self._lock = threading.Lock()
        self._server: Optional[_Server] = None
        self._closed = False
        self._restarts: List[threading.Thread] = []

    @property
    def url(self) -> str:
        """Base URL for clients; a restart keeps it.  LocalServerError before start."""
        if not self._port:
            raise LocalServerError(
                "the server was not started", hint="Call start(), or use `with`."
            )
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start serving; takes about 20 ms, once modules are imported.

        Raises:
            LocalServerError: the server was started before, or Flask or waitress is not installed.
        """
        with self._lock:
            if self._closed or self._server is not None:
                raise LocalServerError("this server was started before; make a new one")
            self._folder = Path(tempfile.mkdtemp(prefix="tinkex-fake-"))
            # For a server that is never closed, e.g. because a test fails while setting it up.
            weakref.finalize(self, shutil.rmtree, str(self._folder), ignore_errors=True)
            self._start_locked()

    def close(self) -> None:
        """Stop the server, dropping held requests.  Idempotent."""
        with self._lock:
            self._closed = True
            self._stop_locked()
        # Join without the lock: a restart takes it before it sees that the server is closed.
        for thread in self._restarts:
            thread.join()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> FakeServer:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    # Faults

    def inject(
        self, route: str, fault: Fault, *, call: int = 1, times: Optional[int] = 1
    ) -> Injection:
        """Have *fault* strike requests to *route*.

        If several faults would strike a request, the one injected first does.

        Args:
            route: such as ``"optim_step"``, ``"GET checkpoints"`` or ``"/v1/completions"``; ``*``
                stands for any text; by itself, for every request, including heartbeats.
            fault: one of `tinkex.testing.faults`, or a function of an `Exchange`.
            call: the first request to strike, counting from 1, starting now.
            times: number of consecutive requests to strike; None strikes all from *call* on.

        Raises:
            InvalidInputError: the server has no such route, or a number is below 1.
        """
        if call < 1 or (times is not None and times < 1):
            raise InvalidInputError(f"call is {call} and times {times}; they count from 1")
        if not callable(fault):
            raise InvalidInputError(f"fault is {fault!r}; it must be one of tinkex.testing.faults")
        if not self._running().has_route(route_pattern(route)):
            raise InvalidInputError(
                f"no route of the server matches {route!r}",
                hint="Routes are those of docs/protocol.md, such as 'optim_step'.",
            )
        return self._script.add(route, fault, call, times)

    def live_sessions(self) -> List[str]:
        """Return the ids of the sessions that have neither ended nor expired."""
        return self._running().live_sessions()

    def expire_sessions(self) -> None:
        """Expire every session, as if no heartbeat had arrived for its time to live.

        This moves the server's clock forward by that time; new sessions live as usual.
        """
        # Uses the server's own clock and housekeeping, just as when heartbeats stop.
        server = self._running(wait=False)
        self._clock.advance(server.settings.session_ttl_s)
        server.request_housekeeping()

    def drop_result(self, request_id: str) -> None:
        """Wait for the result of *request_id*, then drop it as if it had been kept for too long."""
        self._running(wait=False).drop_result(request_id)

    def restart(self, *, keep_state: bool = True) -> None:
        """Stop the server and start it again on the same port.

        As with any restart, sessions and runs in memory are lost.  With *keep_state*, the new
        server still has the old checkpoints; without it, the new server starts empty.  Blocks until
        it serves.
        """
        with self._lock:
            if self._closed:
                return
            self._running(wait=False)
            self._stop_locked()
            self._states += not keep_state
            self._start_locked()

    def restart_soon(self, *, keep_state: bool = True) -> None:
        """Restart from a request's thread, which cannot wait for its own request to end."""
        thread = threading.Thread(
            target=self.restart,
            kwargs={"keep_state": keep_state},
            name="tinkex-restart",
            daemon=True,
        )
        self._restarts.append(thread)
        thread.start()

    # Inside

    def _make_engine(self, models: Sequence[str], **facts: Any) -> Engine:
        """Create the deterministic engine that records its work in the journal."""
        from tinkex.testing.engine import RecordingEngine

        return RecordingEngine(self.journal, models, **facts)

    def _running(self, *, wait: bool = True) -> _Server:
        """Return the server; if a restart is under way, wait until it is done.

        Methods that faults call must not *wait*: the restart waits for their requests to end.
        """
        with self._lock if wait else contextlib.nullcontext():
            server = self._server
        if server is None:
            raise LocalServerError("the server is not running", hint="Call start(), or use `with`.")
        return server

    def _start_locked(self) -> None:
        assert self._folder is not None
        server = _Server(
            self,
            self._script,
            self._clock,
            self._make_engine(self._models, **self._engine_facts),
            port=self._port,
            data_dir=self._folder / str(self._states),
            api_key=self._api_key,
            session_ttl_s=self._session_ttl_s,
            settings=self._settings,
        )
        server.start()
        self._port = server.port
        self._server = server

    def _stop_locked(self) -> None:
        server, self._server = self._server, None
        # Drop held requests first: closing waits for the threads that handle requests.
        self._script.stop()
        if server is not None:
            server.close()


class _Clock:
    """Monotonic seconds that can be moved forward.  Thread-safe."""

    def __init__(self) -> None:
        self._offset_s = 0.0  # only the FakeServer writes it; assigning a float is atomic

    def __call__(self) -> float:
        return time.monotonic() + self._offset_s

    def advance(self, seconds: float) -> None:
        self._offset_s += seconds


class _Server(LocalServer):
    """The embedded server behind a FaultLayer."""

    def __init__(
        self,
        owner: FakeServer,
        script: Script,
        clock: Callable[[], float],
        engine: Engine,
        **options: Any,
    ) -> None:
        super().__init__(engine, **options)
        self._owner = owner
        self._script = script
        self._clock = clock
        self._routes: Any = None

    @property
    def port(self) -> int:
        return self._port

    def _assemble(self, engine: Engine, store: Any) -> Tuple[Any, Callable[..., Any], Admission]:
        from tinkex.local.app import create_app
        from tinkex.local.backend import Backend

        admission = Admission(self.settings)
        backend = Backend(engine, store, self.settings, clock=self._clock)
        app = create_app(backend, self.settings, admission)
        self._routes = app.url_map
        return backend, FaultLayer(self._owner, self._owner.journal, self._script, app), admission

    def has_route(self, pattern: str) -> bool:
        """Return whether *pattern* can fit a request to a route of the application."""
        method, _, path = pattern.partition(" ")
        for rule in self._routes.iter_rules():
            any_of_rule = re.sub(r"<[^>]*>", "*", rule.rule)
            # Either of the two may be the more general one.
            fits = fnmatchcase(path, any_of_rule) or fnmatchcase(rule.rule, path)
            if fits and any(fnmatchcase(name, method) for name in rule.methods):
                return True
        return False

    def live_sessions(self) -> List[str]:
        from tinkex.local.errors import HTTPError

        live = []
        for row in self._backend.store.all_sessions():
            try:
                self._backend.check_session(row.session_id)
            except HTTPError:
                continue
            live.append(row.session_id)
        return live

    def request_housekeeping(self) -> None:
        self._backend.scheduler.rotation.request_housekeeping()

    def drop_result(self, request_id: str) -> None:
        self._backend.futures.wait(request_id, _RESULT_S)
        self._backend.futures.drop(request_id)
