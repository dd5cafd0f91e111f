"""Handling of SIGINT and SIGTERM.

For the main thread, where Python runs signal handlers.
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
from typing import Iterator, List, Optional

#: Exit code after Ctrl-C.
INTERRUPTED = 130

#: Delay before a lost interrupt is raised again, in seconds.
_LATER_S = 0.01

#: Exit code of ``tinkex serve`` for each signal.
_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: 0}


class Ended(KeyboardInterrupt):
    """A signal arrived; *code* is the exit code for it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class EndSignals:
    """Ends ``tinkex serve``: the first SIGINT or SIGTERM sets the exit code.

    Signals raise Ended.  After `hold`, a signal only ends `wait`, so that it cannot interrupt the
    server while it closes.
    """

    def __init__(self) -> None:
        self.code: Optional[int] = None
        self._holding = False
        # Receives one byte per signal, because on Windows only input can interrupt a wait.
        self._read, self._written = socket.socketpair()
        self._written.setblocking(False)

    def hold(self) -> None:
        """From now on, don't raise Ended."""
        self._holding = True

    def wait(self) -> int:
        """Block until a signal arrives; return the exit code."""
        # Python writes a byte when a signal arrives, and runs `_handle` once recv has returned.  A
        # signal that arrived before this call has left its byte in the socket, so none is missed.
        while self.code is None:
            self._read.recv(64)
        return self.code

    def _handle(self, signum: int, frame: Optional[FrameType]) -> None:
        if self.code is None:
            self.code = _CODES[signal.Signals(signum)]
        if not self._holding:
            raise Ended(self.code)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals in the block; if one has arrived, ignore all of them afterwards."""
        before = {signum: signal.signal(signum, self._handle) for signum in _CODES}
        wakeup = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            for signum, handler in before.items():
                # SIG_IGN, because the interpreter removes Python handlers before it exits.
                signal.signal(signum, handler if self.code is None else signal.SIG_IGN)
            signal.set_wakeup_fd(wakeup)
            self._read.close()
            self._written.close()


def is_interrupt(error: BaseException) -> bool:
    """Whether a KeyboardInterrupt caused *error*: some libraries convert it."""
    seen: List[BaseException] = []  # causes and contexts can form a cycle
    found: Optional[BaseException] = error
    while found is not None and found not in seen:
        if isinstance(found, KeyboardInterrupt):
            return True
        seen.append(found)
        found = found.__cause__ or found.__context__
    return False


def exit_at_interrupt() -> None:
    """Make Ctrl-C end the process without a traceback while it exits."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # os._exit, because the interpreter prints and ignores an exception raised while it exits.
        signal.signal(signal.SIGINT, lambda signum, frame: os._exit(INTERRUPTED))


def raise_lost_interrupts() -> None:
    """Have every KeyboardInterrupt that Python ignores raised again.

    Python ignores exceptions in ``__del__`` and in callbacks of the garbage collector.  Imports of
    torch or transformers spend much of their time there, so Ctrl-C might not stop the command.
    """
    report = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            report(unraisable)
            return
        # Raised after a delay, because in this hook it would be lost again.
        again = threading.Timer(_LATER_S, _thread.interrupt_main)
        again.daemon = True
        again.name = "tinkex-interrupt"
        again.start()

    sys.unraisablehook = hook
