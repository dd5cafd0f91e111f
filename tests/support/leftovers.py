"""Threads and sockets of this process that outlive what they were made for."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from typing import List, NamedTuple


class Leftovers(NamedTuple):
    """Threads of the library, and sockets, of this process."""

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
        """Wait at most *grace_s* until there are no more than these; return what stays."""
        deadline = time.monotonic() + grace_s
        now = Leftovers.now()
        while (now.threads > self.threads or now.sockets > self.sockets) and (
            time.monotonic() < deadline
        ):
            gc.collect()  # clients that only a cycle keeps
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
