"""Fixtures of the tests about sessions."""

from __future__ import annotations

import socket
from typing import Any, Callable, Iterator, List

import pytest
from sessions import processes
from sessions.fakes import HandTurned, hand_turned
from support.session_server import SessionServer

from tinkex import ServiceClient
from tinkex.config import Config


@pytest.fixture(autouse=True)
def no_script_is_left() -> Iterator[None]:
    """Kill the scripts of a test that failed before their end."""
    yield
    for script in list(processes.running):
        script.kill()


@pytest.fixture
def server() -> Iterator[SessionServer]:
    with SessionServer() as scripted:
        yield scripted


@pytest.fixture
def bench() -> Iterator[HandTurned]:
    with hand_turned() as made:
        yield made


@pytest.fixture
def config(server: SessionServer) -> Config:
    return Config(server.url, heartbeat_interval_s=0.05)


@pytest.fixture
def connect(server: SessionServer) -> Iterator[Callable[..., ServiceClient]]:
    """Open clients of the server; they are closed after the test."""
    opened: List[ServiceClient] = []

    def connect(**settings: Any) -> ServiceClient:
        settings = {"base_url": server.url, "heartbeat_interval_s": 0.05, **settings}
        opened.append(ServiceClient(**settings))
        return opened[-1]

    yield connect
    for service in opened:
        service.close()


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port on which nothing listens, or can listen while the test runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]
