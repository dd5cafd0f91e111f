"""ChildClient: what the clients made from a ServiceClient have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Optional, Protocol, TypeVar

from tinkex._sessions.session import Session
from tinkex.errors import ClientClosedError

if TYPE_CHECKING:
    from tinkex._sessions.telemetry import Reporter


class Owner(Protocol):
    """What a client works in: a Session, or a Connection that has none."""

    @property
    def session_id(self) -> Optional[str]:
        """The server's id of the session, for errors."""

    def ensure_open(self, what: str) -> None:
        """Raise ClientClosedError, naming *what* was asked, unless it is usable here."""


C = TypeVar("C", bound="BaseClient[Any]")
OwnerT = TypeVar("OwnerT", bound=Owner)


class WithoutCoroutines:
    """Says what to call instead of the ``*_async`` methods of the official SDK."""

    if not TYPE_CHECKING:  # a checker would take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            told = f"{type(self).__name__!r} object has no attribute {name!r}"
            twin = name[: -len("_async")]
            if name.endswith("_async") and hasattr(type(self), twin):
                told += f"; there are no coroutines in tinkex: call {twin}()"
            raise AttributeError(told)


class BaseClient(WithoutCoroutines, Generic[OwnerT]):
    """A client that works in something that it need not own.

    It is also its own result: creators block and return clients, and ``result()`` on them lets
    scripts for the official SDK's future-returning style run unchanged.
    """

    def __init__(self, session: OwnerT) -> None:
        self._session = session
        self._closed = False

    def result(self: C, timeout: Optional[float] = None) -> C:
        """Return this client itself, at once; *timeout* has no effect."""
        return self

    def close(self) -> None:
        """Refuse further work through this client.  Idempotent; does not block.

        The session, other clients, and work already submitted go on.
        """
        self._closed = True

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ensure_open(self, what: str) -> None:
        """Raise ClientClosedError, naming *what* was asked, if it or its session is closed."""
        self._session.ensure_open(what)
        if self._closed:
            raise ClientClosedError(
                f"{what}: {self!r} was closed", session_id=self._session.session_id
            )


class ChildClient(BaseClient[Session]):
    """A client that works in a session it does not own.

    Attributes:
        usage_tag: what the client asks for from now on is put down to it, in
            `ServiceClient.usage`.
    """

    usage_tag: Optional[str] = None

    def get_telemetry(self) -> Optional[Reporter]:
        """What reports on the session, or None if telemetry is off (the default)."""
        return self._session.telemetry
