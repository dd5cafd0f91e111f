"""Fixtures of the client's tests."""

from __future__ import annotations

from typing import Iterator

import pytest
from support.scripted_server import ScriptedServer
from support.tinker_routes import TinkerRoutes

from tinkex import ServiceClient, TrainingClient
from tinkex.local import LocalServer
from tinkex.local.deterministic import DeterministicEngine


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A real HTTP server that answers what the test tells it to."""
    with ScriptedServer() as scripted:
        yield scripted


@pytest.fixture
def routes(server: ScriptedServer) -> TinkerRoutes:
    """A small Tinker server on *server*."""
    return TinkerRoutes(server)


@pytest.fixture
def scripted(server: ScriptedServer, routes: TinkerRoutes) -> Iterator[ServiceClient]:
    """A client of the scripted server."""
    with ServiceClient(base_url=server.url) as client:
        yield client


@pytest.fixture
def local() -> Iterator[LocalServer]:
    """The embedded server with the deterministic engine."""
    engine = DeterministicEngine(vocab_size=1000, context_length=64)
    with LocalServer(engine) as running:
        yield running


@pytest.fixture
def service(local: LocalServer) -> Iterator[ServiceClient]:
    """A client of the embedded server."""
    with ServiceClient(base_url=local.url) as client:
        yield client


@pytest.fixture
def trainer(service: ServiceClient) -> TrainingClient:
    """A training run on the embedded server."""
    return service.create_lora_training_client("deterministic", rank=4)
