"""A Tinker server that costs next to nothing, for measuring clients.

One thread, one selector, canned results: samples are done ``--hold`` seconds after they arrive (and
up to ``--spread`` seconds later, evenly distributed, since real ones have different lengths),
training requests at once.  Prints its URL, and runs until its standard input ends.

A sample's two tokens are the high and low half of the time at which it was done, in microseconds of
the system's monotonic clock, so that a client can tell how late it gets the result.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import selectors
import socket
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

from tinkex.types import (
    ForwardBackwardOutput,
    SampledSequence,
    SampleResponse,
    TensorData,
)
from tinkex.wire.proto_codec import PROTOBUF

JSON, PROTO = "application/json", "application/x-protobuf"
API = "/api/v1/"


class Client:
    """One connection: bytes received but not yet handled, and bytes still to be sent."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = bytearray()
        self.unsent = b""


class Server:
    def __init__(self, hold_s: float, spread_s: float, flags: Dict[str, Any]) -> None:
        self._hold_s = hold_s
        self._spread_s = spread_s
        self._flags = flags
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(sys.stdin, selectors.EVENT_READ, None)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._timers: List[Tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        self._done_at: Dict[str, float] = {}
        self._datums: Dict[str, List[int]] = {}  # tokens of each datum of a pass
        self._events: List[Tuple[str, int]] = []  # finished samples, for retrieve_futures
        self._pollers: List[Tuple[Client, int]] = []
        self.seen: Dict[str, int] = {}

    def run(self) -> None:
        while True:
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
            timeout = self._timers[0][0] - now if self._timers else None
            for key, events in self._selector.select(timeout):
                if key.fileobj is sys.stdin:
                    return
                if key.data is None:
                    self._accept()
                    continue
                client: Client = key.data
                if events & selectors.EVENT_WRITE:
                    self._flush(client)
                if events & selectors.EVENT_READ:
                    self._read(client)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(sock, selectors.EVENT_READ, Client(sock))

    def _drop(self, client: Client) -> None:
        self._selector.unregister(client.sock)
        client.sock.close()
        self._pollers = [(c, n) for c, n in self._pollers if c is not client]

    def _read(self, client: Client) -> None:
        try:
            data = client.sock.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        client.received += data
        while True:
            end = client.received.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(client.received[:end]).decode("latin-1")
            first, *lines = head.split("\r\n")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
            total = end + 4 + int(headers.get("content-length", "0"))
            if "expect" in headers and len(client.received) < total:
                client.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            if len(client.received) < total:
                return
            body = bytes(client.received[end + 4 : total])
            del client.received[:total]
            method, path, _ = first.split(" ")
            self._handle(client, method, path.partition("?")[0], body)

    def _flush(self, client: Client) -> None:
        try:
            sent = client.sock.send(client.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(client)
            return
        client.unsent = client.unsent[sent:]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
        self._selector.modify(client.sock, wanted, client)

    def _answer(
        self, client: Client, body: bytes, content_type: str = JSON, status: int = 200
    ) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        if client.sock.fileno() < 0:
            return
        client.unsent += head.encode() + body
        self._flush(client)

    def _later(self, at: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (at, next(self._ids), call))

    def _handle(self, client: Client, method: str, path: str, body: bytes) -> None:
        route = path[path.find(API) + len(API) :]
        self.seen[route] = self.seen.get(route, 0) + 1
        if route == "asample":
            number = next(self._ids)
            name = f"sample-{number}"
            at = time.monotonic() + self._hold_s + self._spread_s * (number * 0.618034 % 1)
            self._done_at[name] = at
            if self._flags.get("sample_use_retrieve_futures"):
                self._later(at, lambda: self._finished(name))
            self._json(client, request_id=name, sample_sequence_ids=[f"q{number}"])
        elif route == "retrieve_future":
            name = json.loads(body)["request_id"]
            at = self._done_at.get(name, 0.0)
            if at <= time.monotonic():
                self._result(client, name)
            else:
                self._later(at, lambda: self._result(client, name))
        elif route == "retrieve_futures":
            wanted = json.loads(body)
            self._poll(client, wanted["prev_cursor"], wanted.get("timeout"))
        elif route in ("forward_backward", "forward"):
            name = f"pass-{next(self._ids)}"
            request = PROTOBUF.decode_forward_backward(body)
            self._datums[name] = [datum.model_input.length for datum in request.data]
            self._json(client, request_id=name)
        elif route in ("optim_step", "create_model"):
            self._json(client, request_id=f"{route}-{next(self._ids)}")
        else:
            self._json(client, **self._plain(route))

    def _plain(self, route: str) -> Dict[str, Any]:
        return {
            "client/config": self._flags,
            "create_session": {"session_id": "s", "type": "create_session"},
            "create_sampling_session": {
                "sampling_session_id": "s:sample:0",
                "type": "create_sampling_session",
            },
            "get_info": {
                "model_id": "m",
                "model_data": {"model_name": "base", "tokenizer_id": "base"},
                "is_lora": True,
                "lora_rank": 32,
            },
            "telemetry": {"status": "accepted"},
        }.get(route, {})

    def _json(self, client: Client, **fields: Any) -> None:
        self._answer(client, json.dumps(fields).encode())

    def _result(self, client: Client, name: str) -> None:
        kind = name.rpartition("-")[0]
        if kind == "sample":
            at = int(self._done_at[name] * 1e6)
            tokens = np.array([at >> 30, at & (2**30 - 1)], np.int32)
            sequence = SampledSequence("length", tokens, np.zeros(2, np.float32))
            answer = PROTOBUF.encode_samples(SampleResponse([sequence]))
            self._answer(client, answer, PROTO)
        elif kind == "pass":
            outputs = [
                {"logprobs": TensorData.from_numpy(np.full(length, -1.0, np.float32))}
                for length in self._datums.pop(name)
            ]
            output = ForwardBackwardOutput(outputs, {"loss:sum": 1.0}, "ArrayRecord")
            self._answer(client, PROTOBUF.encode_output(output), PROTO)
        elif kind == "create_model":
            self._json(client, model_id="m", type="create_model")
        else:
            self._json(client, metrics={})

    def _finished(self, name: str) -> None:
        self._events.append((name, 60))
        if self._pollers:
            waiting, self._pollers = self._pollers, []
            # Completions within a millisecond are reported together, as real servers do.
            self._later(time.monotonic() + 0.001, lambda: self._tell_all(waiting))

    def _poll(self, client: Client, cursor: int, timeout: Optional[float]) -> None:
        if cursor < len(self._events) or timeout == 0.0:
            self._tell(client, cursor)
        else:
            self._pollers.append((client, cursor))
            self._later(time.monotonic() + (timeout or 30.0), lambda: self._expire(client))

    def _expire(self, client: Client) -> None:
        for waiting, cursor in self._pollers:
            if waiting is client:
                self._pollers.remove((waiting, cursor))
                self._tell(client, cursor)
                return

    def _tell_all(self, waiting: List[Tuple[Client, int]]) -> None:
        for client, cursor in waiting:
            self._tell(client, cursor)

    def _tell(self, client: Client, cursor: int) -> None:
        completions = [
            {"state": "finished", "request_id": name, "response_payload_uncompressed_size": size}
            for name, size in self._events[cursor:]
        ]
        self._json(client, completions=completions, cursor=len(self._events))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hold", type=float, default=0.0)
    parser.add_argument("--spread", type=float, default=0.0)
    parser.add_argument("--flags", type=json.loads, default={})
    arguments = parser.parse_args()
    server = Server(arguments.hold, arguments.spread, arguments.flags)
    print(server.url, flush=True)
    server.run()


if __name__ == "__main__":
    main()
