"""Racing threads, and waiting for conditions."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, Callable, Iterator, List

from support.loopback import PATIENCE_S as PATIENCE_S

#: Code that waits for nothing takes less than this, in seconds, even on the busiest machine; a hang
#: takes PATIENCE_S.
PROMPT_S = 10.0


def race(*functions: Callable[[], Any]) -> List[Any]:
    """Call all *functions* concurrently, each in a thread; return their results or exceptions."""
    barrier = threading.Barrier(len(functions))
    outcomes: List[Any] = [None] * len(functions)

    def run(index: int, function: Callable[[], Any]) -> None:
        barrier.wait(PATIENCE_S)
        try:
            outcomes[index] = function()
        except BaseException as error:
            outcomes[index] = error

    threads = [
        threading.Thread(target=run, args=(index, function), daemon=True)
        for index, function in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a racing thread hangs"
    return outcomes


@contextlib.contextmanager
def promptly() -> Iterator[None]:
    """Fail if the block took so long that it must have waited for something.

    This works only if any wait would last far longer than PROMPT_S: have it last PATIENCE_S.
    """
    began = time.monotonic()
    yield
    took_s = time.monotonic() - began
    assert took_s < PROMPT_S, f"it took {took_s:.1f} s"


def wait_until(predicate: Callable[[], bool], what: str) -> None:
    """Wait until *predicate* holds; for conditions that no Event signals."""
    deadline = time.monotonic() + PATIENCE_S
    while not predicate():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what}"
        time.sleep(0.001)
