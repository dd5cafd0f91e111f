"""Rules for every test (no model hub, no leaked thread or socket), and shared fixtures."""

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

# The environment of the JSON-era client has neither tinkex nor its libraries, so the fixtures
# import what they use.
if TYPE_CHECKING:
    from support.scripted_server import ScriptedServer
    from support.tinker_routes import TinkerRoutes

    from tinkex import ServiceClient, TrainingClient
    from tinkex.local import LocalServer

#: How long a stopped thread may take to end.
GRACE_S = 20.0

# Read when huggingface_hub is imported.  Without a connection, the hub client would retry for a
# minute.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if importlib.util.find_spec("hypothesis") is not None:  # missing with the JSON-era client
    from hypothesis import HealthCheck, settings
    from support.properties import several

    settings.register_profile("steady", several(100), suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("steady")

# A shell's background job ignores Ctrl-C, and so do its children; but tests send it to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """If requested, run all tests with a key that none of them may leak."""
    if os.environ.get("TINKEX_CANARY"):
        from support import canary

        config.pluginmanager.register(canary)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if all of many tests were skipped: a skip meant for a few must have hit all."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    many = session.testscollected > 100 and not session.config.option.collectonly
    if many and reporter is not None and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def tinkex_threads() -> List[threading.Thread]:
    """Return the live threads of the library."""
    return [t for t in threading.enumerate() if t.name.startswith("tinkex-") and t.is_alive()]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Fail a test that leaves a thread of the library alive.

    Threads from before the test belong to fixtures with a wider scope, and do not count.
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
    if server_state is not None:  # servers of later tests may reuse this test's ports
        server_state.forget_servers()
    # A socket that was not closed warns when it is collected, and warnings are errors.
    gc.collect(0)
    lifecycle = sys.modules.get("tinkex._runtime.lifecycle")
    if lifecycle is not None:  # unread failed futures of this test must not be reported in the next
        lifecycle.run_deferred()


@pytest.fixture(scope="module")
def untraced_processes() -> Iterator[None]:
    """Keep coverage out of started processes: it doubles the time to import torch.

    Other tests measure the code that they run.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


@pytest.fixture
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come after milliseconds, unless the server asks for a longer pause."""
    from tinkex._results import backoff
    from tinkex.retry import RetryPolicy

    _, *others = RetryPolicy.__init__.__defaults__  # type: ignore[misc]
    monkeypatch.setattr(RetryPolicy.__init__, "__defaults__", (0.002, *others))
    monkeypatch.setattr(backoff, "FIRST_BACKOFF_S", 0.002)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A real HTTP server that sends the responses that a test scripts."""
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
    """For tests that script the flags later: a client with a key would request them first."""
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
