"""SigtermExit: SIGTERM lets a run finish its step and save, before the program exits."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Optional

from tinkex.errors import InvalidInputError

#: What a shell reports for a program that SIGTERM has ended.
EXIT_CODE = 128 + signal.SIGTERM


class SigtermExit:
    """Handles SIGTERM until `uninstall`.  Main thread only, where Python runs signal handlers.

    The first SIGTERM sets *requested* if a step is being done, which the run looks at after it.
    The second one, or one at another time, raises SystemExit with *EXIT_CODE*.

    Attributes:
        in_step: whether to wait for the end of a step.
        requested: whether the program is to exit after it.
        is_hurried: whether it is not to wait for anything any more.

    Raises:
        InvalidInputError: this is not the main thread.
    """

    def __init__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise InvalidInputError(
                "exit_on_sigterm works in the main thread only, because Python handles signals "
                "there"
            )
        self.in_step = self.requested = self.is_hurried = False
        self._before: Any = signal.signal(signal.SIGTERM, self._handle)

    def uninstall(self) -> None:
        """Restore the handler that was there before, unless it was replaced meanwhile."""
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _handle(self, signum: int, frame: Optional[FrameType]) -> None:
        self.requested, self.is_hurried = True, self.requested
        if self.is_hurried or not self.in_step:
            raise SystemExit(EXIT_CODE)
