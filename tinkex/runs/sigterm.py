"""Sigterm: after SIGTERM, a run finishes its step and saves before the program exits."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType
from typing import Any, Iterator, Optional

from tinkex.errors import InvalidInputError

#: The exit code that a shell reports for a program ended by SIGTERM.
EXIT_CODE = 128 + signal.SIGTERM


class Sigterm:
    """Handles SIGTERM from `install` to `uninstall`.

    The first SIGTERM raises SystemExit with *EXIT_CODE*: at the end of a `held` block, or
    immediately if it arrives outside one.  A second one raises it immediately; later ones are
    ignored outside `held`.

    Attributes:
        requested: whether SIGTERM has arrived.
        is_forced: whether it has arrived twice; then nothing may be waited for any more.
    """

    def __init__(self) -> None:
        self.requested = self.is_forced = False
        self._held = False
        self._before: Any = None

    def install(self) -> None:
        """Handle SIGTERM from now on.

        Raises:
            InvalidInputError: called outside the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise InvalidInputError(
                "exit_on_sigterm works in the main thread only, because Python handles signals "
                "there"
            )
        self._before = signal.signal(signal.SIGTERM, self._handle)

    def uninstall(self) -> None:
        """Restore the previous handler, unless the program has installed another one since."""
        # Not `is`: each access to the method creates a new object.
        if signal.getsignal(signal.SIGTERM) == self._handle:
            # None stands for a handler that was not installed from Python, which Python cannot
            # restore.
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """In the block, a first SIGTERM only sets *requested*; the program exits at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        # Not in the `finally`, so that an exception from the block takes precedence.
        if self.requested:
            raise SystemExit(EXIT_CODE)

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Within `held`, let SIGTERM exit immediately in this block: there is nothing to save.

        Raises:
            SystemExit: SIGTERM has arrived, or arrives in the block.
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
            return  # the program is exiting already; another SystemExit would only disturb that
        # No lock: Python runs signal handlers only in the main thread, between two bytecodes.
        self.requested, self.is_forced = True, self.requested
        if self.is_forced or not self._held:
            raise SystemExit(EXIT_CODE)
