"""Reading from and writing to the terminal, or the file or pipe in its place.  No threads.

Output never fails because the encoding lacks a character; a full disk or a closed pipe is reported
as one error, `WriteError`.  Reading blocks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from typing import Iterator, Optional, TextIO

import click

from tinkex.cli import status_line

#: Errors that may occur when writing to a file, a pipe or a terminal.
_WRITING = (errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EBADF)

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_CONTROL_IN_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


class WriteError(click.ClickException):
    """The output could not be written."""


class NoInputError(click.ClickException):
    """The input ended before the user replied."""


def escape_unencodable() -> None:
    """Write characters that the encoding of stdout or stderr lacks as backslash escapes.

    By default Python raises UnicodeEncodeError; on Windows, the encoding of a redirected stdout has
    only a few hundred characters.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def visible(text: str, *, one_line: bool = False) -> str:
    """Return *text* with control characters escaped: a server must not control the terminal.

    Tabs and newlines are kept unless *one_line* is true.
    """
    pattern = _CONTROL if one_line else _CONTROL_IN_TEXT
    return pattern.sub(lambda found: repr(found.group())[1:-1], text)


def echo(text: str) -> None:
    """Write *text* and a newline to stdout."""
    _write(sys.stdout, text)


def echo_error(text: str) -> None:
    """Write *text* and a newline to stderr; ignore a failure, which could not be reported."""
    try:
        _write(sys.stderr, visible(text))
    except OSError:
        discard(sys.stderr)


def _write(stream: Optional[TextIO], text: str) -> None:
    if stream is None:  # the process was started without it, e.g. by pythonw
        return
    with status_line.hidden():
        stream.write(f"{text}\n")
        stream.flush()  # so that a failure is raised here, where it can be reported


def flush_output() -> None:
    """Flush stdout.  Raises OSError."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def discard(stream: Optional[TextIO]) -> None:
    """Make *stream* discard its buffer, which the interpreter would fail to flush at exit."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not a file, or closed
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())  # type: ignore[union-attr]
        finally:
            os.close(null)


@contextlib.contextmanager
def write_errors() -> Iterator[None]:
    """Convert an OSError in the block to a WriteError of one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        if error.filename is not None:
            raise WriteError(f"{error.filename}: {reason}") from error
        if error.errno not in _WRITING:
            raise WriteError(reason) from error
        discard(sys.stdout)
        raise WriteError(f"cannot write the output: {reason}") from error


def read_input() -> str:
    """Return all of stdin; empty if the process was started without it."""
    with status_line.hidden():
        return "" if sys.stdin is None else sys.stdin.read()


def ask_secret(label: str) -> str:
    """Ask for a secret without showing it; from a pipe or a file, read one line.

    Raises:
        NoInputError: nothing was entered.
    """
    with status_line.hidden():
        if sys.stdin is not None and not sys.stdin.isatty():
            secret = sys.stdin.readline().strip()
        else:
            from getpass import getpass

            try:
                secret = getpass(f"{label}: ").strip()
            except EOFError:
                sys.stderr.write("\n")
                secret = ""
    if not secret:
        raise NoInputError(f"no {label} was given: type it, or pipe it to stdin")
    return secret


def confirm(question: str, otherwise: str) -> bool:
    """Ask a yes-or-no question on stderr; an empty reply means no.

    Raises:
        NoInputError: the input ended before a reply; *otherwise* explains the consequence.
    """
    with status_line.hidden():
        while True:
            sys.stderr.write(f"{question} [y/N]: ")
            sys.stderr.flush()
            line = sys.stdin.readline() if sys.stdin is not None else ""
            if not line:
                sys.stderr.write("\n")
                raise NoInputError(f"the input ended before a reply; {otherwise}")
            reply = line.strip().lower()
            if reply in ("y", "yes"):
                return True
            if reply in ("", "n", "no"):
                return False
            sys.stderr.write("Answer y or n.\n")
