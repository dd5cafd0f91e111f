"""A session server for the benchmarks, in a separate process: slow, hung or faulty.

    python benchmarks/session_server.py [--hosts 10] [--beat-s 0.05] [--ttl-s 60]

Prints its base URLs as one line of JSON and serves until its standard input ends.  Each port
stands for a host.  ``POST /mode {"hang": true, "chaos": 0.3}`` changes how a host behaves;
``GET /facts`` returns what it has seen.  This file uses no tinkex code.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import socket
import struct
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, Optional

#: What a chaotic host answers, with relative frequencies.
CHAOS = {404: 1, 410: 1, 401: 1, 429: 3, 500: 4, 503: 4, "hang": 1, "reset": 3}


class Host(ThreadingHTTPServer):
    """One port: its sessions, their heartbeats, and how it behaves."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, beat_s: float, ttl_s: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.beat_s = beat_s
        self.ttl_s = ttl_s
        # Guards everything below.
        self.lock = threading.Lock()
        self.mode: Dict[str, Any] = {"hang": False, "chaos": 0.0, "down": False, "hang_s": 30.0}
        self.sessions: Dict[str, float] = {}  # when each was last heard from
        self.beats: Dict[str, List[float]] = collections.defaultdict(list)
        self.record = False
        self.created = self.finished = self.expired = 0
        self.changed = threading.Event()  # set to release hung requests

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do nothing: clients that disconnect are part of the benchmarks."""

    def expire(self) -> None:
        """Drop the sessions that have been silent for too long."""
        now = time.monotonic()
        with self.lock:
            for session_id in [s for s, at in self.sessions.items() if now - at > self.ttl_s]:
                del self.sessions[session_id]
                self.expired += 1

    def facts(self) -> Dict[str, Any]:
        self.expire()
        with self.lock:
            return {
                "live": len(self.sessions),
                "created": self.created,
                "finished": self.finished,
                "expired": self.expired,
                "beats": dict(self.beats),
            }


class Handler(BaseHTTPRequestHandler):
    """The four routes a session needs, and two for the benchmark."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet
    disable_nagle_algorithm = True
    server: Host

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        if self.path == "/facts":
            self.answer(200, self.server.facts())
        elif not self.misbehave():
            self.answer(200, {"supported_models": []})

    def do_POST(self) -> None:
        host = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/mode":
            with host.lock:
                host.record = body.pop("record", host.record)
                host.mode.update(body)
                released, host.changed = host.changed, threading.Event()
                if "record" in body:
                    host.beats.clear()
            released.set()
            self.answer(200, {})
        elif self.path == "/api/v1/create_session":
            if not self.misbehave():
                session_id = str(uuid.uuid4())
                with host.lock:
                    host.sessions[session_id] = time.monotonic()
                    host.created += 1
                self.answer(200, {"session_id": session_id})
        elif self.path == "/api/v1/session_heartbeat":
            self.beat(body["session_id"])
        elif self.path.endswith("/finish"):
            session_id = self.path.split("/")[-2]
            if not self.misbehave(session_id):
                with host.lock:
                    known = host.sessions.pop(session_id, None) is not None
                    host.finished += known
                self.answer(200 if known else 404, {})
        else:
            self.answer(404, {"detail": "no such route"})

    def beat(self, session_id: str) -> None:
        host = self.server
        now = time.monotonic()
        with host.lock:
            if host.record:
                host.beats[session_id].append(now)
        if self.misbehave(session_id):
            return
        time.sleep(host.beat_s)
        host.expire()
        with host.lock:
            known = session_id in host.sessions
            if known:
                host.sessions[session_id] = now
        self.answer(200 if known else 404, {"type": "session_heartbeat"})

    def misbehave(self, session_id: Optional[str] = None) -> bool:
        """Misbehave if the host's mode says so; return whether the request is dealt with."""
        host = self.server
        with host.lock:
            mode, changed = dict(host.mode), host.changed
        what: Any = None
        if mode["hang"]:
            what = "hang"
        elif mode["down"]:
            what = "reset"
        elif random.random() < mode["chaos"]:
            what = random.choices(list(CHAOS), list(CHAOS.values()))[0]
        if what is None:
            return False
        if what in (404, 410, 401) and session_id is not None:
            with host.lock:  # the session is really gone
                host.sessions.pop(session_id, None)
        if what == "hang":
            changed.wait(mode["hang_s"])
        if what in ("hang", "reset"):
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
        else:
            self.answer(what, {"detail": "so there"})
        return True

    def answer(self, status: int, body: Any) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


def main() -> None:
    parser = argparse.ArgumentParser(description="A server of sessions for the benchmarks.")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--beat-s", type=float, default=0.0)
    parser.add_argument("--ttl-s", type=float, default=60.0)
    args = parser.parse_args()
    hosts = [Host(args.beat_s, args.ttl_s) for _ in range(args.hosts)]
    for host in hosts:
        threading.Thread(target=host.serve_forever, daemon=True).start()
    print(json.dumps([host.url for host in hosts]), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
