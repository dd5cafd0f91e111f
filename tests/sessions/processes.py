"""Scripts in their own processes, observed from the server's side."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import tinkex

#: A script that takes longer counts as hanging: on an idle machine all take about a second.
BOUND_S = 60.0

PRELUDE = """\
import gc, os, select, signal, sys, threading, warnings
from tinkex import ServiceClient, errors, types

# Python 3.12 warns of every fork of a process with threads.
warnings.filterwarnings("ignore", message=".*use of fork.*", category=DeprecationWarning)
PROMPT = types.ModelInput.from_ints([1, 2, 3])

def connect(**settings):
    settings = {"base_url": os.environ["SERVER"], "heartbeat_interval_s": 0.05, **settings}
    return ServiceClient(**settings)

def wait_for_ever(service):
    service.get_server_capabilities()  # tells the test that we are here
    threading.Event().wait()

def sample(sampler):
    return sampler.sample(PROMPT).result(50).sequences[0].tokens
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a script ended; *seconds* are from the signal, if one was sent, else from the start."""

    code: int
    out: str
    err: str
    seconds: float

    def assert_silent(self) -> None:
        """Check that stderr is empty, or holds only one traceback."""
        for sign in ("Warning", "ignored", "Fatal", "During handling", "Error in", "unclosed"):
            assert sign not in self.err, self.err
        assert self.err.count("Traceback") <= 1, self.err
        if "Traceback" not in self.err:
            assert self.err == ""


#: The scripts that have not been waited for.
running: List[Script] = []


class Script:
    """A running script that connects to *server_url*."""

    def __init__(self, folder: Path, body: str, server_url: str, **environment: str) -> None:
        self.path = folder / "script.py"
        self.path.write_text(PRELUDE + "\n" + textwrap.dedent(body))
        root = Path(tinkex.__file__).resolve().parents[1]
        environ: Dict[str, Any] = {k: v for k, v in os.environ.items() if "TINKER" not in k}
        environ.update(
            SERVER=server_url, PYTHONPATH=str(root), PYTHONWARNINGS="always::ResourceWarning"
        )
        environ.update(environment)
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, str(self.path)],
            stdin=subprocess.PIPE,  # closed by `wait`
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ,
            text=True,
            start_new_session=True,
        )
        running.append(self)

    def send(self, number: int) -> None:
        self._began = time.monotonic()
        self._process.send_signal(number)

    def kill(self) -> Tuple[str, str]:
        """Kill the script and its children, which also hold the pipes; return its output."""
        running.remove(self)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.communicate()

    def wait(self) -> Ended:
        try:
            out, err = self._process.communicate(timeout=BOUND_S)
        except subprocess.TimeoutExpired:
            out, err = self.kill()
            raise AssertionError(f"the script hangs\n{out}\n{err}") from None
        running.remove(self)
        return Ended(self._process.returncode, out, err, time.monotonic() - self._began)


def line_of(script: Script, text: str) -> int:
    """Return the number of the script's line that contains *text*."""
    lines: List[str] = script.path.read_text().splitlines()
    (found,) = [number for number, line in enumerate(lines, 1) if re.search(text, line)]
    return found


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
