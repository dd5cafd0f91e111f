"""LocalServer: the embedded server with its sockets and threads.

Its threads are daemon threads, and close ends all of them: "tinkex-server" (accepts, reads and
writes sockets), "tinkex-http-i" (respond to requests and hold polls), "tinkex-engine" (calls the
engine).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import importlib.util
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Optional, Tuple, Union

from tinkex._runtime import lifecycle
from tinkex._runtime.error_text import ErrorText, Setting
from tinkex._runtime.numeric import as_int
from tinkex.errors import InvalidInputError, LocalServerError
from tinkex.local.engines.engine import Engine
from tinkex.local.http.admission import Admission, is_loopback, read_hosts
from tinkex.local.scheduling.engine_thread import EXIT_WAIT_S
from tinkex.local.settings import ServerSettings
from tinkex.local.state.folder_lock import check_data_dir

if TYPE_CHECKING:
    from tinkex.local.backend import Backend
    from tinkex.local.state.store import Store

_log = logging.getLogger(__name__)

#: How often a dropped server checks whether its last session has ended, in seconds.
_DROPPED_S = 0.1

#: Number of HTTP threads beyond those that polls and OpenAI requests may hold.
_SPARE_THREADS = 64


def load_engine(
    model: Union[str, os.PathLike[str]],
    device: str = "auto",
    *,
    progress: Optional[Callable[[str], None]] = None,
) -> Engine:
    """Load the engine for *model*.  Takes minutes for a large model.

    Args:
        model: ``"deterministic"`` (needs no ML library), an alias such as ``"smollm2-135m"``, a
            Hugging Face name or a folder.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        progress: called with one line of text before each slow step.

    Raises:
        LocalServerError: the model cannot be loaded, or the libraries it needs are missing.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise InvalidInputError(f"model is {model!r}; it must be the name of a model or a folder")
    model = os.fspath(model)
    if model == "deterministic":
        from tinkex.local.engines.deterministic import DeterministicEngine

        return DeterministicEngine()
    with _missing_packages_reported():
        from tinkex.local.engines.torch_engine import TorchEngine
    engine: Engine = TorchEngine.from_pretrained(model, device=device, progress=progress)
    return engine


class LocalServer:
    """An embedded server on a port of this machine.

    ::

        with LocalServer(load_engine("smollm2-135m")) as server:
            print(server.url)

    Args:
        engine: does the work.  Once started, the server owns the engine, and closes it.
        host: interface to bind; anything but loopback needs *api_key*.
        port: port to bind; 0 takes a free one.
        data_dir: folder that keeps runs and checkpoints from one start to the next; None uses a
            temporary folder, which close removes.
        api_key: the ``X-API-Key`` that clients must send; None requires none.
        session_ttl_s: a session without a heartbeat for this long expires (60 s by default).
        settings: all other settings; *api_key* and *session_ttl_s*, if given, override theirs.
        access_log: called with one line of text for each response, in the thread that made the
            response; None keeps no log.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        data_dir: Union[str, Path, None] = None,
        api_key: Optional[str] = None,
        session_ttl_s: Optional[float] = None,
        settings: Optional[ServerSettings] = None,
        access_log: Optional[Callable[[str], None]] = None,
    ) -> None:
        self.settings = _settled(settings or ServerSettings(), api_key, session_ttl_s)
        _check_key(host, self.settings.api_key)
        read_hosts(self.settings.allowed_hosts)  # raises now, before a port is bound
        self._access_log = access_log
        self._engine = engine
        self._host = host
        self._port = as_int("port", port, 0, most=65535, error=LocalServerError)
        self._data_dir = _as_folder(data_dir)
        self._temporary: Optional[Path] = None
        self._stop = threading.Event()
        self._thread: Optional[threading.Thread] = None
        # Guards _closed: close runs once, however often it is called.
        self._lock = threading.Lock()
        self._closed = False
        self._dropped = False  # set once, by a finalizer, which must not take a lock
        self._store: Any = None
        self._backend: Any = None
        self._http: Any = None
        self._threads: Any = None

    @property
    def url(self) -> str:
        """Base URL for clients; LocalServerError before start."""
        if self._http is None:
            raise _not_started()
        # Wildcards are addresses to bind, not to connect to.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        return f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    @property
    def data_dir(self) -> Path:
        """The folder that holds runs and checkpoints; LocalServerError before start."""
        if self._backend is None:
            raise _not_started()
        folder: Path = self._backend.store.data_dir
        return folder

    def start(self) -> None:
        """Bind and serve; return once requests get responses.

        Raises:
            LocalServerError: the port is taken, the folder cannot be used, the server was started
                before, or Flask or waitress is not installed.
        """
        if self._thread is not None or self._closed:
            raise LocalServerError("this server was started before; make a new one")
        # First, so that a port in use is reported before any folder or thread is created.
        listener = _bind(self._host, self._port)
        try:
            self._start_on(listener)
        except BaseException:
            listener.close()
            if self._store is not None:
                self._store.close()
            self._remove_temporary()
            raise

    def close(self) -> None:
        """End the server: release held polls, end the threads, close the sockets and the engine.

        Takes less than two seconds; an engine in the middle of longer work finishes it in the
        background.  A second call does nothing.  Thread-safe.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        # Not under the lock: the rest may take two seconds, and a second call returns at once.
        lifecycle.untrack(self)
        # The timeouts add up to less than the two seconds in which exit hooks close everything.
        if self._thread is not None:
            self._backend.futures.close()  # held polls respond now, while the sockets still work
            self._threads.shutdown(timeout=0.5)
            self._stop.set()
            # Wakes the thread from a wait of up to 30 s.  _stop is set first, or the thread would
            # wait again.
            self._http.pull_trigger()
            # A dropped server is closed by its own thread.
            if self._thread is not threading.current_thread():
                self._thread.join(0.5)
            self._http.close_all()  # only now, since it also closes the trigger pulled above
            self._backend.close(timeout_s=0.8)
        self._remove_temporary()

    def drop(self) -> None:
        """Have the server close itself once it has no live session.  Does not block.

        For finalizers, which may run in any thread, whatever locks that thread holds.
        """
        if self._closed or self._thread is None:
            return
        # First, so that a new server on the same folder waits for this one instead of failing.
        self._store.folder_lock.ending = True
        self._dropped = True
        with contextlib.suppress(OSError):  # the server was closed at the same time
            self._http.pull_trigger()  # writes to a pipe; takes no lock

    def close_at_exit(self, status: str, timeout_s: float) -> None:
        """See lifecycle.Tracked; above all, this removes the temporary folder."""
        self.close()
        if self._backend is not None:
            # Exit hooks that are registered at this point no longer run, so wait here.
            self._backend.engine_thread.join(EXIT_WAIT_S)

    def forget_after_fork(self) -> None:
        """See lifecycle.Tracked; the threads and the folder belong to the parent."""
        self._lock = threading.Lock()  # the old one may be held by a thread of the parent
        self._closed = True

    def __enter__(self) -> LocalServer:
        """Start."""
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def _start_on(self, listener: socket.socket) -> None:
        with _missing_packages_reported():
            for package in ("flask", "waitress"):
                importlib.import_module(package)
        from tinkex.local.http.serving import HttpServer
        from tinkex.local.http.threads import HttpThreads
        from tinkex.local.state.store import Store

        if self._data_dir is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="tinkex-server-"))
        # Assigned before anything else is created: if that fails, `start` closes the store.
        self._store = Store(self._temporary or self._data_dir or Path())
        self._backend, app, admission = self._assemble(self._engine, self._store)
        _import_for_requests()
        # Polls and OpenAI requests have separate bounds of the same size.
        held = 2 * self.settings.max_held_polls
        self._threads = HttpThreads(held + _SPARE_THREADS)
        self._http = HttpServer(
            app, listener, self._threads, self.settings, admission, self._access_log
        )
        self._port = listener.getsockname()[1]
        self._backend.start()
        self._thread = threading.Thread(target=self._serve, name="tinkex-server", daemon=True)
        self._thread.start()
        lifecycle.track(self)

    def _assemble(
        self, engine: Engine, store: Store
    ) -> Tuple[Backend, Callable[..., Any], Admission]:
        """Create the backend, the WSGI application in front of it, and its admission.

        A subclass may put a layer between HTTP and the application.
        """
        from tinkex.local.app import create_app
        from tinkex.local.backend import Backend

        admission = Admission(self.settings)
        backend = Backend(engine, store, self.settings)
        return backend, create_app(backend, self.settings, admission), admission

    def _serve(self) -> None:
        """Run the socket loop, in the thread tinkex-server.

        Return after close or, if the server was dropped, once its last session has ended.
        """
        finishing = False  # True once a dropped server has no live session
        while not self._stop.is_set():
            if self._dropped and not finishing and not self._backend.has_sessions():
                finishing = True
                self._backend.futures.close()  # held polls respond now
            # The request that ended the last session may not have its response yet.
            if finishing and not self._threads.is_busy:
                break
            try:
                # A dropped server checks often: the end of its last session wakes no socket.
                self._http.serve_once(_DROPPED_S if self._dropped else 30.0)
            except OSError:
                # Another thread closed a socket that was being polled.  The pause keeps an error
                # that persists from using up a core.
                _log.debug("the socket loop failed", exc_info=True)
                time.sleep(0.01)
        self._http.flush()  # the responses of polls that futures.close() released
        # The owner was garbage-collected, so no one else would close the server.
        if self._dropped:
            self.close()

    def _remove_temporary(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)


@contextlib.contextmanager
def _missing_packages_reported() -> Iterator[None]:
    """Raise a LocalServerError if an import fails because a package is not installed.

    Any other import error, such as one inside this package, is left as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "tinkex"):
            raise
        raise LocalServerError(
            f"the embedded server needs {package}, which is not installed",
            hint='Install it: python -m pip install "tinkex[local]"',
        ) from error


#: Modules that requests use, imported before the first one: an import that fails within a request,
#: for want of a file descriptor, would make every later request fail, too.
_MODULES_OF_REQUESTS = (
    "tinkex.wire.json_codec",
    "tinkex.wire.proto_codec",
    "tinkex.wire.proto_writer",
    "tinkex.wire.tinker_public_pb2",
)
_OPTIONAL_OF_REQUESTS = ("zstandard", "pyrage")


def _import_for_requests() -> None:
    for name in _MODULES_OF_REQUESTS:
        importlib.import_module(name)
    for package in _OPTIONAL_OF_REQUESTS:
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(package)


def check_bind(host: str, port: int, api_key: Optional[str]) -> None:
    """Raise LocalServerError if a server could not bind now.  Call it before loading a model."""
    _check_key(host, api_key)
    _bind(host, as_int("port", port, 0, most=65535, error=LocalServerError)).close()


def check_folder(data_dir: Union[str, Path, None]) -> None:
    """Like `check_bind`: raise LocalServerError if a server could not use *data_dir* now."""
    folder = _as_folder(data_dir)
    if folder is not None:
        check_data_dir(folder)


def _settled(
    settings: ServerSettings, api_key: Optional[str], session_ttl_s: Optional[float]
) -> ServerSettings:
    return dataclasses.replace(
        settings,
        api_key=api_key or settings.api_key or None,
        session_ttl_s=settings.session_ttl_s if session_ttl_s is None else session_ttl_s,
    )


def _as_folder(data_dir: object) -> Optional[Path]:
    if not isinstance(data_dir, (str, os.PathLike, type(None))):
        raise InvalidInputError(
            ErrorText(Setting("data_dir"), f" is {data_dir!r}; it must be a path, or None")
        )
    return None if data_dir is None else Path(data_dir).expanduser()


def _not_started() -> LocalServerError:
    return LocalServerError("the server was not started", hint="Call start(), or use `with`.")


def _check_key(host: str, api_key: Optional[str]) -> None:
    if not is_loopback(host.lower()) and not api_key:
        raise LocalServerError(
            f"binding to {host} would let everybody on the network in",
            hint=ErrorText(
                "Set a key (",
                Setting("api_key", ..., option="--api-key"),
                f"), e.g. tml-{secrets.token_hex(16)}, or bind to 127.0.0.1.",
            ),
        )


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # A restarted server gets its port even while old connections linger (TIME_WAIT).
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _bind_error(host, port, error) from error
    return listener


#: The end of a hint to choose another port.
_PORT = (Setting("port", ..., option="--port"), "); 0 takes a free one.")


def _bind_error(host: str, port: int, error: OSError) -> LocalServerError:
    if error.errno == errno.EADDRINUSE:
        return LocalServerError(
            f"port {port} on {host} is in use",
            hint=ErrorText("Stop the program that uses it, or choose another port (", *_PORT),
        )
    hints = {
        errno.EACCES: ErrorText("Choose a port above 1023 (", *_PORT),
        errno.EADDRNOTAVAIL: ErrorText(
            "Give an address of this machine (", Setting("host", ..., option="--host"), ")."
        ),
    }
    return LocalServerError(
        f"cannot bind to {host}:{port}: {error.strerror or error}",
        hint=hints.get(error.errno or 0, "Check the address and the port."),
    )
