"""Which fault strikes which request: routes, call numbers, and releasing held requests."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import TYPE_CHECKING, Callable, List, Optional

from tinkex.testing.journal import ReceivedRequest, route_pattern

if TYPE_CHECKING:
    from tinkex.testing.exchange import Exchange, Reply

#: Takes the exchange of one request and returns the reply; None closes the connection.
Fault = Callable[["Exchange"], Optional["Reply"]]


class ServerStopped(Exception):
    """The server is stopping while it holds a request."""


class Script:
    """The injections of one server, and the condition that wakes held requests.  Thread-safe."""

    def __init__(self) -> None:
        # Guards everything below and all injections; notified when one of them changes.
        self.changed = threading.Condition()
        self._injections: List[Injection] = []
        self._stops = 0  # how often the server has stopped

    def add(self, route: str, fault: Fault, call: int, times: Optional[int]) -> Injection:
        """Add an injection; see `FakeServer.inject`."""
        injection = Injection(self, route, fault, call, times)
        with self.changed:
            self._injections.append(injection)
        return injection

    def find(self, request: ReceivedRequest) -> Optional[Injection]:
        """Count *request*; return the first injection that strikes it, or None."""
        found: Optional[Injection] = None
        with self.changed:
            # Every injection counts the request, even those after the one that strikes.
            for injection in self._injections:
                if injection.counts_locked(request) and found is None:
                    found = injection
            if found is not None:
                found.struck.append(request)
                self.changed.notify_all()
        return found

    def remove(self, injection: Injection) -> None:
        """Stop *injection* from striking, and release the requests that it holds."""
        with self.changed:
            if injection in self._injections:
                self._injections.remove(injection)
        injection.release()

    def stop(self) -> None:
        """Drop all held requests: the server is about to stop."""
        with self.changed:
            self._stops += 1
            self.changed.notify_all()

    @property
    def stops(self) -> int:
        """How often the server has stopped."""
        with self.changed:
            return self._stops

    def wait(self, injection: Injection, seconds: Optional[float], stops: int) -> None:
        """Wait until *injection* is released, for at most *seconds*.

        Raises:
            ServerStopped: the server has stopped more than *stops* times, perhaps during the wait.
        """
        # A count of stops rather than a flag: after a restart, requests to the new server may be
        # held while those to the old one must end.
        with self.changed:
            self.changed.wait_for(lambda: injection.is_released or self._stops > stops, seconds)
            if self._stops > stops:
                raise ServerStopped


@dataclasses.dataclass
class Injection:
    """A fault injected into a `FakeServer`, as returned by `FakeServer.inject`.  Thread-safe.

    Attributes:
        route, fault, call, times: as given to `FakeServer.inject`.
        struck: the requests struck so far.
    """

    _script: Script = dataclasses.field(repr=False)
    route: str
    fault: Fault
    call: int = 1
    times: Optional[int] = 1
    struck: List[ReceivedRequest] = dataclasses.field(default_factory=list, repr=False)
    is_released: bool = dataclasses.field(default=False, repr=False)
    _seen: int = dataclasses.field(default=0, repr=False)

    def __post_init__(self) -> None:
        self._pattern = route_pattern(self.route)

    def wait(self, timeout_s: float = 10.0) -> ReceivedRequest:
        """Block until the fault has struck, and return the first request that it struck.

        Raises:
            TimeoutError: the fault has not struck within *timeout_s*.
        """
        deadline = time.monotonic() + timeout_s
        with self._script.changed:
            if not self._script.changed.wait_for(
                lambda: self.struck, max(0.0, deadline - time.monotonic())
            ):
                raise TimeoutError(
                    f"{self.fault!r} was not applied within {timeout_s:g} s: call {self.call} of "
                    f"{self.route!r} has not arrived; {self._seen} have"
                )
            return self.struck[0]

    def release(self) -> None:
        """Release the requests that the fault holds; from now on it holds none."""
        with self._script.changed:
            self.is_released = True
            self._script.changed.notify_all()

    def remove(self) -> None:
        """End the fault: it strikes no more, and the requests that it holds are released."""
        self._script.remove(self)

    def counts_locked(self, request: ReceivedRequest) -> bool:
        """Count *request* if the route fits; return whether to strike it (for the script)."""
        if not request.matches(self._pattern):
            return False
        self._seen += 1
        return self._seen >= self.call and (
            self.times is None or self._seen < self.call + self.times
        )
