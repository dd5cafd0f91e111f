"""What holds for every test (no model hub, no thread or socket left over), and shared fixtures."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Iterator, List

import pytest

# The environment of the JSON-era client has neither tinkex nor its libraries: the fixtures import
# what they use.
if TYPE_CHECKING:
    from support.scripted_server import ScriptedServer
    from support.tinker_routes import TinkerRoutes

    from tinkex import ServiceClient, TrainingClient
    from tinkex.local import LocalServer

#: How long a stopped thread may take to leave.
GRACE_S = 20.0

# Read when huggingface_hub is imported.  Where nothing answers, it would try for a minute.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if importlib.util.find_spec("hypothesis") is not None:  # it is not with the JSON-era client
    from hypothesis import HealthCheck, settings
    from support.properties import several

    settings.register_profile("steady", several(100), suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("steady")

# A background job of a shell ignores Ctrl-C, and its children would inherit that; ours are sent it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Run all tests with a key that none of them may show, if that is wished."""
    if os.environ.get("TINKEX_CANARY"):
        from support import canary

        config.pluginmanager.register(canary)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run of many tests of which none did anything: a skip that was meant for a few."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    many = session.testscollected > 100 and not session.config.option.collectonly
    if many and reporter is not None and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def tinkex_threads() -> List[threading.Thread]:
    """Return the library's own threads that are alive."""
    return [t for t in threading.enumerate() if t.name.startswith("tinkex-") and t.is_alive()]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Fail a test after which a thread of the library lives on.

    Threads of fixtures with a wider scope, which were there before the test, are theirs.
    """
    before = set(tinkex_threads())
    yield
    deadline = time.monotonic() + GRACE_S
    left = [t for t in tinkex_threads() if t not in before]
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
    left = [t for t in left if t.is_alive()]
    assert not left, f"threads left behind: {[t.name for t in left]}"
    server_state = sys.modules.get("tinkex._transport.server_state")
    if server_state is not None:  # servers of later tests may get the ports of this one's
        server_state.forget_servers()
    # A socket dropped without being closed warns when it is collected; warnings are errors.
    gc.collect(0)
    lifecycle = sys.modules.get("tinkex._runtime.lifecycle")
    if lifecycle is not None:  # failed futures that the test did not read are not the next one's
        lifecycle.run_deferred()


@pytest.fixture(scope="module")
def untraced_processes() -> Iterator[None]:
    """Processes that are started are not measured by coverage, which doubles an import of torch.

    What they run of tinkex is measured where other tests run it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


@pytest.fixture
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is sent again after milliseconds, where the server asks for no longer pause."""
    from tinkex._results import backoff
    from tinkex.retry import RetryPolicy

    _, *others = RetryPolicy.__init__.__defaults__  # type: ignore[misc]
    monkeypatch.setattr(RetryPolicy.__init__, "__defaults__", (0.002, *others))
    monkeypatch.setattr(backoff, "FIRST_BACKOFF_S", 0.002)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A real HTTP server that sends the responses a test gives it."""
    from support.scripted_server import ScriptedServer

    with ScriptedServer() as scripted:
        yield scripted


@pytest.fixture
def routes(server: ScriptedServer) -> TinkerRoutes:
    """A small Tinker server on *server*."""
    from support.tinker_routes import TinkerRoutes

    return TinkerRoutes(server)


@pytest.fixture
def without_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that script the server's flags later: a client with a key asks for them first."""
    monkeypatch.delenv("TINKER_API_KEY", raising=False)


@pytest.fixture
def scripted(server: ScriptedServer, routes: TinkerRoutes) -> Iterator[ServiceClient]:
    """A client of the scripted server."""
    from tinkex import ServiceClient

    with ServiceClient(base_url=server.url) as client:
        yield client


@pytest.fixture
def local() -> Iterator[LocalServer]:
    """The embedded server with the deterministic engine."""
    from tinkex.local import LocalServer
    from tinkex.local.engines.deterministic import DeterministicEngine

    engine = DeterministicEngine(vocab_size=1000, context_length=64)
    with LocalServer(engine) as running:
        yield running


@pytest.fixture
def service(local: LocalServer) -> Iterator[ServiceClient]:
    """A client of the embedded server."""
    from tinkex import ServiceClient

    with ServiceClient(base_url=local.url) as client:
        yield client


@pytest.fixture
def trainer(service: ServiceClient) -> TrainingClient:
    """A training run on the embedded server."""
    return service.create_lora_training_client("deterministic", rank=4)
