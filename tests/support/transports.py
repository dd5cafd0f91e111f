"""The resources and transport of a client, pointed at a scripted server and quick to give up."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Iterator

from support.scripted_server import ScriptedServer
from tinkex._transport.resources import ClientResources
from tinkex._transport.transport import Transport
from tinkex.config import Config


def quick_config(server: ScriptedServer, **settings: Any) -> Config:
    return Config.resolve(environ={}, **{"base_url": server.url, **settings})


@contextlib.contextmanager
def open_resources(server: ScriptedServer, **settings: Any) -> Iterator[ClientResources]:
    """Yield the resources of a client of *server*; close them at the end as a client does."""
    resources = ClientResources.open(quick_config(server, **settings), threading.Event())
    try:
        yield resources
    finally:
        resources.transport.closing.set()
        resources.abort()


@contextlib.contextmanager
def open_transport(server: ScriptedServer, **settings: Any) -> Iterator[Transport]:
    """Yield a transport to *server*; close it at the end as a session does."""
    transport = Transport(quick_config(server, **settings))
    try:
        yield transport
    finally:
        transport.closing.set()
        transport.abort()
