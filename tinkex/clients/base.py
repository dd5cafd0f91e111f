"""Base classes of the clients.  Clients share a Runtime, which only one of them owns."""

from __future__ import annotations

import functools
from datetime import datetime
from typing import TYPE_CHECKING, Any, Callable, Coroutine, Generator, Optional, TypeVar, Union

from tinkex._runtime.awaiting import itself
from tinkex._sessions.runtime import Runtime
from tinkex._transport.transport import Transport
from tinkex.config import Config, check_config
from tinkex.errors import ClientClosedError, InvalidInputError
from tinkex.futures import APIFuture

if TYPE_CHECKING:
    from tinkex._sessions.telemetry import Reporter

C = TypeVar("C", bound="BaseClient")
T = TypeVar("T")

#: An instant: a datetime, or a string in RFC 3339; UTC if it has no time zone.
Instant = Union[datetime, str]


class BaseClient:
    """A client that works through a runtime.

    Methods that create clients block and return the client itself.  Scripts that expect a future
    there, as in the official SDK, can call the client's ``result()``, which returns the client.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._closed = False

    def result(self: C, timeout: Optional[float] = None) -> C:
        """Return this client itself without blocking; *timeout* has no effect."""
        return self

    def result_async(self: C, timeout: Optional[float] = None) -> Coroutine[Any, Any, C]:
        """Return a coroutine that returns this client immediately; *timeout* has no effect."""
        return itself(self)

    def coroutine(self: C) -> Coroutine[Any, Any, C]:
        """Return a coroutine that returns this client immediately."""
        return itself(self)

    def __await__(self: C) -> Generator[Any, None, C]:
        """``await service.create_...(...)`` gives the client, as in the official SDK."""
        return itself(self).__await__()

    def get_telemetry(self) -> Optional[Reporter]:
        """Return the reporter of failures, or None if telemetry is off (the default)."""
        return self._runtime.telemetry

    def close(self) -> None:
        """Refuse further work through this client.  Idempotent; does not block.

        The session, other clients, and work already submitted are not affected.
        """
        self._closed = True

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ensure_open(self, what: str) -> None:
        """Raise ClientClosedError, naming *what* was called, if client or runtime is closed."""
        self._runtime.ensure_open(what)
        if self._closed:
            raise ClientClosedError(
                f"{what}: {self!r} was closed", session_id=self._runtime.session_id
            )


class LookupClient(BaseClient):
    """A client that queries and manages objects on the server, but neither trains nor samples.

    Args:
        session: the runtime of the ServiceClient that creates this client.
        base_url, api_key: the server's address and your key; by default ``TINKER_BASE_URL`` and
            ``TINKER_API_KEY``.
        config: all settings at once, instead of the keywords.
        settings: any other setting of `Config`.

    A client created on its own opens no session and sends nothing before the first call.  Use it as
    a context manager, or close it, to end its threads.
    """

    def __init__(
        self,
        session: Optional[Runtime] = None,
        *,
        config: Optional[Config] = None,
        **settings: Any,
    ) -> None:
        given = any(value is not None for value in settings.values())
        if sum((session is not None, config is not None, given)) > 1:
            raise InvalidInputError("give a session, or config, or single settings")
        if session is not None and not isinstance(session, Runtime):
            raise InvalidInputError(
                f"the first argument of {type(self).__name__} is {session!r:.200}, not a session",
                hint="The server's address is given by name: base_url=...",
            )
        self._owns_runtime = session is None
        if session is None:
            config = Config.resolve(**settings) if config is None else check_config(config)
            settings.clear()  # the key: some tools show the locals of a traceback
            session = Runtime(config)
        super().__init__(session)

    @property
    def config(self) -> Config:
        """The settings in force."""
        return self._runtime.config

    @property
    def transport(self) -> Transport:
        """The transport that sends requests; for the library's own modules."""
        return self._runtime.transport

    def close(self) -> None:
        """Refuse further work.  Idempotent.

        A client created on its own also settles outstanding futures with ClientClosedError and ends
        its threads, which takes a moment.  For a client of a ServiceClient, the session and work
        already submitted are not affected.
        """
        super().close()
        if self._owns_runtime:
            self._runtime.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed or self._runtime.closed else "open"
        return f"<{type(self).__name__} at {self.config.base_url}, {state}>"

    def _run(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> APIFuture[T]:
        """Run ``call(transport, *args, **kwargs)`` in a background thread; return its future.

        *call* must not refer to this client: the caller may drop it before its futures are done.
        """
        kind = call.__name__
        self._ensure_open(kind)
        bound = functools.partial(call, self._runtime.transport, *args, **kwargs)
        return self._runtime.run(kind, bound)
