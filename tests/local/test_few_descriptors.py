"""When file descriptors run out, client and server wait, report it, and continue."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import urllib3.exceptions
from support.scripted_server import Answer, ScriptedServer

import tinkex
from tinkex._runtime import descriptors
from tinkex._transport.request import Request
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.errors import APIConnectionError

ROOT = str(Path(tinkex.__file__).resolve().parents[1])
pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX limits")

BOTH = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 4096))
import tinkex
from tinkex import types

prompts = [types.ModelInput.from_ints([65, 66 + i]) for i in range(400)]
with tinkex.ServiceClient.local("deterministic") as service:
    sampler = service.create_sampling_client(base_model="deterministic")
    print(len(list(sampler.sample_many(prompts, types.SamplingParams(max_tokens=2)))))
"""


def test_many_samples_with_the_server_in_the_same_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOTH], capture_output=True, text=True, cwd=ROOT, timeout=50
    )
    assert (done.stdout, done.stderr) == ("400\n", "")


SERVER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))
import logging
logging.basicConfig(level=logging.WARNING)
from tinkex.local.server import LocalServer, load_engine

with LocalServer(load_engine("deterministic")) as server:
    print(server.url, flush=True)
    sys.stdin.readline()
"""


def test_a_server_closes_idle_connections_in_favour_of_waiting_ones() -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert server.stdout is not None
    idle = []
    try:
        url = server.stdout.readline().strip()
        port = int(url.rpartition(":")[2])
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(80)]
        answer = requests.get(f"{url}/api/v1/healthz", timeout=30)
        assert answer.status_code == 200
        _, errors = server.communicate("stop\n", timeout=30)
    finally:
        for one in idle:
            one.close()
        server.kill()
        server.wait()
    assert len(re.findall("no file descriptor is free", errors)) == 1
    assert "The limit of this process is 64" in errors


# The client


def too_many_files() -> requests.RequestException:
    """Return the error that requests raises when a socket cannot be created."""
    cause = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    inner = urllib3.exceptions.NewConnectionError(None, "no socket")  # type: ignore[arg-type]
    inner.__cause__ = cause
    return requests.ConnectionError(urllib3.exceptions.MaxRetryError(None, "/", inner))  # type: ignore[arg-type]


class Exhausted:
    """A channel that cannot get a socket."""

    def request(self, *args: Any, **kwargs: Any) -> Any:
        raise too_many_files()


def test_a_client_closes_idle_connections_and_reports_it_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ask = Request("POST", "/api/v1/x", b"{}", raw_credential=True)
    with ScriptedServer() as server:
        server.on("POST /api/v1/x", Answer())
        transport = Transport(Config.resolve(environ={}, base_url=server.url))
        transport.send_once(ask, channel=transport.open_connection())
        transport.send_once(ask)
        for _ in range(2):
            exhausted: Any = Exhausted()
            with pytest.raises(APIConnectionError, match="ulimit -n") as caught:
                transport.send_once(ask, channel=exhausted)
            assert not caught.value.maybe_taken
        server.wait_until_idle()
        transport.abort()
    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "no file descriptor is free" in warnings[0]


def test_exhaustion_is_recognized_through_wrapping_errors() -> None:
    assert descriptors.are_exhausted(too_many_files())
    assert descriptors.are_exhausted(OSError(errno.ENFILE, "x"))
    assert not descriptors.are_exhausted(OSError(errno.ECONNREFUSED, "x"))
    assert not descriptors.are_exhausted(ValueError("x"))


def test_no_more_connections_than_the_limit_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed, most in ((256, 96), (70, 8), (None, sys.maxsize)):
        monkeypatch.setattr(descriptors, "limit", lambda allowed=allowed: allowed)
        assert descriptors.connection_cap() == most
