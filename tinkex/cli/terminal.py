"""Writing to the terminal, or to the file or pipe in its place.  No threads.

Output never fails because of a character that the encoding lacks; a full disk or a closed pipe is
one error, `WriteError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from typing import Iterator, Optional, TextIO

import click

from tinkex.cli import status

#: What writing to a file, a pipe or a terminal fails with.
_WRITING = (errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EBADF)

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_CONTROL_IN_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


class WriteError(click.ClickException):
    """The output could not be written."""


def escape_unencodable() -> None:
    """Write characters that the encoding of stdout or stderr lacks as backslash escapes.

    By default Python raises UnicodeEncodeError; on Windows, a redirected stdout takes a few hundred
    characters only.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def visible(text: str, *, one_line: bool = False) -> str:
    """Return *text* with control characters escaped: a server must not control the terminal.

    Tabs and newlines stay, unless it is to be *one_line*.
    """
    pattern = _CONTROL if one_line else _CONTROL_IN_TEXT
    return pattern.sub(lambda found: repr(found.group())[1:-1], text)


def echo(text: str) -> None:
    """Write *text* and a newline to stdout."""
    _write(sys.stdout, text)


def echo_error(text: str) -> None:
    """Write *text* and a newline to stderr; if that fails, there is nowhere left to report it."""
    try:
        _write(sys.stderr, visible(text))
    except OSError:
        discard(sys.stderr)


def _write(stream: Optional[TextIO], text: str) -> None:
    if stream is None:  # the process was started without it
        return
    with status.hidden():
        stream.write(f"{text}\n")
        stream.flush()


def flush_output() -> None:
    """Write what is still in the buffer of stdout.  Raises OSError."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def discard(stream: Optional[TextIO]) -> None:
    """Drop what *stream* could not write; the interpreter would try again, and fail, at exit."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not a file, or closed
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())  # type: ignore[union-attr]
        finally:
            os.close(null)


@contextlib.contextmanager
def write_errors() -> Iterator[None]:
    """Turn an OSError of the block into a WriteError, in one line."""
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
