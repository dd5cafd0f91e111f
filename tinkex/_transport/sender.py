"""Sender: what sends requests.  A Transport is one, and so is a busy thread's view of it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Optional, Protocol

from tinkex._runtime.clock import Clock
from tinkex._transport.request import Reply, Request
from tinkex.config import Config
from tinkex.errors import APIError
from tinkex.retry import RetryPolicy

if TYPE_CHECKING:
    from tinkex._transport.fast_connection import AnyChannel
    from tinkex._transport.server_state import ServerState


class Sender(Protocol):
    """What endpoint functions need of a transport."""

    @property
    def config(self) -> Config:
        """Settings; they name the server."""

    @property
    def server(self) -> ServerState:
        """What is known of the server."""

    @property
    def closing(self) -> threading.Event:
        """Set when its client closes."""

    @property
    def clock(self) -> Clock:
        """What its waits go by."""

    def send(
        self, request: Request, policy: RetryPolicy, *, channel: Optional[AnyChannel] = None
    ) -> Reply:
        """See Transport.send."""

    def send_once(self, request: Request, *, channel: Optional[AnyChannel] = None) -> Reply:
        """See Transport.send_once."""

    def status_error(self, request: Request, reply: Reply) -> APIError:
        """See Transport.status_error."""

    def redact(self, text: str) -> str:
        """See Transport.redact."""
