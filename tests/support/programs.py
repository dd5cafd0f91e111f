"""Runs the command line and the examples as a user does: as processes, against a real server."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional
from unittest import mock

import requests

from tinkex.cli.main import run_command
from tinkex.local.engines.engine import Engine
from tinkex.local.server import LocalServer

REPOSITORY = Path(__file__).resolve().parents[2]
#: No program here takes longer than this, in seconds, even on a busy machine.
PATIENCE_S = 300.0
#: The warnings that a user would see anyway, and those about unclosed sockets and files.
STRICT = ["-W", "always::ResourceWarning"]
with contextlib.suppress(PackageNotFoundError):
    if tuple(map(int, version("torch").split(".")[:2])) < (2, 13):
        # Older releases remove a temporary folder of theirs only at the end of the process.
        STRICT += ["-W", "ignore:Implicitly cleaning up:ResourceWarning"]


def environment(base_url: Optional[str]) -> Dict[str, str]:
    """Return this process's environment without its own server and key, and with *base_url*."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TINKER_")}
    kept.pop("COLUMNS", None)
    kept["PYTHONUNBUFFERED"] = "1"
    kept["TINKEX_NO_STATUS"] = "1"  # a busy machine would show one for every command
    # The installed package is tested if there is one; else the source tree.
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if base_url is not None:
        kept["TINKER_BASE_URL"] = base_url
    return kept


def run(
    arguments: List[str],
    base_url: Optional[str] = None,
    *,
    stdin: str = "",
    cwd: Optional[Path] = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` to its end."""
    return subprocess.run(
        [sys.executable, *STRICT, *arguments],
        env=environment(base_url),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=cwd,
    )


def run_example(name: str, *options: str, server: Optional[Server] = None) -> str:
    """Run ``examples/NAME`` to its end, on *server* if given; return what it printed.

    The example must succeed, with nothing on stderr, and end its session.
    """
    before = server.ends() if server else []
    done = run([str(REPOSITORY / "examples" / name), *options], server.url if server else None)
    assert done.stderr == ""
    assert done.returncode == 0
    if server:
        (end,) = server.ends()[: -len(before) or None]
        assert "ended it: success" in end
    return done.stdout


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def tinkex(*arguments: str, base_url: Optional[str] = None, stdin: str = "") -> Done:
    """Run ``tinkex ARGUMENTS`` within this process, which is faster than starting one."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, environment(base_url), clear=True),
        mock.patch("sys.stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        code = run_command(arguments)
    return Done(code, stdout.getvalue(), stderr.getvalue())


@contextlib.contextmanager
def started(
    arguments: List[str], base_url: Optional[str] = None
) -> Iterator[subprocess.Popen[str]]:
    """Start ``python ARGUMENTS``; it is killed at the end of the block if it still runs."""
    process = subprocess.Popen(
        [sys.executable, *STRICT, *arguments],
        env=environment(base_url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def interrupt(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Send Ctrl-C, wait for the process to end and return its remaining output."""
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


class Server:
    """A LocalServer in this process, and how its sessions ended."""

    def __init__(self, server: LocalServer, trained: threading.Event) -> None:
        self.url = server.url
        self.model: str = requests_get(f"{server.url}/api/v1/get_server_capabilities")[
            "supported_models"
        ][0]["model_name"]
        #: Set when the engine has taken its first optimizer step.
        self.trained = trained

    def ends(self) -> List[str]:
        """Return how each session ended, newest first; ``"live"`` if it has not ended."""
        return list(session_ends(self.url).values())


def session_ends(url: str) -> Dict[str, str]:
    """Return how each session of a server ended, newest first; ``"live"`` if it has not ended."""
    ends = {}
    for session_id in requests_get(f"{url}/api/v1/sessions")["sessions"]:
        reply = requests.post(
            f"{url}/api/v1/session_heartbeat", json={"session_id": session_id}, timeout=10
        )
        ends[session_id] = "live" if reply.ok else f"{reply.status_code} {reply.text}"
    return ends


def requests_get(url: str) -> Any:
    """Return the JSON at *url*."""
    reply = requests.get(url, timeout=10)
    reply.raise_for_status()
    return reply.json()


@contextlib.contextmanager
def serving(engine: Engine, data_dir: Path) -> Iterator[Server]:
    """Serve *engine* for the length of the block."""
    trained = threading.Event()
    engine.optim_step = _telling(engine.optim_step, trained)  # type: ignore[method-assign]
    with LocalServer(engine, data_dir=data_dir) as server:
        yield Server(server, trained)


def _telling(method: Callable[..., Any], event: threading.Event) -> Callable[..., Any]:
    def reported(*arguments: Any) -> Any:
        answer = method(*arguments)
        event.set()
        return answer

    return reported
