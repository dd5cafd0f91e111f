"""Two hundred sessions on one manager: are all heartbeats sent, and are they on time?

    python benchmarks/heartbeats.py [--seconds 30] [--sessions 200] [--gil-seconds 90]

The server is a separate process and takes 50 ms for each beat; the period is scaled down from 10 s
to 2 s.  Times are taken where the beats arrive.  A beat's lateness is relative to its session's
most punctual beat, so a delay common to all beats does not count.

The last part runs a script that holds the interpreter for seconds at a time against a server
that drops sessions after 60 s without a heartbeat.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import math
import random
import sys
import time
from typing import Any, Dict, List, Sequence

import numpy as np
from harness import SessionServers

from tinkex import ServiceClient
from tinkex._sessions.manager import SessionManager
from tinkex.config import Config

PERIOD_S = 2.0
BEAT_S = 0.05


def start_all(manager: SessionManager, urls: Sequence[str], count: int) -> Dict[str, str]:
    """Start *count* sessions, spread over *urls*; return the URL of each."""
    where: Dict[str, str] = {}
    for number in range(count):
        url = urls[number % len(urls)]
        session_id = manager.start_session(Config(url, heartbeat_interval_s=PERIOD_S))
        where[session_id] = url
    return where


def lateness(arrivals: Sequence[float], began: float, ended: float) -> Any:
    """Return how late each beat of a session was, and how many were due from *began* to *ended*."""
    at = np.asarray([t for t in arrivals if began <= t < ended])
    if not len(at):
        return at, int((ended - began) // PERIOD_S)
    beat = np.rint((at - at[0]) / PERIOD_S)
    phase = (at - beat * PERIOD_S).min()
    first = math.ceil((began - phase) / PERIOD_S)
    wanted = math.floor((ended - phase) / PERIOD_S) - first + 1
    return at - beat * PERIOD_S - phase, wanted


def watch(
    servers: SessionServers, where: Dict[str, str], urls: Sequence[str], seconds: float
) -> Dict[str, Any]:
    """Let the manager beat for a while; return how well it did on *urls*."""
    for url in urls:
        servers.mode(url, record=True)
    began = time.monotonic()
    time.sleep(seconds)
    ended = time.monotonic()
    late: List[float] = []
    wanted = 0
    for url in urls:
        beats = servers.facts(url)["beats"]
        for session_id, at in where.items():
            if at == url:
                each, due = lateness(beats.get(session_id, []), began, ended)
                late.extend(each)
                wanted += due
    p50, p99, most = np.percentile(late, [50, 99, 100]) * 1000
    return {"sent": len(late), "wanted": wanted, "p50": p50, "p99": p99, "max": most}


def report(name: str, found: Dict[str, Any]) -> bool:
    """Print a row; return whether the beats were sent on time."""
    share = 100 * found["sent"] / found["wanted"]
    print(
        f"{name:38} {found['sent']:6}/{found['wanted']:<6} {share:6.2f} %   "
        f"p50 {found['p50']:5.1f}  p99 {found['p99']:5.1f}  max {found['max']:6.1f} ms late",
        flush=True,
    )
    return bool(share >= 99.5 and found["p99"] < 100)


def one_host(count: int, seconds: float) -> bool:
    """Watch all sessions on one host; then stop some of them."""
    with SessionServers(beat_s=BEAT_S) as servers, SessionManager() as manager:
        where = start_all(manager, servers.urls, count)
        time.sleep(PERIOD_S)
        good = report(f"{count} sessions, one host", watch(servers, where, servers.urls, seconds))
        stops = []
        for session_id in random.sample(list(where), 20):
            began = time.monotonic()
            manager.stop_session(session_id)
            stops.append((time.monotonic() - began) * 1000)
            manager.start_session(Config(servers.urls[0], heartbeat_interval_s=PERIOD_S))
        print(f"{f'stop one of {count}':38} median {np.median(stops):.1f}  max {max(stops):.1f} ms")
        return good and max(stops) < 50


def ten_hosts(count: int, seconds: float) -> bool:
    """Watch the other hosts' beats while one of ten hangs; then close while it still hangs."""
    with SessionServers(hosts=10, beat_s=BEAT_S) as servers:
        manager = SessionManager()
        where = start_all(manager, servers.urls, count)
        time.sleep(PERIOD_S)
        hung, *healthy = servers.urls
        servers.mode(hung, hang=True, hang_s=3600.0)
        name = f"{count} sessions, one of ten hosts hangs"
        good = report(name, watch(servers, where, healthy, seconds))
        began = time.monotonic()
        manager.close()
        took = time.monotonic() - began
        servers.mode(hung, hang=False)
        live = sum(servers.facts(url)["live"] for url in healthy)
        print(
            f"{f'close with {count} live, one host hung':38} {took:.2f} s, of which 2 s at most "
            f"wait for the hung host; {live} sessions were not informed"
        )
        return good and took < 3 and live == 0


class Told(logging.Handler):
    """Collects the log lines that a user sees."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def hold_the_interpreter(seconds: float) -> bool:
    """Hold the GIL for up to 15 s at a time, at the usual heartbeat interval of 10 s."""
    told = Told()
    logging.getLogger("tinkex").addHandler(told)
    libc = ctypes.PyDLL(None)  # calls through it keep the GIL
    held = 0
    with SessionServers(ttl_s=60) as servers:
        clients = [ServiceClient(base_url=servers.urls[0]) for _ in range(5)]
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            pause = random.randint(5, 15)
            libc.sleep(pause)
            held += pause
            time.sleep(0.05)
        facts = servers.facts(servers.urls[0])
        for client in clients:
            client.close()
    late = [text for text in told.texts if "late" in text]
    print(
        f"{'GIL held for 5-15 s at a time':38} {held} of {time.monotonic() - began:.0f} s: "
        f"{facts['expired']} of {len(clients)} sessions lost at a TTL of 60 s"
    )
    for text in late:
        print(f"{'':38} {text}")
    return facts["expired"] == 0 and len(late) == 1 == len(told.texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="duration of each watch")
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--gil-seconds", type=float, default=90.0)
    args = parser.parse_args()
    results = [
        one_host(args.sessions, args.seconds),
        ten_hosts(args.sessions, args.seconds),
        hold_the_interpreter(args.gil_seconds),
    ]
    print("all as wanted" if all(results) else "NOT as wanted")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
