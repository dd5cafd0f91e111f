"""SingleFlight: many threads need the same result; one computes it and the others wait."""

from __future__ import annotations

import copy
import threading
from typing import Callable, Generic, Optional, TypeVar

from tinkex.errors import ClientClosedError

T = TypeVar("T")

# How often, in seconds, a waiting thread checks whether its own client was closed: a thread cannot
# wait for two Events, and the leader may belong to another client.
_CHECK_EVERY_S = 0.1


class _Flight(Generic[T]):
    """One run of the work; *value* and *error* are written before *landed* is set, never after."""

    def __init__(self) -> None:
        self.landed = threading.Event()
        self.value: Optional[T] = None
        self.error: Optional[Exception] = None
        self.abandoned = False


class SingleFlight(Generic[T]):
    """Lets at most one thread at a time do a piece of work.  Thread-safe.

    Threads that call in the meantime get the leader's value, or a copy of its error.  If the leader
    is interrupted, or its own client is closed, one of the other threads leads instead.
    """

    def __init__(self) -> None:
        # Guards _flight.  Never held while the work is done.
        self._lock = threading.Lock()
        self._flight: Optional[_Flight[T]] = None

    @property
    def busy(self) -> bool:
        """True while a thread is doing the work."""
        with self._lock:
            return self._flight is not None and not self._flight.landed.is_set()

    def run(self, work: Callable[[], T], closing: threading.Event) -> T:
        """Return the result of *work*, done by this thread or by one that is already doing it.

        Blocks.  Raises what *work* raises, or ClientClosedError if *closing* is set while it waits
        for another thread.
        """
        while True:
            with self._lock:
                flight = self._flight
                # A flight that has landed cannot be shared: its result may be stale.
                if flight is None or flight.landed.is_set():
                    mine = self._flight = _Flight()
                    break
            while not flight.landed.wait(_CHECK_EVERY_S):
                if closing.is_set():
                    raise ClientClosedError("the client was closed while it waited for the server")
            if flight.error is not None:
                # A copy for each thread: raising adds to an error's traceback.
                raise copy.copy(flight.error) from flight.error
            if not flight.abandoned:
                return flight.value  # type: ignore[return-value]  # a T once it has landed
        return self._lead(mine, work)

    def _lead(self, flight: _Flight[T], work: Callable[[], T]) -> T:
        flight.abandoned = True  # until there is an outcome; stays True after Ctrl-C
        try:
            value = flight.value = work()
            flight.abandoned = False
            return value
        except ClientClosedError:  # concerns only this client: another client's thread leads next
            raise
        except Exception as error:
            flight.error = error
            raise
        finally:
            # A new caller that still finds this flight sees that it has landed, and leads another.
            flight.landed.set()
            with self._lock:
                if self._flight is flight:  # keeping an error would keep its frames alive
                    self._flight = None
