"""Fifty sessions opening and closing at random, for minutes, on a server that misbehaves.

    python benchmarks/soak.py [--minutes 10] [--sessions 50]

The server (a separate process) answers 404, 410, 401, 429, 500 and 503, hangs, resets connections,
goes down completely for a while, and comes back.  Afterwards there must be no live session on
either side, no leaked thread or socket, and hardly more memory in use than after the first fifth.
Otherwise it exits with 1.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import sys
import threading
import time
import warnings
from typing import Any, Dict, List, Optional

from harness import SessionServers

from tinkex import ServiceClient, TinkexError
from tinkex._sessions.manager import default_manager

INTERVAL_S = 1.0
TTL_S = 5.0
#: How much more memory may be in use at the end than after the first fifth, in MB.
SLACK_MB = 12.0


class Slot:
    """One session at a time: it opens, lives for a while, and ends one way or another."""

    def __init__(self, url: str, tally: Dict[str, int]) -> None:
        self._url = url
        self._tally = tally
        self._service: Optional[ServiceClient] = None
        self._until = 0.0

    def step(self) -> None:
        """Do the next action, if it is due."""
        if time.monotonic() < self._until:
            return
        self._until = time.monotonic() + random.expovariate(1 / 8.0)
        try:
            self._open() if self._service is None else self._end(self._service)
        except TinkexError as error:
            self._count(type(error).__name__)

    def end(self) -> None:
        """Close the session, if one is open."""
        if self._service is not None:
            self._service.close()

    def _open(self) -> None:
        self._service = ServiceClient(
            base_url=self._url,
            heartbeat_interval_s=INTERVAL_S,
            startup_timeout_s=2.0,
            max_outage_s=1.0,
        )
        self._count("opened")

    def _end(self, service: ServiceClient) -> None:
        how = random.random()
        if how < 0.3:
            service.get_server_capabilities()
            self._count("worked")
            return
        self._service = None
        if how < 0.8:
            service.close(random.choice(["success", "errored"]), timeout_s=2.0)
            self._count("closed")
        else:
            self._count("dropped")

    def _count(self, what: str) -> None:
        self._tally[what] = self._tally.get(what, 0) + 1  # not exact across threads


def drive(slots: List[Slot], stop: threading.Event) -> None:
    """Step the slots of one thread until told to stop."""
    while not stop.wait(0.02):
        for slot in slots:
            slot.step()


def measure() -> Dict[str, float]:
    """Return the resources that this process holds."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    sockets = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            sockets += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except OSError:
            continue  # the descriptor of the listing itself
    return {
        "MB": resident / 1e6,
        "threads": threading.active_count(),
        "sockets": sockets,
        "sessions": len(default_manager().snapshot()),
    }


def misrule(servers: SessionServers, number: int) -> str:
    """Change how the servers behave; return a word for that."""
    down = number % 4 == 3
    hung = number % 6 == 5
    for index, url in enumerate(servers.urls):
        servers.mode(url, chaos=0.15, down=down, hang=hung and index == 0, hang_s=12.0)
    return "down" if down else "one hangs" if hung else "mad"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--sessions", type=int, default=50)
    args = parser.parse_args()
    warnings.simplefilter("ignore", ResourceWarning)  # some sessions are dropped on purpose
    logging.basicConfig(level=logging.CRITICAL)
    tally: Dict[str, int] = {}
    stop = threading.Event()
    with SessionServers(hosts=3, ttl_s=TTL_S) as servers:
        before = measure()
        slots = [Slot(random.choice(servers.urls), tally) for _ in range(args.sessions)]
        # One thread per slot, so that a hung one holds up no other.
        threads = [threading.Thread(target=drive, args=([slot], stop)) for slot in slots]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        warm: Dict[str, float] = {}
        rounds = 20
        for number in range(rounds):
            mood = misrule(servers, number)
            time.sleep(args.minutes * 60 / rounds)
            now = measure()
            if number == rounds // 5:
                warm = now
            print_row(f"{time.monotonic() - began:4.0f} s {mood}", now)
        for url in servers.urls:
            servers.mode(url, chaos=0.0, down=False, hang=False)
        stop.set()
        for thread in threads:
            thread.join()
        for slot in slots:
            slot.end()
        slots.clear()
        settle()
        after = measure()
        time.sleep(TTL_S + 1)  # sessions whose end was lost on the way expire
        facts = [servers.facts(url) for url in servers.urls]
    print_row("after", after)
    totals = {key: sum(f[key] for f in facts) for key in ("created", "finished", "expired", "live")}
    print("clients:", dict(sorted(tally.items())))
    print("servers:", totals)
    wrong = judge(before, warm, after, totals)
    for text in wrong:
        print("WRONG:", text)
    return 1 if wrong else 0


def settle() -> None:
    """Wait for dropped clients to be collected and for threads to end."""
    deadline = time.monotonic() + 35  # idle threads end after 30 s
    while time.monotonic() < deadline:
        gc.collect()
        if not any(t.name.startswith("tinkex-") for t in threading.enumerate()):
            return
        time.sleep(0.1)


def judge(
    before: Dict[str, float], warm: Dict[str, float], after: Dict[str, float], totals: Any
) -> List[str]:
    """Return a line for each thing that is not as it must be."""
    wrong = []
    if after["sessions"]:
        wrong.append(f"{after['sessions']} sessions live on in the client")
    if totals["live"]:
        wrong.append(f"{totals['live']} sessions live on in the servers")
    for what in ("threads", "sockets"):
        if after[what] > before[what]:
            wrong.append(f"{after[what] - before[what]} {what} are left over")
    if after["MB"] > warm["MB"] + SLACK_MB:
        wrong.append(f"memory grew from {warm['MB']:.0f} to {after['MB']:.0f} MB")
    return wrong


def print_row(label: str, row: Dict[str, float]) -> None:
    print(
        f"{label:18} {row['MB']:6.1f} MB {row['threads']:4.0f} threads "
        f"{row['sockets']:4.0f} sockets {row['sessions']:4.0f} sessions",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
