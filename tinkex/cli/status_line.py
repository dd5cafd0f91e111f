"""The status line: shows on stderr what a command is waiting for.

On a terminal, the line is redrawn every second and erased before anything else is printed.
Elsewhere, lines are printed at doubling intervals, up to a minute.  The environment variable
``TINKEX_NO_STATUS`` disables both.

Each command owns a StatusLine, which owns the daemon thread "tinkex-status" while it is shown.
While that thread runs, only it writes to stderr; log records are passed to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import sys
import threading
import time
from typing import Iterator, Optional

import click

from tinkex._runtime.inbox import Inbox

#: Seconds without output before the first line.
FIRST_S = 1.5
_REDRAW_S = 1.0
_MAX_GAP_S = 60.0

#: Loggers whose records describe slow steps; the status line shows them.
_STEPS = (
    "tinkex._api.archives",
    "tinkex.local.engines.models",
    "tinkex._downloads",
    "tinkex._results.backoff",
    "tinkex._transport.attempts",
)

#: The request log, which ``--verbose`` shows.
_REQUESTS = "tinkex._transport.request_log"


class StatusLine:
    """A line that says what a command is waiting for.

    Args:
        doing: the text; may be assigned from any thread.  While it is empty, nothing is shown.
        first_s: seconds without output before the first line.
    """

    def __init__(self, doing: str, first_s: float) -> None:
        self.doing = doing
        self._first_s = first_s
        self._enabled = sys.stderr is not None and not os.environ.get("TINKEX_NO_STATUS")
        #: Whether the line is redrawn in place, on a terminal.
        self.live = self._enabled and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._began = time.monotonic()
        self._drawn = 0  # columns drawn on the terminal; used only by the thread
        # Lines to print; None ends the thread.  A queue instead of a lock, because a log record may
        # come from any thread, and from a finalizer, which must not block.
        self._inbox: Inbox[Optional[str]] = Inbox()
        self._thread: Optional[threading.Thread] = None

    def start(self) -> None:
        if not self._enabled:
            return
        thread = threading.Thread(target=self._run, name="tinkex-status", daemon=True)
        with contextlib.suppress(RuntimeError):  # no more threads: do without a status line
            thread.start()
            self._thread = thread

    def stop(self) -> None:
        """Erase the line, so that the next output starts on a clean line."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._inbox.put(None)
            thread.join()
        # Print the records queued behind the None, which the thread did not take.
        self._print_rest()

    def print(self, line: str) -> None:
        """Print *line* above the status line.  Thread-safe."""
        self._inbox.put(line)
        if self._thread is None:  # otherwise the thread, or `stop`, prints it
            self._print_rest()

    def _print_rest(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                line = self._inbox.get_nowait()
                if line is not None:
                    self._write(f"{line}\n")

    def _run(self) -> None:
        due = time.monotonic() + self._first_s
        gap_s = 2 * self._first_s
        while True:
            try:
                line = self._inbox.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                if self.doing:
                    self._draw()
                    due = time.monotonic() + (_REDRAW_S if self.live else gap_s)
                    gap_s = min(2 * gap_s, _MAX_GAP_S)
                else:  # the next text is a new wait: restart its clock and its intervals
                    self._erase()
                    self._began = time.monotonic()
                    due, gap_s = self._began + self._first_s, 2 * self._first_s
                continue
            self._erase()
            if line is None:
                return
            self._write(f"{line}\n")

    def _draw(self) -> None:
        doing, elapsed = self.doing.replace("\n", " "), f" ({time.monotonic() - self._began:.0f} s)"
        if not self.live:
            self._write(f"{doing}{elapsed}\n")
            return
        # Erase first, because the text may be shorter than before.
        self._erase()
        room = shutil.get_terminal_size().columns - len(elapsed) - 1  # a full line would wrap
        text = doing[: max(0, room)] + elapsed
        self._write(text)
        self._drawn = len(text)

    def _erase(self) -> None:
        if self._drawn:
            self._write(f"\r{' ' * self._drawn}\r")
            self._drawn = 0

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # stderr is closed or full
            sys.stderr.write(text)
            sys.stderr.flush()


class _LogToStatus(logging.Handler):
    """Prints warnings above the status line, and shows records of slow steps in it.

    If *verbose*, it also prints INFO records and each request.
    """

    def __init__(self, line: StatusLine, verbose: bool) -> None:
        super().__init__()
        self._line = line
        self._min_level = logging.INFO if verbose else logging.WARNING

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if record.levelno >= self._min_level or record.name == _REQUESTS:
                self._line.print(self.format(record))
            else:
                self._line.doing = _wait_of(record)
        except Exception:  # as in every handler: logging must not end the work that it describes
            self.handleError(record)


def _wait_of(record: logging.LogRecord) -> str:
    """Return what a command is waiting for, according to the record of a slow step."""
    server = getattr(record, "unreachable", None)
    if server is None:
        return record.getMessage()
    return f"waiting for the server at {server}; start it again, or press Ctrl-C"


@contextlib.contextmanager
def shown(doing: str, *, verbose: bool = False) -> Iterator[StatusLine]:
    """Show a status line and the library's log records during the block.

    If *verbose*, each request is printed, too.
    """
    line = StatusLine(doing, FIRST_S)
    handler = _LogToStatus(line, verbose)
    # The levels are restored at the end, for programs that run a command in their own process.
    logger = logging.getLogger("tinkex")
    levels = dict.fromkeys(_STEPS, logging.DEBUG)
    if verbose:
        levels.update({logger.name: logging.INFO, _REQUESTS: logging.DEBUG})
    before = {name: logging.getLogger(name).level for name in levels}
    logger.addHandler(handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    line.start()
    try:
        yield line
    finally:
        line.stop()
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        logger.removeHandler(handler)


def current() -> Optional[StatusLine]:
    """Return the running command's status line; None outside a command, and in other threads."""
    ctx = click.get_current_context(silent=True)
    return None if ctx is None else ctx.find_object(StatusLine)


def waiting_for(doing: str) -> None:
    """Set the text of the running command's status line."""
    line = current()
    if line is not None:
        line.doing = doing


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Hide the status line during the block, which prints something or asks a question."""
    line = current()
    # Without its thread, it is hidden already, e.g. by an outer block, or never shown.
    if line is None or line._thread is None:
        yield
        return
    line.stop()
    try:
        yield
    finally:
        line.start()
