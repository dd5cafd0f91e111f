"""The credential command: the user's program that prints a key or a token.

It runs in a shell, and the thread that needs a credential waits for it.  The command and its output
are secrets: command lines often hold passwords.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

from tinkex.config import check_header
from tinkex.credentials import COMMAND_VARIABLE, KEY_VARIABLE
from tinkex.errors import ClientClosedError, ConfigError, CredentialError

#: What messages call it.
COMMAND = f"the credential command (${COMMAND_VARIABLE})"

#: The credential command may take this long, in seconds.
COMMAND_TIMEOUT_S = 60.0


def run_command(command: str, closing: threading.Event) -> str:
    """Run the credential *command* in the shell and return what it prints, stripped.

    Neither the command nor its output is ever shown, only its exit code.

    Raises:
        CredentialError: the command cannot be run, fails, takes over 60 s, or prints nothing
            usable.
        ClientClosedError: *closing* was set while the command ran.
    """
    try:
        # In a process group of its own, so that `_kill` also ends what the shell has started, and
        # Ctrl-C at the terminal does not reach it.  Its stderr is dropped: it may repeat secrets.
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=sys.platform != "win32",
        )
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: at exit
        # Without the cause, whose text holds the command.
        raise CredentialError(f"{COMMAND} cannot be run: {type(error).__name__}") from None
    with process:
        try:
            output = _read_output(process, closing)
        except BaseException:
            _kill(process)
            raise
    if process.returncode != 0:
        raise CredentialError(
            f"{COMMAND} failed with exit code {process.returncode}",
            hint="Run it by hand to see what it prints.",
        )
    text = output.decode("utf-8", "replace").strip()
    if not text:
        raise CredentialError(
            f"{COMMAND} printed nothing; its exit code was 0",
            hint=f"Make it print a key or a token on stdout, or set {KEY_VARIABLE} instead.",
        )
    try:
        check_header("what it printed", text)
    except ConfigError:
        raise CredentialError(f"{COMMAND} printed something that is not a key or token") from None
    return text


def _read_output(process: subprocess.Popen[bytes], closing: threading.Event) -> bytes:
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while True:
        # In slices, because nothing wakes `communicate` when the client is closed.
        try:
            return process.communicate(timeout=0.1)[0]
        except subprocess.TimeoutExpired:
            pass
        if closing.is_set():
            raise ClientClosedError("the client was closed while the credential command ran")
        if time.monotonic() > deadline:
            raise CredentialError(f"{COMMAND} took longer than {COMMAND_TIMEOUT_S:g} s")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has already ended
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
