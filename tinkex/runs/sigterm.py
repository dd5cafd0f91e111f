"""Sigterm: SIGTERM lets a run finish its step and save, before the program exits."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType
from typing import Any, Iterator, Optional

from tinkex.errors import InvalidInputError

#: What a shell reports for a program that SIGTERM has ended.
EXIT_CODE = 128 + signal.SIGTERM


class Sigterm:
    """Handles SIGTERM from `install` to `uninstall`.

    The first one raises SystemExit with *EXIT_CODE*: at the end of `held`, or immediately if it
    comes outside.  The second one raises it immediately; later ones do nothing more.

    Attributes:
        requested: whether it has come.
        is_forced: whether it has come twice: nothing may be waited for any more.
    """

    def __init__(self) -> None:
        self.requested = self.is_forced = False
        self._held = False
        self._before: Any = None

    def install(self) -> None:
        """Handle it from now on.

        Raises:
            InvalidInputError: this is not the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise InvalidInputError(
                "exit_on_sigterm works in the main thread only, because Python handles signals "
                "there"
            )
        self._before = signal.signal(signal.SIGTERM, self._handle)

    def uninstall(self) -> None:
        """Restore the handler that was there before, unless it was replaced meanwhile."""
        # Not `is`: each access to the method makes a new object.
        if signal.getsignal(signal.SIGTERM) == self._handle:
            # None stands for a handler that was not installed from Python, and cannot be restored
            # from it.
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """In the block it only sets *requested*; afterwards the program exits."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        # Not in the `finally`: an exception of the block takes precedence.
        if self.requested:
            raise SystemExit(EXIT_CODE)

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Within `held`: in this block SIGTERM exits immediately, since there is nothing to save.

        Raises:
            SystemExit: SIGTERM has come, or comes in the block.
        """
        held, self._held = self._held, False
        if self.requested:
            raise SystemExit(EXIT_CODE)
        try:
            yield
        finally:
            self._held = held

    def _handle(self, signum: int, frame: Optional[FrameType]) -> None:
        if self.is_forced and not self._held:
            return  # the program is on its way out; another SystemExit would only disturb that
        # In the main thread between two bytecodes, so no lock: Python runs handlers nowhere else.
        self.requested, self.is_forced = True, self.requested
        if self.is_forced or not self._held:
            raise SystemExit(EXIT_CODE)
