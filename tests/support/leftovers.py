"""Leaked threads and sockets of this process."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from typing import List, NamedTuple


class Leftovers(NamedTuple):
    """How many of the library's threads, and how many sockets, this process has."""

    threads: int
    sockets: int

    @classmethod
    def now(cls) -> Leftovers:
        """Count them."""
        sockets = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                sockets += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        return cls(len(_thread_names()), sockets)

    def new(self, grace_s: float) -> List[str]:
        """Wait up to *grace_s* for the counts to fall to these; describe any excess left."""
        deadline = time.monotonic() + grace_s
        now = Leftovers.now()
        while (now.threads > self.threads or now.sockets > self.sockets) and (
            time.monotonic() < deadline
        ):
            gc.collect()  # clients that only a reference cycle keeps alive
            time.sleep(0.02)
            now = Leftovers.now()
        wrong = []
        if now.threads > self.threads:
            wrong.append(f"threads left: {_thread_names()}")
        if now.sockets > self.sockets:
            wrong.append(f"{now.sockets - self.sockets} sockets left")
        return wrong


def _thread_names() -> List[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("tinkex-")]
