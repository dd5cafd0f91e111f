"""What commands read: questions to the user, and stdin.  All of it blocks; no threads."""

from __future__ import annotations

import sys

import click

from tinkex.cli import status


class NoInputError(click.ClickException):
    """The input ended before it held an answer."""


def read_input() -> str:
    """Return all of stdin; empty if the process was started without it."""
    with status.hidden():
        return "" if sys.stdin is None else sys.stdin.read()


def ask_secret(label: str) -> str:
    """Ask for a secret without showing it; from a pipe or a file, read one line.

    Raises:
        NoInputError: there is none.
    """
    with status.hidden():
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
        raise NoInputError(f"no {label} was given: type it, or send it through a pipe")
    return secret


def confirm(question: str, otherwise: str) -> bool:
    """Ask a yes-or-no question on stderr; an empty answer is no.

    Raises:
        NoInputError: the input ended before an answer; *otherwise* says what that means.
    """
    with status.hidden():
        while True:
            sys.stderr.write(f"{question} [y/N]: ")
            sys.stderr.flush()
            line = sys.stdin.readline() if sys.stdin is not None else ""
            if not line:
                sys.stderr.write("\n")
                raise NoInputError(f"the input ended before an answer; {otherwise}")
            answer = line.strip().lower()
            if answer in ("y", "yes"):
                return True
            if answer in ("", "n", "no"):
                return False
            sys.stderr.write("Answer y or n.\n")
