"""LookupClient: what RestClient and AdminClient have in common.

Either is made by a ServiceClient and works in its session, or on its own: then it owns a
Connection, and no session is opened.
"""

from __future__ import annotations

import warnings
from datetime import datetime
from typing import Any, Callable, Optional, TypeVar, Union

from tinkex._sessions.connection import Connection
from tinkex._sessions.session import Session
from tinkex._sessions.telemetry import Reporter
from tinkex._transport.transport import Transport
from tinkex.clients.base import BaseClient
from tinkex.config import Config, check_config
from tinkex.errors import InvalidInputError
from tinkex.futures import APIFuture

T = TypeVar("T")

#: A time: aware, or RFC 3339; what names no zone is taken as UTC.
Instant = Union[datetime, str]


class LookupClient(BaseClient[Union[Session, Connection]]):
    """A client that looks things up, and may change them, but starts no work.

    Args:
        session: what to work in; given by ServiceClient.
        base_url, api_key: the server; else ``TINKER_BASE_URL`` and ``TINKER_API_KEY``.
        config: all settings at once, instead of the keywords.
        settings: any other setting of `Config`.

    On its own it sends nothing before the first call, and its threads end when it is closed; use
    it as a context manager.
    """

    def __init__(
        self,
        session: Optional[Union[Session, Connection]] = None,
        *,
        config: Optional[Config] = None,
        **settings: Any,
    ) -> None:
        given = any(value is not None for value in settings.values())
        if sum((session is not None, config is not None, given)) > 1:
            raise InvalidInputError("give a session, or config, or single settings")
        self._own: Optional[Connection] = None
        if session is None:
            config = Config.resolve(**settings) if config is None else check_config(config)
            session = self._own = Connection(config)
        elif not hasattr(session, "ensure_open"):
            raise InvalidInputError(
                f"the first argument of {type(self).__name__} is {session!r:.200}, not a session",
                hint="The server's address is given by name: base_url=...",
            )
        super().__init__(session)

    @property
    def config(self) -> Config:
        """The settings in force."""
        return self._session.config

    @property
    def transport(self) -> Transport:
        """What requests go through; for the library's own modules."""
        return self._session.transport

    def get_telemetry(self) -> Optional[Reporter]:
        """What reports on this client's failures, or None if telemetry is off (the default)."""
        return self._session.telemetry

    def close(self) -> None:
        """Refuse further work; idempotent.

        A client on its own also settles what is outstanding with ClientClosedError and ends its
        threads, which takes a moment.  A session goes on, and what was submitted to it.
        """
        super().close()
        if self._own is not None:
            self._own.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed or self._session.closed else "open"
        return f"<{type(self).__name__} at {self.config.base_url}, {state}>"

    def _run(self, kind: str, call: Callable[[Transport], T]) -> APIFuture[T]:
        """Have *call* done by a background thread; return its future at once."""
        self._ensure_open(kind)
        session = self._session  # not self: a client may be dropped before its futures are done
        return session.run(kind, lambda: call(session.transport))


def moved(name: str) -> None:
    """Warn that a method of RestClient is one of AdminClient now."""
    warnings.warn(
        f"RestClient.{name} has moved: use AdminClient().{name}", DeprecationWarning, stacklevel=3
    )
