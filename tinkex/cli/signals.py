"""What SIGINT and SIGTERM do to a command.

Main thread only, where Python runs signal handlers.
"""

from __future__ import annotations

import _thread
import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager
from types import FrameType
from typing import Iterator, Optional

#: Exit code after Ctrl-C.
INTERRUPTED = 130

_LATER_S = 0.01

#: Exit code of ``tinkex serve`` for each signal.
_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: 0}


class Ended(KeyboardInterrupt):
    """A signal has come; *code* is the exit code that goes with it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class EndSignals:
    """How ``tinkex serve`` ends: the first SIGINT or SIGTERM counts, whatever comes after it.

    They raise Ended, and after `hold`, they only end `wait`: a server that is being closed must not
    be disturbed by an exception from a second signal.
    """

    def __init__(self) -> None:
        self.code: Optional[int] = None
        self._holding = False
        # A byte per signal: on Windows, nothing but input interrupts a wait.
        self._read, self._written = socket.socketpair()
        self._written.setblocking(False)

    def hold(self) -> None:
        """Raise nothing from now on."""
        self._holding = True

    def wait(self) -> int:
        """Block until a signal has come; return the exit code."""
        while self.code is None:
            self._read.recv(64)
        return self.code

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if self.code is None:
            self.code = _CODES[signal.Signals(number)]
        if not self._holding:
            raise Ended(self.code)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals.

        If one has come, the process is ending: they are ignored from then on.
        """
        before = {number: signal.signal(number, self._handle) for number in _CODES}
        wakeup = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            for number, handler in before.items():
                # Not our handler: the interpreter takes that away before it ends.
                signal.signal(number, handler if self.code is None else signal.SIG_IGN)
            signal.set_wakeup_fd(wakeup)
            self._read.close()
            self._written.close()


def exit_at_interrupt() -> None:
    """Have Ctrl-C end the process without a traceback: all that is left is to exit."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))


def raise_lost_interrupts() -> None:
    """Raise a KeyboardInterrupt again if it is lost.

    Python ignores exceptions in a ``__del__`` or a callback of the garbage collector, and much of
    importing torch or transformers is spent in such; the command would just go on.
    """
    report = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            report(unraisable)
            return
        # A little later: raised in here, it would be lost again.
        again = threading.Timer(_LATER_S, _thread.interrupt_main)
        again.daemon = True
        again.name = "tinkex-interrupt"
        again.start()

    sys.unraisablehook = hook
