"""SessionServers: starts benchmarks/session_server.py and talks to it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Dict, List

SCRIPT = Path(__file__).with_name("session_server.py")


class SessionServers:
    """Session servers in a separate process, for the duration of a ``with`` block."""

    def __init__(self, *, hosts: int = 1, beat_s: float = 0.0, ttl_s: float = 60.0) -> None:
        command = [sys.executable, str(SCRIPT), "--hosts", str(hosts)]
        command += ["--beat-s", str(beat_s), "--ttl-s", str(ttl_s)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.urls: List[str] = json.loads(self._process.stdout.readline())

    def mode(self, url: str, **mode: Any) -> None:
        """Change how a host behaves; see session_server.py."""
        body = json.dumps(mode).encode()
        request = urllib.request.Request(f"{url}/mode", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=30).close()

    def facts(self, url: str) -> Dict[str, Any]:
        """Return what a host has seen."""
        with urllib.request.urlopen(f"{url}/facts", timeout=30) as answer:
            facts: Dict[str, Any] = json.load(answer)
            return facts

    def __enter__(self) -> SessionServers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()  # closes its input, which ends it
